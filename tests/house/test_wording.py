"""The pages, messages and docstrings keep to plain English: a list of words, short sentences."""

import re
from statistics import median

import pytest
import wording

from helpers import some


def test_nothing_says_what_stopped_readers():
    found = {
        f"{place}: {words!r}; write {instead!r}"
        for place, text in some(wording.said())
        for words, instead in wording.dialect(text)
        if not any(place == page and re.fullmatch(p, words) for page, p in wording.MAY)
    }
    assert found == set()


@pytest.mark.parametrize(
    "text",
    ["It says how sure that is.", "How strong an update a layer bears.", "A row a direction.",
     "The audit goes on where it was.", "Of a gap that small nothing is hidden."],
)  # fmt: skip
def test_the_list_finds_what_readers_quoted(text):
    assert wording.dialect(text)


@pytest.mark.parametrize("name", wording.PLAIN)
def test_sentences_are_short(name):
    text = wording.page_of(name).read_text(encoding="utf-8")
    found = some(wording.lengths(text))
    assert median(found) <= wording.MEDIAN
    long = [s for s in wording.sentences(text) if len(wording.WORD.findall(s)) > wording.LONGEST]
    assert long == []


def test_a_long_sentence_is_counted():
    text = "# Head\n\nOne two three.\n\n```sh\ncode that is no sentence\n```\n\n" + "word " * 41
    assert wording.lengths(text) == [3, 41]
