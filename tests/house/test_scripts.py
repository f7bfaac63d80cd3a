"""The scripts beside the package: they import, and what they name of the package is there."""

import ast
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "examples", "docs/figures", "docs/simulate")
SCRIPTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
OPTIONAL = ("playwright", "ray", "sklearn")
"""What a script may need that the extra [dev] does not promise to everybody."""


def imported(tree):
    """``(module, name)`` of every import, also within functions; None for a whole module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def is_there(module, name):
    """Whether a module has a name, or a module of that name in it."""
    found = importlib.import_module(module)
    if name is None or hasattr(found, name):
        return True
    return hasattr(found, "__path__") and importlib.util.find_spec(f"{module}.{name}") is not None


def chains(tree):
    """Attributes of the package that are read off its name, such as ``bulkedge.tune.Monitor``."""
    for node in ast.walk(tree):
        names, inner = [], node
        while isinstance(inner, ast.Attribute):
            names.append(inner.attr)
            inner = inner.value
        if names and isinstance(inner, ast.Name) and inner.id == "bulkedge":
            yield names[::-1]


def missing_of_the_package(tree):
    """What a script names of the package, and is not there."""
    absent = [
        f"{module}.{name}"
        for module, name in imported(tree)
        if module.split(".")[0] == "bulkedge" and not is_there(module, name)
    ]
    for chain in chains(tree):
        found = importlib.import_module("bulkedge")
        for name in chain:
            if not hasattr(found, name):
                absent.append(".".join(["bulkedge", *chain]))
                break
            found = getattr(found, name)
    return absent


def test_there_are_scripts():
    assert {path.parent.name for path in SCRIPTS} >= {"benchmarks", "figures", "minilm_wordnet"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_script_imports_and_names_what_there_is(path, monkeypatch):
    """It is imported as a module, so that nothing in it runs but its definitions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert missing_of_the_package(tree) == []
    monkeypatch.setattr(sys, "path", [str(path.parent), str(ROOT / "benchmarks"), *sys.path])
    for module, _ in imported(tree):
        if module.split(".")[0] in OPTIONAL:
            pytest.importorskip(module)
    before = set(sys.modules)
    try:
        spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
        spec.loader.exec_module(module)
    finally:  # two folders may have scripts of one name
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/") in SCRIPTS:
                del sys.modules[name]


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("from bulkedge.auditing.judge import Judged", "ModuleNotFoundError"),
        ("def f():\n    from bulkedge.intruder import gone", "bulkedge.intruder.gone"),
        ("import bulkedge\nbulkedge.tune.Gone()", "bulkedge.tune.Gone"),
        ("import bulkedge\nbulkedge.tune.Monitor()", None),
    ],
)
def test_what_is_gone_is_noticed(code, absent):
    if absent == "ModuleNotFoundError":
        with pytest.raises(ModuleNotFoundError, match="judge"):
            missing_of_the_package(ast.parse(code))
    else:
        assert missing_of_the_package(ast.parse(code)) == ([absent] if absent else [])
