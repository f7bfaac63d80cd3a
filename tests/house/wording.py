"""The words that we do not write, what to write instead, and how long sentences are."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/bulkedge"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "action.yml",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/*/*.md")),
]
MARKDOWN = [path for path in PAGES if path.suffix == ".md"]

INSTEAD = {
    r"how sure": "how certain",
    r"how hardly": "with what probability",
    r"(goes|go|went) on (where|with|from)\b": "resumes, continues",
    r"go on with (it|its|the)": "resume",
    r"\bwhoever\b|\bwhoso\b": "anyone who",
    r"(^|\. )Who (only|wants|has|is)\b": "If you …",
    r"\bbears?\b": "may be, can take",
    r"serves? on its own": "works by itself",
    r"\bthe seeds'|\b(of|by|in) the seeds\b(?! of)|\bthe seeds (say|go|have)": "Scholz's note",
    r"\bthe seed('s (update|formula)| of this project)": "Scholz's note",
    r"\bneedle\b": "a narrow peak",
    r"nothing is hidden": "say what is shown",
    r"\bstands? right\b": "is to the right",
    r"\b(a|one) (row|file|line|side|entry) an? (?!and|or)\w+": "one row per matrix",
    r"\bone a (matrix|layer|direction|side|line|row|spike)\b": "one per matrix",
    r"(this|project|recipe that) (it )?began with": "name the source",
    r"\bis told apart|\bare told apart": "is distinguished",
    r"\bbut for a (probability|few|share)": "except with probability",
    r"(what|which) is no (terminal|number|weight|text|model)\b": "what is not a …",
    r"paper's count": "new directions",
    r"\ball the same\b": "nevertheless",
    r"a word on stderr": "a line on stderr",
    r"known before any training": "depends only on the base",
    r"with the memory that": "each needs the memory that",
    r"huggingface-cli": "hf",
    r"\bthey? tells? how\b": "says how",
    r"\ba hint, not a finding\b": "a hint",
    r"\bbelongs? into\b": "belongs in",
    r"\bknows? nothing of (the base|their base|W0|W₀|the noise)": "is unrelated to",
    r"\bcounts as none\b": "is ignored",
    r"\bspares the\b": "saves the",
    r"\bto the bit\b": "bit by bit, bit-identical",
    r"\btells (so|it|its|which|how|them|their)\b|\bno telling\b": "says, shows, reports",
    r"\btold (by|of|with|well)\b|\b(is|are) told\b": "is read from, is reported",
    r"\bas announced\b": "as predicted",
    r"\banything was looked at": "any result was seen",
    r"\bMeasured, that\b": "in our study, …",
    r"\bmend(s|ed)?\b": "correct",
    r"\bfor want of\b": "for lack of",
    r"\bforet(ell|old)": "predict",
    r"\bcounts? alike\b": "counts equally",
    r"\bin silence\b": "silently",
    r"\b(counted|measured) apart\b": "separately",
    r"(?<!-m )pip install 'bulkedge\[": "install() of _errors: this Python's pip",
}
"""Patterns that stopped readers, and what to write instead; a page that quotes one is in MAY."""

MAY = {
    ("CHANGELOG.md", ".*"),
}
"""Pages that may have a pattern: a file's name, and the pattern."""

MEDIAN, LONGEST = 18, 40
"""Words of a sentence: the middle of a page, and the most in any page or docstring."""


def said() -> Iterator[tuple[str, str]]:
    """Every page, and every docstring and text of the source: a place, and what it says."""
    for path in PAGES:
        yield path.name, " ".join(prose(path.read_text(encoding="utf-8")))
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = " ".join(node.value.split())
                yield f"{path.relative_to(SOURCE)}:{node.lineno}", text
    for path in sorted((SOURCE / "report/page").glob("*.html")):
        yield path.name, path.read_text(encoding="utf-8")


def dialect(text: str) -> list[tuple[str, str]]:
    """The patterns that a text has, and what to write instead."""
    found = []
    for pattern, instead in INSTEAD.items():
        if hit := re.search(pattern, text, re.IGNORECASE):
            found.append((hit[0], instead))
    return found


FENCE = re.compile(r"^(```|    )")


def prose(page: str) -> list[str]:
    """The paragraphs and list items of a page, without code, tables, headings and formulas."""
    page = re.sub(r"<!--.*?-->", "", page, flags=re.DOTALL)
    page = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    page = re.sub(r"^\|.*$|^#.*$|^ {4,}\S.*$|^\[\^?\w+\]:.*$", "", page, flags=re.MULTILINE)
    page = re.sub(r"!\[.*?\]\(.*?\)", "", page, flags=re.DOTALL)
    page = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", page)
    page = re.sub(r"\$[^$]*\$|`[^`\n]*`", "X", page)
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", page)
    return [" ".join(block.split()) for block in blocks if block.strip()]


ABBREVIATED = r"(?<!e\.g)(?<!i\.e)(?<!et al)(?<!cf)(?<!vs)"


def sentences(page: str) -> list[str]:
    """The sentences of a page."""
    found = []
    for block in prose(page):
        found += re.split(rf"{ABBREVIATED}(?<=[.!?])[\"*_)]*\s+|:\s*$", block)
    return [s for s in found if s and len(WORD.findall(s)) > 2]


WORD = re.compile(r"[^\W\d_][\w'’-]*")


SECTION = re.compile(r"^ *(Args|Attributes|Example|Raises|Returns|Yields):$", re.MULTILINE)
ARGUMENT = re.compile(r"^ +([\w*]+): ", re.MULTILINE)
LITERAL = re.compile(r"``[^`]*``")
EXAMPLE = re.compile(r"^ *(>>>|\.\.\. ).*$", re.MULTILINE)
DRAWN = re.compile(r"^ *[│├└].*$|^={3}.*^={3}[ =]*$", re.MULTILINE | re.DOTALL)


def docstrings() -> Iterator[tuple[str, list[str]]]:
    """Every docstring of the source: its place, and its sentences; formulas are indented."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = EXAMPLE.sub("", ast.get_docstring(node) or "")
                if isinstance(node, ast.Module):
                    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
                text = LITERAL.sub("X", DRAWN.sub("", text))
                text = ARGUMENT.sub(r"\n\n\1. ", SECTION.sub("\n", text))
                lines = (line.strip() for line in text.splitlines())
                name = getattr(node, "name", "module")
                yield f"{path.relative_to(SOURCE)}:{name}", sentences("\n".join(lines))


def lengths(page: str) -> list[int]:
    """How many words each sentence has."""
    return [len(WORD.findall(sentence)) for sentence in sentences(page)]


def main(*names: str) -> None:
    """Print how long the sentences of each page are, and of all docstrings, and the long ones."""
    for path in [p for p in MARKDOWN if not names or p.stem in names]:
        show(str(path.relative_to(ROOT)), sentences(path.read_text(encoding="utf-8")))
    if not names:
        show("docstrings", [sentence for _, found in docstrings() for sentence in found])


def show(name: str, found: list[str]) -> None:
    """Print a line of counts, and every sentence that is too long."""
    words = {sentence: len(WORD.findall(sentence)) for sentence in found}
    print(f"{name:36} {len(found):4} sentences, median {median(words.values()):4}, "
          f"longest {max(words.values())}")  # fmt: skip
    for sentence, count in words.items():
        if count > LONGEST:
            print(f"    {count}: {sentence}")


if __name__ == "__main__":
    main(*sys.argv[1:])
