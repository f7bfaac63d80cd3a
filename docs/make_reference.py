"""Write docs/reference.md from the docstrings of every public name.

python docs/make_reference.py
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

PAGE = Path(__file__).with_name("reference.md")
MODULES = [
    "bulkedge",
    "bulkedge.intruder",
    "bulkedge.triplet",
    "bulkedge.spectral",
    "bulkedge.rmt",
    "bulkedge.update",
    "bulkedge.tune",
    "bulkedge.tune.peft",
    "bulkedge.tune.trainer",
    "bulkedge.tune.callback",
    "bulkedge.tune.sharded",
    "bulkedge.simulate",
    "bulkedge.report",
    "bulkedge.report.plots",
]
HEAD = """# Reference

Every public name, from its docstring (`python docs/make_reference.py` writes this page).
`BulkedgeError` is the base of every error that is meant for a caller.
"""
SECTIONS = ("Args:", "Attributes:", "Returns:", "Yields:", "Raises:", "References:", "Example:")


def render() -> str:
    """The whole page."""
    seen: set[int] = set()
    parts = [HEAD]
    for name in MODULES:
        module = importlib.import_module(name)
        parts.append(f"\n## {name}\n\n{prose(inspect.getdoc(module) or '')}")
        parts += [one(name, key, thing) for key, thing in public(module, seen)]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def public(module: ModuleType, seen: set[int]) -> Iterator[tuple[str, object]]:
    """The public names of a module that no earlier one has."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, thing in vars(module).items()
            if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__
        ]
    for name in names:
        thing = getattr(module, name)
        documented = inspect.isclass(thing) or inspect.isfunction(thing)
        if documented and id(thing) not in seen:
            seen.add(id(thing))
            yield name, thing


def one(module: str, name: str, thing: object) -> str:
    """The entry of one name."""
    text = f"### `{module}.{name}`\n\n```text\n{name}{signature(thing)}\n```\n\n"
    return text + prose(inspect.getdoc(thing) or "")


def signature(thing: object) -> str:
    """How it is called, a parameter a line where that is long."""
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        return ""
    try:
        found = inspect.signature(thing)  # pyright: ignore[reportArgumentType]
    except (ValueError, TypeError):
        return ""
    told = re.sub(r" at 0x[0-9a-f]+", "", str(found)).replace("'", "")
    if len(told) <= 90:
        return told
    lines = [re.sub(r" at 0x[0-9a-f]+", "", str(p)) for p in found.parameters.values()]
    return "(\n    " + ",\n    ".join(line.replace("'", "") for line in lines) + ",\n)"


def prose(text: str) -> str:
    """A docstring as Markdown."""
    lines, example, out = text.splitlines(), False, []
    listed = False
    for line in lines:
        if line in SECTIONS:
            if example:
                out.append("```")
            example, listed = line == "Example:", line in SECTIONS[:2] or line == "Raises:"
            out += ["", f"**{line[:-1]}**", ""] + (["```pycon"] if example else [])
            continue
        if example:
            out.append(line.removeprefix("    "))
            continue
        item = re.match(r" {4}([\w*]+): (.*)", line)
        out.append(f"- `{item[1]}`: {item[2]}" if listed and item else _plain(line))
    if example:
        while out[-1] == "":
            out.pop()
        out.append("```")
    return re.sub(r"\n{3,}", "\n\n", _inline("\n".join(out)))


def _plain(line: str) -> str:
    """A line of text; what is indented more is a formula."""
    if line.startswith(" " * 8):
        return line[2:]
    return line.removeprefix("    ") if line.startswith("    ") and line[4:5] != " " else line


def _inline(text: str) -> str:
    """Marks of reStructuredText as those of Markdown, outside of examples."""
    pieces = re.split(r"(```pycon.*?```)", text, flags=re.DOTALL)
    for i in range(0, len(pieces), 2):
        piece = re.sub(r":\w+:`~?([\w.]+)`", lambda m: f"`{m[1].rpartition('.')[2]}`", pieces[i])
        pieces[i] = piece.replace("``", "`")
    return "".join(pieces)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE}")
