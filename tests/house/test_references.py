"""Pages, headings and files that a text names are there."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from helpers import some

ROOT = Path(__file__).parents[2]
PATH = re.compile(r"(?<![\w./-])(?:docs|tests|benchmarks|examples|studies|src)(?:/[\w.*-]+)+/?")
PAGE = re.compile(r"(?<![\w./*-])((?:\.\./)*(?:[\w.-]+/)*[\w-]+\.md)(?:#([\w-]+))?")
WITHIN = re.compile(r"\]\(#([\w-]+)\)")
CODE = re.compile(r"`((?:[\w.-]+/)*[\w.-]+(?:/|\.py))`")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
FENCED = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)

# what a reader's own command writes, or a model's folder holds
OF_THE_READER = {"FILE.md", "summary.md", "r.md"}
ABOUT_THE_HOUSE = ("CONTRIBUTING.md", "docs/architecture.md", "docs/repair.md", "docs/simulate.md")


@cache
def files():
    """What is there, and its folders; all else in the working tree was made by a run."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # a copy of the tree, without its history
        kept = ("src", "tests", "docs", "benchmarks", "examples", "studies")
        return {path for top in kept for path in (ROOT / top).rglob("*")} | set(ROOT.glob("*"))
    paths = {ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    return paths | {folder for path in paths for folder in path.parents}


def texts():
    """Each of our own texts: pages, code, the messages and docstrings in it."""
    found = [
        path
        for path in sorted(files())
        if path.suffix in (".md", ".py", ".toml") or path.name == "Makefile"
        if path.parent != ROOT / "tests/house"
    ]
    assert len(found) > 250
    return [(path, path.read_text(encoding="utf-8")) for path in found]


def slug(heading):
    """The anchor that a forge, and the site, make of a heading."""
    plain = re.sub(r"`|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@cache
def anchors(path):
    page = FENCED.sub("", path.read_text(encoding="utf-8"))
    return {slug(heading) for heading in HEADING.findall(page)}


def page_of(name, path):
    """The page that a text means by a name: beside it, in docs/, or from the top; None if none."""
    for folder in (path.parent, ROOT, ROOT / "docs"):
        if (found := (folder / name).resolve()) in files():
            return found
    return None


def missing(text, path):
    """What a text names and is not there."""
    lost = []
    for name in PATH.findall(text):
        name = name.rstrip(".")
        if not any(found in files() for end in ("", ".py") for found in ROOT.glob(name + end)):
            lost.append(name)
    for name, anchor in PAGE.findall(text):
        if Path(name).name in OF_THE_READER:
            continue
        page = page_of(name, path)
        if page is None or (anchor and anchor not in anchors(page)):
            lost.append(f"{name}#{anchor}" if anchor else name)
    if path.suffix == ".md":
        lost += [f"#{a}" for a in WITHIN.findall(text) if a not in anchors(path)]
    return lost


def test_what_a_text_names_is_there():
    found = {
        (str(path.relative_to(ROOT)), name)
        for path, text in texts()
        for name in missing(text, path)
    }
    assert found == set()


def test_code_that_the_pages_about_the_house_name_is_there():
    ends = {str(path.relative_to(ROOT)) for path in files() if path.is_relative_to(ROOT)}
    for page in ABOUT_THE_HOUSE:
        names = CODE.findall((ROOT / page).read_text(encoding="utf-8"))
        for name in some(names):
            assert any(f"/{end}".endswith(f"/{name.rstrip('/')}") for end in ends), (page, name)


@pytest.mark.parametrize(
    "text",
    [
        "see docs/derivative.md", "(docs/derivative.md).", "[x](derivative.md)", "`nowhere.md`",
        "audit.md#no-such-heading", "docs/audit.md#no-such-heading", "tests/test_nothing.py",
        "benchmarks/nothing.py, and", "[x](../examples/nothing/README.md)", "src/bulkedge/x.py",
        "[x](#no-such-heading)", "examples/nothing/",
    ],
)  # fmt: skip
def test_names_of_nothing_are_found(text):
    assert len(missing(text, ROOT / "docs/triplets.md")) >= 1


@pytest.mark.parametrize(
    "text",
    [
        "see docs/audit.md.", "audit.md#options", "(docs/audit.md#options)", "tests/triplet/",
        "../examples/minilm_wordnet/README.md", "[x](#triplets-with-derivatives)", "docs/*.md",
        "bulkedge report out/record.json -o FILE.md", "https://example.org/docs/x.md",
    ],
)  # fmt: skip
def test_others_are_not(text):
    assert missing(text, ROOT / "docs/triplets.md") == []


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        ("Large models: resume, shards, clusters", "large-models-resume-shards-clusters"),
        ("What `audit` says", "what-audit-says"),
        ("The [paper](http://x)'s count", "the-papers-count"),
    ],
)
def test_anchors_are_those_of_a_forge(heading, expected):
    assert slug(heading) == expected
