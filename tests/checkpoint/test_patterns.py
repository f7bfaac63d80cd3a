"""Patterns written by strangers: PEFT's answer, or an error in bounded time."""

import re
import time

import pytest

from bulkedge import AdapterError
from bulkedge.checkpoint import patterns
from bulkedge.checkpoint.patterns import Patterns

PATH = "model.layers.10.self_attn.q_proj"


@pytest.mark.parametrize(
    "pattern",
    ["q_proj", "proj", "self_attn.q_proj", r".*\.q_proj", "(q|k)_proj", "layers.1", PATH, "", "q_"],
)
def test_the_answer_of_peft(pattern):
    expected = re.match(rf"(.*\.)?({pattern})$", PATH) is not None  # peft.utils.other
    assert Patterns({pattern: 3}, "x").value(PATH, 8) == (3 if expected else 8)


def test_the_first_pattern_counts():
    assert Patterns({"k_proj": 1, "q_proj": 2, ".*": 3}, "x").value(PATH, 8) == 2


BAD = {
    "open": ("(", "missing \\)"),
    "deep": ("(" * 400 + "a" + ")" * 400, "recursion"),
    "long": ("a|" * 1000, "longer than 1000 characters"),
    "backtracking": ("(a|a|aa)+x", "timed out"),
    "recursive": ("(?R)", "timed out"),
    "huge_count": ("a{99999999999999999999}", "repeat count too big"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_patterns_are_errors_that_quote_them_shortly(case):
    pattern, message = BAD[case]
    found = Patterns({pattern: 2}, "adapter_config.json: rank_pattern")
    with pytest.raises(AdapterError, match=f"(?i)cannot be matched .*{message}") as caught:
        found.value("a" * 300, 8)
    assert str(caught.value).startswith("adapter_config.json: rank_pattern: pattern")
    assert len(str(caught.value)) < 300


def test_many_slow_matches_are_stopped_together(monkeypatch):
    """Each within its own time, a thousand modules would take half a minute."""
    monkeypatch.setattr(patterns, "MATCH_SECONDS", 5.0)
    monkeypatch.setattr(patterns, "ALL_SECONDS", 0.5)
    found = Patterns({"(a|a|aa)+x": 2}, "x")
    clock = time.monotonic()
    with pytest.raises(AdapterError, match=r"regex timed out|all of them took too long"):  # noqa: PT012
        for i in range(1000):
            found.value("a" * 20 + str(i % 10), 8)
    assert time.monotonic() - clock < 5


def test_patterns_that_took_all_their_time_are_not_tried_again(monkeypatch):
    monkeypatch.setattr(patterns, "ALL_SECONDS", 0.0)
    with pytest.raises(AdapterError, match="all of them took too long"):
        Patterns({"a+": 2}, "x").value("aa", 8)
