"""The picture in docs/architecture.md is what the imports are checked against."""

import pytest
from imports import SOURCE, imported_places, place_of, places
from picture import Picture, reach

PAGE = SOURCE.parents[1] / "docs/architecture.md"

# (file, place): why. Exact: one that is no longer needed fails.
UPWARD = {}


def arrows():
    return Picture(PAGE.read_text(encoding="utf-8").split("```")[1]).arrows()


def files():
    paths = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
    assert len(paths) > 100
    return paths


FORMS = {
    "import bulkedge.cli": {"cli"},
    "import bulkedge.cli as c, json": {"cli"},
    "import json, bulkedge.cli._output": {"cli"},
    "import bulkedge": {"__init__"},
    "import bulkedge as b": {"__init__"},
    "import bulkedge.rmt\nbulkedge.cli.main()": {"rmt", "cli"},
    "import bulkedge\nx = bulkedge.audit": {"__init__", "_audit"},
    "from bulkedge import cli": {"cli"},
    "from bulkedge import rmt, cli as c": {"rmt", "cli"},
    "from bulkedge import audit": {"_audit"},
    "from bulkedge import RepairRecord as R": {"repairing"},
    "from bulkedge import InputError": {"_errors"},
    "from bulkedge import *": {"__init__"},
    "from bulkedge import nobody_knows": {"__init__"},
    "from bulkedge.cli import main": {"cli"},
    "from bulkedge.cli._output import main": {"cli"},
    "from bulkedge._precision import x": {"_precision"},
    "from .. import cli": {"cli"},
    "from .. import _precision": {"_precision"},
    "from .. import *": {"__init__"},
    "from .. import __version__": set(),
    "from ..cli import main": {"cli"},
    "from ..cli._output import main": {"cli"},
    "from ..tune import clip": {"tune"},
    "from ..tune.peft.layer import x": {"tune"},
    "from . import x": {"rmt"},
    "from .x import y": {"rmt"},
    "from ..cli import (\n    main,\n)": {"cli"},
    "def f():\n    from ..cli import main": {"cli"},
    "def f():\n    def g():\n        import bulkedge.cli": {"cli"},
    "class A:\n    from ..cli import main": {"cli"},
    "if TYPE_CHECKING:\n    from ..cli import main": {"cli"},
    "try:\n    from ..cli import main\nexcept ImportError:\n    main = None": {"cli"},
    "import importlib\nimportlib.import_module('bulkedge.cli')": {"cli"},
    "import importlib\nimportlib.import_module(name='bulkedge.cli')": {"cli"},
    "import importlib as i\ni.import_module('..cli', __package__)": {"cli"},
    "from importlib import import_module\nimport_module('..cli', __package__)": {"cli"},
    "from importlib import import_module as get\nget('..cli', package=__package__)": {"cli"},
    "import importlib\nimportlib.import_module('.cli', 'bulkedge')": {"cli"},
    "import importlib\nimportlib.import_module('.cli', package='bulkedge')": {"cli"},
    "import importlib\nimportlib.import_module(name)": {"?"},
    "import importlib\nimportlib.import_module(f'bulkedge.{name}')": {"?"},
    "__import__('bulkedge.cli')": {"cli"},
    "__import__('cli', globals(), None, (), 2)": {"cli"},
    "__import__('cli', level=2)": {"cli"},
    "runpy.run_module('bulkedge.cli')": {"cli"},
    "pkgutil.resolve_name('bulkedge.cli:main')": {"cli"},
    "sys.modules['bulkedge.cli']": {"cli"},
    "def f(x: 'bulkedge.cli.Type'): ...": {"cli"},
    # no imports of ours
    "import json, torch": set(),
    "import bulkedgecases": set(),
    "from other.bulkedge import cli": set(),
    "import importlib\nimportlib.import_module('ray')": set(),
    "'''See bulkedge.cli.'''": set(),
    "'bulkedge.cli'": set(),
    "# from ..cli import main": set(),
    "file = 'bulkedge.json'": set(),
    "message = 'give bulkedge.audit a folder'": set(),
}


@pytest.mark.parametrize(("code", "expected"), FORMS.items(), ids=map(repr, FORMS))
def test_every_form_of_import_is_seen(code, expected):
    """As if it stood in a file of rmt/."""
    assert imported_places(code, "rmt/spike.py") == expected


def test_relative_imports_start_from_the_folder_of_the_file():
    assert imported_places("from ...cli import x", "tune/peft/layer.py") == {"cli"}
    assert imported_places("from ..clip import x", "tune/peft/layer.py") == {"tune"}
    assert imported_places("from . import cli", "__init__.py") == {"cli"}
    assert imported_places("from . import layer", "tune/peft/__init__.py") == {"tune"}
    assert imported_places("from .rmt import x", "_linmap.py") == {"rmt"}


DRAWINGS = {
    "a ◄── b": "b→a",
    "a ──► b": "a→b",
    "a ◄─┬─ b\n    └─ c": "b→a c→a",
    "a ◄─┐\nb ◄─┴─ c": "c→a c→b",
    "aa\n▲\n└─ b": "b→aa",
    "aa\n │\n ▼\nbb": "aa→bb",
    "a ◄─┬─ b ◄── c\n    └─ d": "b→a d→a c→b",
    "a   b\n▲   ▲\n└─┬─┘\n  c": "c→a c→b",
    "some words   and more\na ◄── b": "b→a",
}


@pytest.mark.parametrize(("drawing", "expected"), DRAWINGS.items())
def test_a_picture_is_read_as_it_is_drawn(drawing, expected):
    assert {f"{tail}→{head}" for tail, head in Picture(drawing).arrows()} == set(expected.split())


@pytest.mark.parametrize("drawing", ["a ◄──", "a ─── b", "── ► b", "a ◄─┬─ b\n    │"])
def test_a_line_that_leads_nowhere_is_no_picture(drawing):
    with pytest.raises(AssertionError, match=r"ends nowhere|without an arrowhead"):
        Picture(drawing).arrows()


def test_every_part_has_its_place_in_the_picture():
    assert places() == {name for arrow in arrows() for name in arrow}


def test_arrows_do_not_go_round():
    to = reach(arrows())
    assert not [name for name in to if name in to[name]]


def against(imported, own, to):
    """The parts that a file may not import; the package itself may import by any name."""
    allowed = {own} | to[own] | ({"?"} if own == "__init__" else set())
    return imported - allowed


def test_imports_go_one_way():
    to = reach(arrows())
    found = {
        (str(path), place)
        for path in files()
        for place in against(
            imported_places((SOURCE / path).read_text(encoding="utf-8"), path), place_of(path), to
        )
    }
    assert found == set(UPWARD)


def test_an_import_against_an_arrow_is_found():
    to = reach(arrows())
    for own, place in [("rmt", "cli"), ("update", "auditing"), ("_linmap", "triplet"),
                       ("intruder", "spectral"), ("auditing", "tune"), ("tune", "cli"),
                       ("rmt", "_linmap"), ("checkpoint", "__init__")]:  # fmt: skip
        assert against({place, own}, own, to) == {place}
    assert against({"?"}, "rmt", to) == {"?"}
    assert not against({"_linmap", "_errors", "update"}, "update", to)
