"""Follows a recipe of CONTRIBUTING.md in a copy of the tree, and runs there what it says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = (
    "src", "tests", "docs", "examples", "benchmarks", "studies", "CONTRIBUTING.md", "README.md",
    "CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "NOTICE", "constraints.txt",
    "pyproject.toml",
)  # fmt: skip
NAMED = re.compile(r"`((?:[\w.-]+/)+(?:[\w.-]+\.(?:py|md))?)`")
MOST_FILES = 3
"""Files of code that a recipe may touch."""

# what every recipe must leave green, whichever part of the package it adds to
ALWAYS = {
    "tests/house/test_imports.py": ("every_part_has_its_place", "imports_go_one_way"),
    "tests/house/test_sizes.py": ("no_file_is_longer",),
    "tests/house/test_cycles.py": ("no_two_files_of_a_folder",),
    "tests/test_docs.py": ("every_source_file_is_in",),
}


def section(title):
    """A recipe, as it is written."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def is_named(path, title):
    """Whether a recipe names a file, or the folder that it goes to."""
    text = section(title) + section("Whatever you add")
    return any(path.endswith(name) or path.startswith(name) for name in NAMED.findall(text))


class Copy:
    """A copy of the tree that notes which files a recipe made it touch."""

    def __init__(self, top):
        self.top, self.touched = top, set()
        skip = shutil.ignore_patterns("__pycache__")
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, top / name, **({"ignore": skip} if (ROOT / name).is_dir() else {}))
        (top / "build").symlink_to(ROOT / "build")

    def write(self, name, text):
        assert not (self.top / name).exists()
        (self.top / name).write_text(text, encoding="utf-8")
        self.touched.add(name)

    def check(self, name, text):
        """A test of what a recipe leads to, which is no part of it."""
        (self.top / name).write_text(text, encoding="utf-8")

    def put(self, name, before, added):
        """Add text before the first place where another stands."""
        text = (self.top / name).read_text(encoding="utf-8")
        head, found, tail = text.partition(before)
        assert found, (name, before)
        (self.top / name).write_text(head + added + found + tail, encoding="utf-8")
        self.touched.add(name)

    def run(self, *command):
        """The output of a program in the copy; it must end well."""
        ended = subprocess.run(
            [sys.executable, *command], cwd=self.top, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(self.top / "src")}, timeout=800,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
        return ended.stdout


def follow_and_check(copy, title, edits, tests, new, always=ALWAYS):
    """Make the edits, in files that the recipe names; then one run of tests, each with its words.

    Args:
        copy: The copy of the tree.
        title: The recipe's heading.
        edits: New files as ``(name, text)``, additions as ``(name, before, added)``.
        tests: The files of the tests that the recipe names, or others that must pass.
        new: Which of these tests are run, as pytest's ``-k`` has it.
        always: Which tests of the house are run besides, words of their names by file.
    """
    for edit in edits:
        (copy.write if len(edit) == 2 else copy.put)(*edit)
    assert [path for path in copy.touched if not is_named(path, title)] == []
    code = [path for path in copy.touched if path.startswith("src/")]
    assert 1 <= len(code) <= MOST_FILES, code
    chosen = " or ".join([f"({new})", *(name for names in always.values() for name in names)])
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-v"]
    selected = ("-m", "not slow", "-k", chosen)
    ended = copy.run("-m", "pytest", *options, *selected, *tests, *always)
    ran = [line for line in ended.splitlines() if " PASSED " in line]
    houses = [line for line in ran if line.startswith(tuple(always))]
    assert len(houses) >= sum(map(len, always.values()))
    assert len(ran) > len(houses)
