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


def too_long(sentences):
    return [s for s in sentences if len(wording.WORD.findall(s)) > wording.LONGEST]


@pytest.mark.parametrize("page", wording.MARKDOWN, ids=lambda page: page.stem)
def test_sentences_of_pages_are_short(page):
    text = page.read_text(encoding="utf-8")
    assert median(some(wording.lengths(text))) <= wording.MEDIAN
    assert too_long(wording.sentences(text)) == []


def test_sentences_of_docstrings_are_short():
    found = {place: too_long(sentences) for place, sentences in some(wording.docstrings())}
    assert {place: long for place, long in found.items() if long} == {}
    # some are found, of functions with arguments and of modules with formulas
    counted = {place: len(sentences) for place, sentences in wording.docstrings()}
    assert counted["_moments.py:collect_moments"] > 15
    assert counted["spectral/certificate/probable.py:module"] > 10


def test_a_long_sentence_is_counted():
    text = "# Head\n\nOne two three.\n\n```sh\ncode that is no sentence\n```\n\n" + "word " * 41
    assert wording.lengths(text) == [3, 41]
