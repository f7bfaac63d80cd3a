"""Between the files of one folder imports go one way, lazy ones and those for types included."""

import pytest
from imports import SOURCE, targets
from picture import reach

# (folder): files that still import each other.  Exact: what has been mended must go from here.
EXCEPTIONS = {}
FREE = "bulkedge.__version__"  # a string, read from anywhere


def module_of(path):
    """``bulkedge.report.html`` of ``report/html.py``; a folder's own file is the folder."""
    parts = ("bulkedge", *path.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules():
    return {module_of(p.relative_to(SOURCE)): p.relative_to(SOURCE) for p in SOURCE.rglob("*.py")}


def file_of(name, known):
    """The file that a dotted name is in, as far as it names one."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return known.get(name)


def arrows_within(known, read=lambda path: (SOURCE / path).read_text(encoding="utf-8")):
    """All (file, file) of one folder of which the first imports the second."""
    found = set()
    for path in known.values():
        for name in targets(read(path), path) - {"?", FREE}:
            other = file_of(name, known)
            if other is not None and other.parent == path.parent and other != path:
                found.add((path, other))
    return found


def cycles(arrows):
    """The files from which the arrows lead back, by folder."""
    found = {}
    for path, there in reach(arrows).items():
        if path in there:
            found.setdefault(str(path.parent), set()).add(path.stem)
    return found


def test_no_two_files_of_a_folder_import_each_other():
    arrows = arrows_within(modules())
    assert len(arrows) > 100
    assert cycles(arrows) == EXCEPTIONS


FORMS = [
    "from .b import x",
    "from . import b",
    "from bulkedge.part.b import x",
    "import bulkedge.part.b",
    "def f():\n    from .b import x",
    "if TYPE_CHECKING:\n    from .b import x",
    "import importlib\nimportlib.import_module('.b', __package__)",
    "def f(x: 'bulkedge.part.b'): ...",
]


@pytest.mark.parametrize("form", FORMS)
def test_a_cycle_is_found_in_every_form(form, tmp_path, monkeypatch):
    (tmp_path / "part").mkdir()
    (tmp_path / "part/__init__.py").write_text("from .a import x\n")
    (tmp_path / "part/a.py").write_text(form + "\n")
    (tmp_path / "part/b.py").write_text("from .a import y\n")
    monkeypatch.setattr("test_cycles.SOURCE", tmp_path)
    monkeypatch.setattr("imports.places", lambda: {"part"})
    assert cycles(arrows_within(modules())) == {"part": {"a", "b"}}


def test_one_way_is_no_cycle(tmp_path, monkeypatch):
    (tmp_path / "part").mkdir()
    for name, code in {"__init__": "from .b import x", "b": "from .a import x", "a": ""}.items():
        (tmp_path / f"part/{name}.py").write_text(code)
    monkeypatch.setattr("test_cycles.SOURCE", tmp_path)
    arrows = arrows_within(modules())
    assert len(arrows) == 2
    assert cycles(arrows) == {}
