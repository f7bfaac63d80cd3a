"""What is raised is asked for, and what is asked for says which message it is."""

import ast
import re
from collections import defaultdict
from functools import cache

import pytest
from messages import HOLE, expectations, messages, patterns, words, written

import bulkedge
from bulkedge import _errors
from helpers import some

WINDOW = 11  # so many characters in a row are hardly ever met by chance
SHORTEST = 9  # of the words in a pattern
MEANT = 3  # so many messages may have a run of characters in common
ALIKE = 7  # and so many the words of a pattern: the same mistake in several places

OURS = {name for name in dir(_errors) if isinstance(getattr(_errors, name), type)}

# Texts that no test asks for, each with its reason.  Exact: a text that is tested must go.
UNTESTED = {
    "expected a pair with factors": "for the type checker: the caller has asked for them",
    "expected factors, got none": "for the type checker: the caller has asked for them",
    "expected two updates of one form": "for the type checker: both are of one pair",
}

# Patterns that take their words from a table, which says for each case what is lost, or from the
# name of a field or parameter.
TABLED = {
    ("test_strategies.py", f"^expected (a )?{HOLE}\\b.*, got "),
    ("tune/test_arguments.py", f"^expected {HOLE} .*, got .*; give {HOLE} a "),
    ("tune/test_changed_models.py", HOLE),
    ("tune/test_penalty.py", f"expected {HOLE} ≥ 1, got 0"),
}


def windows(text):
    """All runs of characters of a message; its longest piece is one if it is short."""
    pieces = text.split(HOLE)
    size = min(WINDOW, max(map(len, pieces)))
    return {piece[i : i + size] for piece in pieces for i in range(len(piece) - size + 1)} - {""}


@cache
def sites():
    """The places in the source where a run of characters is said."""
    found = defaultdict(set)
    for file, line, text in messages():
        for window in windows(text):
            found[window].add((file, line))
    return found


@cache
def said(words):
    """The messages that hold these words."""
    return {text for _, _, text in messages() if words in text}


def is_asked_for(text, asked):
    """Whether a text of the tests has a run of characters, or is a part, of few messages alone."""
    rarest = max(
        MEANT, min((len(sites()[w]) for w in windows(text)), default=0)
    )  # some say the same
    if any(len(sites()[w]) <= rarest and any(w in a for a in asked) for w in windows(text)):
        return True
    return any(a in text and len(said(a)) <= MEANT for a in asked if len(a) >= SHORTEST)


def shown(text):
    return text.replace(HOLE, "{}")


@cache
def asked():
    """The texts in the tests, and the words of patterns that have figures between them."""
    branches = [branch for _, _, pattern in patterns() for branch in words(pattern)]
    return written() + [piece for b in branches for part in b for piece in plain(part)]


def test_every_message_is_asked_for_by_a_test():
    assert len(messages()) > 300
    worded = {t for _, _, t in messages() if max(map(len, t.split(HOLE))) > SHORTEST}
    texts = {shown(t) for t in worded if not is_asked_for(t, asked())}
    assert texts == set(UNTESTED), sorted(texts ^ set(UNTESTED))


def test_a_message_that_no_test_asks_for_is_found():
    for _, _, text in some(messages()[::20]):
        assert not is_asked_for(text, ["expected, got", "; leave it", "zebras graze here"])


def plain(part):
    """The words of a pattern, without what stands for figures."""
    return re.split(r"[\d()\[\]]+", part)


def is_vague(pattern):
    """Whether a pattern, or one of its alternatives, would be met by many messages.

    Figures and brackets do not count: they are values that a message shows, not its words.
    """
    for branch in words(pattern):
        pieces = [piece for part in branch for piece in plain(part)]
        clear = [p for p in pieces if len(p) >= 6 and len(said(p)) <= ALIKE]
        whole = any(1 <= len(said(part)) <= MEANT for part in branch if len(part) >= SHORTEST)
        if max(map(len, branch)) < SHORTEST or not (clear or whole):
            return True
    return False


def test_every_pattern_says_which_message_it_means():
    assert len(patterns()) > 300
    vague = {(path, pattern) for path, _, pattern in patterns() if is_vague(pattern)}
    assert vague == TABLED, "take words for match= that only the meant message has"


@pytest.mark.parametrize(
    "pattern", ["expected", "no", "2", "", ".*", "cannot be read", "got", HOLE, f"got {HOLE}",
                "a distinctive text|no", r"got shape \(3,\)", "[expected numbers]", "rtol"]
)  # fmt: skip
def test_vague_patterns_are_found(pattern):
    assert is_vague(pattern)


@pytest.mark.parametrize(
    "pattern", ["raise max_steps", r"w\.json: cannot be read", r"expected 1 ≤ k ≤ 3|is a link that"]
)
def test_other_patterns_are_not(pattern):
    assert not is_vague(pattern)


def test_errors_of_ours_are_asked_for_by_their_message():
    """By ``match=``, or by a look at what was caught."""
    bare = []
    for path, call, inside, _ in expectations():
        names = {n.id for n in ast.walk(call) if isinstance(n, ast.Name)}
        names |= {n.attr for n in ast.walk(call) if isinstance(n, ast.Attribute)}
        looks = "caught.value" in ast.unparse(inside)
        if names & OURS and not looks and not any(k.arg == "match" for k in call.keywords):
            bare.append((path, call.lineno))
    assert bare == []


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        ("@pytest.mark.parametrize(('a', 'b'), [(1, 'x'), (2, 'y')])\ndef t(a, b): f(match=b)",
         "xy"),
        ("@pytest.mark.parametrize('b', ['x', pytest.param('y', id='z')])\ndef t(b): f(match=b)",
         "xy"),
        ("T = {'k': (1, 'x')}\n@pytest.mark.parametrize('k', T)\n"
         "def t(k):\n    a, b = T[k]\n    f(match=b)", "x"),
        ("T = {'x': 1}\n@pytest.mark.parametrize(('b', 'a'), T.items())\ndef t(b, a): f(match=b)",
         "x"),
        ("def t():\n    for a, b in [(1, 'x'), (2, 'y')]: f(match=b)", "xy"),
        ("def t(b): f(match=b)", HOLE),
        ("def t(b): f(match='x' if b else 'y')", "xy"),
    ],
)  # fmt: skip
def test_patterns_are_followed_to_where_they_are_written(test, expected):
    from messages import Tests

    tree = ast.parse(test)
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    (pattern,) = (
        n.value for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg == "match"
    )
    assert "".join(Tests(tree).texts(pattern, function)) == expected


def test_names_of_errors_are_known():
    assert {"InputError", "DegenerateWarning"} <= OURS
    assert issubclass(bulkedge.InputError, bulkedge.BulkedgeError)
