"""What a file imports of this package, in whatever form."""

import ast
import re
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src/bulkedge"
DOTTED = re.compile(r"bulkedge\.(\w+)[\w.]*(:[\w.]+)?")


def package_of(path):
    """The package that relative imports start from, as a list of names."""
    return ["bulkedge", *Path(path).parent.parts]


def absolute(name, package):
    """``..x`` as seen from a package; None if it leaves the package's top."""
    dots = len(name) - len(name.lstrip("."))
    if not dots:
        return name
    base = package[: len(package) - dots + 1]
    return ".".join([*base, name[dots:]]).rstrip(".") if base else None


def importers(tree):
    """The names under which a file knows ``import_module`` and its kin."""
    names = {"import_module", "__import__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("importlib", "builtins"):
            names |= {a.asname or a.name for a in node.names if a.name in names}
    return names


def called(node):
    return getattr(node.func, "id", None) or getattr(node.func, "attr", None)


def by_call(node, package):
    """The module that a call imports, as written; ``?`` if only a run can tell."""
    arguments = {k.arg: k.value for k in node.keywords}
    name = node.args[0] if node.args else arguments.get("name")
    level = arguments.get("level") or (node.args[4] if len(node.args) > 4 else None)
    if not isinstance(name, ast.Constant) or not isinstance(level, ast.Constant | None):
        return "?"
    written = "." * (level.value if level else 0) + name.value
    anchor = arguments.get("package") or (node.args[1] if len(node.args) > 1 else None)
    if written.startswith(".") and isinstance(anchor, ast.Constant):
        return absolute(written, anchor.value.split("."))
    return absolute(written, package)


def chain(node):
    """``bulkedge.a.b`` of nested attributes; None if they start elsewhere."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name) and node.id == "bulkedge" and parts:
        return ".".join(["bulkedge", *reversed(parts)])
    return None


def docstrings(tree):
    """The nodes of strings that are statements: for readers, without effect."""
    return {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def targets(code, path):
    """Every dotted name of this package that a file imports, ``?`` for one only a run can tell.

    Anywhere in the file: in functions, under TYPE_CHECKING, by ``importlib``, as an attribute of
    the package, or as a string that is a module's name.
    """
    tree, package = ast.parse(code), package_of(path)
    calls, prose, found = importers(tree), docstrings(tree), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = absolute("." * node.level + (node.module or ""), package)
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and called(node) in calls:
            found.add(by_call(node, package))
        elif isinstance(node, ast.Attribute):
            found.add(chain(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = DOTTED.fullmatch(node.value)
            if name and name[1] in places() and id(node) not in prose:
                found.add(node.value.replace(":", "."))
    return {name for name in found if name and re.match(r"(bulkedge\b|\?)", name)}


def place_of(path):
    """The part of the package that a file belongs to."""
    return Path(path).parts[0].removesuffix(".py")


@cache
def places():
    """Every part there is."""
    return {place_of(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py")}


@cache
def doors():
    """Where the names of the package itself come from."""
    found = targets((SOURCE / "__init__.py").read_text(encoding="utf-8"), "__init__.py")
    parts = [name.split(".") for name in found if name.count(".") == 2]
    return {name: place for _, place, name in parts}


def imported_places(code, path):
    """The parts that a file imports from; ``?`` stays."""
    known, home, found = places(), doors(), set()
    for name in targets(code, path):
        part = [*name.split("."), ""][1]
        if name == "?":
            found.add("?")
        elif part != "__version__":
            found.add(part if part in known else home.get(part, "__init__"))
    return found
