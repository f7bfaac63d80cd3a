"""Tests that cannot fail, found by how they are written."""

import ast
import re
from pathlib import Path

import pytest
from loops import unsafe_loops

TESTS = Path(__file__).parents[1]
CHECKS = re.compile(r"assert|raises|warns|fail$|check$|opcheck")

# (file, test): the call that it makes is the whole check; it raises where something is wrong
BY_RAISING = {
    ("test_docs.py", "test_python_blocks_run"),  # exec
    ("test_docs.py", "test_recipes_are_valid"),
    ("tune/test_sharded.py", "test_two_processes"),  # mp.spawn
}


def called(node):
    return getattr(node.func, "attr", None) or getattr(node.func, "id", "")


def functions(tree):
    return {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}


def calls(function):
    return [n for n in ast.walk(function) if isinstance(n, ast.Call)]


def is_checked(call):
    """Whether a call of subprocess.run raises where the program failed."""
    return any(k.arg == "check" and getattr(k.value, "value", 0) is True for k in call.keywords)


def checks(function, known, seen=frozenset()):
    """Whether a function, or one of its file that it calls, can fail."""
    if any(isinstance(node, ast.Assert) for node in ast.walk(function)):
        return True
    for call in calls(function):
        name = called(call)
        if CHECKS.search(name) or is_checked(call):
            return True
        if name in known and name not in seen and checks(known[name], known, seen | {name}):
            return True
    return False


def unchecked_programs(tree):
    """The functions that run a program and do not look at how it ended, nor do those they serve."""
    known, bad = functions(tree), set()
    runs = {
        name
        for name, function in known.items()
        if any(
            ast.unparse(c.func) == "subprocess.run" and not is_checked(c) for c in calls(function)
        )
        and "returncode" not in ast.unparse(function)
    }
    while runs:
        served = {
            name
            for name, function in known.items()
            if name not in runs and runs & {called(c) for c in calls(function)}
        }
        bad |= {name for name in runs if name.startswith("test_")}
        runs = {name for name in served if "returncode" not in ast.unparse(known[name])}
    return bad


def test_every_test_can_fail():
    bare = set()
    for path in TESTS.rglob("test_*.py"):
        known = functions(ast.parse(path.read_text(encoding="utf-8")))
        for name, function in known.items():
            if name.startswith("test_") and not checks(function, known):
                bare.add((str(path.relative_to(TESTS)), name))
    assert bare == BY_RAISING


def test_every_program_that_a_test_runs_is_looked_at():
    found = {
        (str(path.relative_to(TESTS)), name)
        for path in TESTS.rglob("test_*.py")
        for name in unchecked_programs(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == set()


# (file, loop): may well be empty, and other tests or rows of the table make up for it
MAY_BE_EMPTY = {
    ("rmt/test_laws.py", "law.atoms()"),  # most laws have none
}


def test_no_loop_of_assertions_runs_over_nothing():
    """Over what is written out, or over ``some(...)`` of the helpers, which is never empty."""
    found = {
        (str(path.relative_to(TESTS)), ast.unparse(loop.iter))
        for path in TESTS.rglob("test_*.py")
        for _, loop in unsafe_loops(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == MAY_BE_EMPTY, "wrap these in some(...): " + str(found ^ MAY_BE_EMPTY)


@pytest.mark.parametrize(
    ("over", "safe"),
    [
        ("[1, 2]", True), ("TABLE", True), ("TABLE.items()", True), ("range(3)", True),
        ("zip([1], x, strict=True)", True), ("some(x.rows)", True), ("enumerate(some(x))", True),
        ("x.rows", False), ("zip(x, y, strict=True)", False), ("[]", False), ("x.split()", False),
        ("[i for i in TABLE if i > 9]", False), ("zip([1], x)", False), ("sorted(x)", False),
    ],
)  # fmt: skip
def test_loops_over_nothing_are_found(over, safe):
    code = f"TABLE = {{1: 2}}\ndef test_x(x, y):\n    for i in {over}:\n        assert i\n"
    assert bool(unsafe_loops(ast.parse(code))) is not safe


def test_a_table_without_rows_is_an_error():
    """A parametrised test of nothing would be skipped without a word."""
    settings = (TESTS.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert 'empty_parameter_set_mark = "fail_at_collect"' in settings


SILENT = """
import subprocess
def test_x():
    printed = subprocess.run(["x"]).stdout
    for line in printed.splitlines():
        assert line
"""


def test_what_is_sought_is_found():
    assert unchecked_programs(ast.parse(SILENT)) == {"test_x"}
    assert unchecked_programs(ast.parse(SILENT.replace('["x"]', '["x"], check=True'))) == set()
    served = SILENT.replace("test_x", "run") + "def test_y():\n    run()\n"
    assert unchecked_programs(ast.parse(served)) == {"test_y"}
    assert (
        unchecked_programs(ast.parse(served.replace("    run()", "    run().returncode"))) == set()
    )
    empty = functions(ast.parse("def test_z():\n    print(1)\ndef helper():\n    assert 1"))
    assert not checks(empty["test_z"], empty)
    called_one = functions(ast.parse("def test_z():\n    helper()\ndef helper():\n    assert 1"))
    assert checks(called_one["test_z"], called_one)
