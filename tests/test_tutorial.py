"""docs/from-semicircle-to-intruder.md quotes what its script measures, and prints what it says."""

import contextlib
import importlib
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from helpers import some

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/from-semicircle-to-intruder.md"
FIGURES = ROOT / "docs/figures"
STORED = json.loads((FIGURES / "semicircle_to_intruder.json").read_text())
TEXT = PAGE.read_text()
SECTIONS = dict(re.findall(r"^## (\d)\. (.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+(?:\.\d+)?(?= %)|\d+\.\d+")
# criteria, levels and strengths that a section speaks about: given, not found
GIVEN = {
    "1": {"1.5"},
    "2": {"5", "1", "80"},  # levels, and the share of the values that fit_bulk takes
    "3": {"1.5", "0.75"},
    "4": {"0.5", "1.1", "1.5"},
}


def prose(section: str) -> str:
    """A section on one line, without code, formulas, figures and addresses."""
    for pattern in (r"^```.*?^```$", r"^    .*?$", r"^!\[.*?$"):
        section = re.sub(pattern, "", section, flags=re.MULTILINE | re.DOTALL)
    section = re.sub(r"(?m)^\| matrix.*$", "", section)
    section = re.sub(r"\(http[^)]*\)|arXiv:[\d.]+|`\d\.[\w.]+`", "", section)
    return " ".join(section.split())


def test_every_step_has_its_section_and_its_numbers():
    assert list(SECTIONS) == list(STORED["quoted"]) == list("1234567")


@pytest.mark.parametrize("number", STORED["quoted"])
def test_the_page_has_the_stored_numbers_and_no_other(number):
    quotes = STORED["quoted"][number].values()
    text = prose(SECTIONS[number])
    for each in some(quotes):
        shown = re.escape(prose(each["shown"]))
        assert re.search(rf"(?<![\d.]){shown}(?!\d|\.\d)", text), each["shown"]
    known = {x for each in quotes for x in NUMBER.findall(prose(each["shown"]))}
    assert set(NUMBER.findall(text)) - known <= GIVEN.get(number, set())


def test_the_words_of_a_quote_are_its_values():
    for quotes in some(STORED["quoted"].values()):
        for each in some(quotes.values()):
            shown = re.sub(r"`.*?`", "", each["shown"]).replace("−", "-")
            words = re.findall(r"-?\d+(?:\.\d+)?", shown)
            assert len(words) == len(each["values"]), each
            for word, value in some(zip(words, each["values"], strict=True)):
                unit = 10.0 ** -len(word.partition(".")[2])
                assert float(word) == pytest.approx(value, abs=0.5001 * unit), each


@pytest.mark.parametrize("code", [pytest.param(code, id=str(i)) for i, code in enumerate(BLOCKS)])
def test_a_block_prints_the_comment_at_its_end(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})  # noqa: S102
    expected = [line[2:] for line in code.splitlines() if line.startswith("# ")]
    assert printed.getvalue().splitlines() == expected


def test_the_page_shows_every_figure_with_words_for_it():
    shown = re.findall(r"^!\[(.*?)\]\(figures/(.*?)\)$", TEXT, re.MULTILINE)
    of_the_study = {path.name for path in FIGURES.glob("study_*.svg")}  # tests/test_study.py
    drawn = {path.name for path in FIGURES.glob("*.svg")} - of_the_study - {
        "predicted.svg", "certified_cost.svg", "certificate.svg", "monitor.svg",
    }  # fmt: skip  # other pages'
    assert {name for _, name in shown} == drawn
    assert all(len(words.split()) > 10 for words, _ in shown)


@pytest.mark.parametrize("path", sorted(FIGURES.glob("*.svg")), ids=lambda path: path.stem)
def test_a_figure_is_a_small_svg_without_a_date(path):
    text = path.read_text()
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314
    assert len(text) < 60_000
    assert "<dc:date>" not in text


@pytest.fixture
def script(monkeypatch):
    """The script as a module; its neighbours are found beside it."""
    monkeypatch.syspath_prepend(FIGURES)
    return importlib.import_module("semicircle_to_intruder")


@pytest.mark.slow
def test_the_script_measures_the_stored_numbers(script):
    assert STORED["seed"] == script.SEED
    measured = script.numbers(script.walk())
    for number, quotes in some(STORED["quoted"].items()):
        assert list(measured[number]) == list(quotes)
        for name, each in some(quotes.items()):
            assert measured[number][name]["values"] == pytest.approx(each["values"], rel=1e-4)


def test_a_figure_is_drawn_to_the_same_bytes(script, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    steps = importlib.import_module("steps")
    noise = importlib.import_module("noise_steps").noise
    drawn = []
    for _ in range(2):
        monkeypatch.setattr(steps, "HERE", tmp_path)
        steps.save(noise(script.torch.Generator().manual_seed(0), size=60))
        drawn.append((tmp_path / "noise.svg").read_bytes())
    assert drawn[0] == drawn[1]
