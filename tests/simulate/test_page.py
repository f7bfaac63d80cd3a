"""The page about experiments: it lists all of them, and quotes stored tables."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from bulkedge.simulate import EXPERIMENTS, Table, draw, run, to_svg
from helpers import needs

DOCS = Path(__file__).parents[2] / "docs"
TEXT = " ".join((DOCS / "simulate.md").read_text(encoding="utf-8").split())
STORED = ("transition", "full_vs_lora", "universality")


def stored(name):
    return Table.from_json((DOCS / f"simulate/{name}.json").read_text(encoding="utf-8"))


def said(table, name, form="{:.1f}", factor=1, **where):
    (value,) = table.where(**where).numbers(name)
    return form.format(factor * value)


def test_every_experiment_is_in_the_table():
    assert re.findall(r"\| `(\w+)` \|", TEXT) == list(EXPERIMENTS)


@pytest.mark.parametrize("name", STORED)
def test_stored_tables_are_of_the_experiments_as_they_are(name):
    table = stored(name)
    kind = EXPERIMENTS[name]
    assert table.config == kind().model_dump(mode="json")
    assert table.columns == kind.columns()
    assert sorted(p.stem for p in (DOCS / "simulate").glob("*.svg")) == sorted(STORED)
    assert f"(simulate/{name}.svg)" in TEXT


@needs("matplotlib", "3.10", "it splits the text of a figure otherwise")
@pytest.mark.parametrize("name", STORED)
def test_stored_figures_are_of_the_stored_tables(name):
    """Words and numbers of axes; the paths are those of a version of matplotlib."""
    shown = (DOCS / f"simulate/{name}.svg").read_text(encoding="utf-8")
    texts = [re.findall(r">([^<>\n]+)</t", svg) for svg in (shown, to_svg(draw(stored(name))))]
    assert len(texts[0]) > 20
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", STORED)
def test_stored_tables_come_out_again(name):
    table = stored(name)
    again = run(name, **table.config)
    for column in (*EXPERIMENTS[name].measured, *EXPERIMENTS[name].predicted):
        np.testing.assert_allclose(again.numbers(column), table.numbers(column), rtol=1e-6)


def test_the_transition_is_quoted_right():
    table = stored("transition")
    wide = {"shape": "wide", "strength": 2.0}
    two = {
        side: said(table, f"{prefix}{side}_overlap", "{:.3f}", **wide)
        for prefix, side in (("", "left"), ("", "right"))
    }
    theory = [said(table, f"theory_{side}_overlap", "{:.3f}", **wide) for side in two]
    assert f"left overlap is {two['left']} (theory {theory[0]})" in TEXT
    assert f"longer side, is {two['right']} ({theory[1]})" in TEXT
    near = {"shape": "square", "strength": 1.2}
    assert f"chance of {said(table, 'predicted_new', '{:.2f}', **near)} on the square" in TEXT
    assert f"and {said(table, 'new', '{:.2f}', **near)} of the draws" in TEXT
    for shape in ("square", "wide", "tall"):
        far = table.where(shape=shape)
        far = far.numbers("strength") >= 1.5, far.numbers("new") - far.numbers("predicted_new")
        assert np.abs(far[1][far[0]]).max() < 0.1


def test_dense_against_low_rank_is_quoted_right():
    table = stored("full_vs_lora")
    at = {"norm": 8.0, "base": "signals"}
    low, full = at | {"update": "low rank"}, at | {"update": "dense"}
    assert f"makes {said(table, 'outliers', **low)} new outliers, and" in TEXT
    assert f"and {said(table, 'counted', **low)} of the ten leading directions count" in TEXT
    dense = f"makes {said(table, 'outliers', **full)}, and {said(table, 'counted', **full)} count."
    assert dense in TEXT
    noise = full | {"base": "noise"}
    assert f"{said(table, 'counted', **noise)} of ten directions fall below 0.5" in TEXT
    assert f"with {said(table, 'outliers', **noise)} outliers" in TEXT
    outliers = [table.where(**low | {"base": b}).numbers("outliers")[0] for b in ("noise",)]
    assert outliers == [table.where(**low).numbers("outliers")[0]]  # as many


def test_universality_is_quoted_right():
    table = stored("universality")

    def share(entries, name="false_alarm"):
        return said(table, name, "{:.0f} %", 100, entries=entries)

    assert f"a spike is found in {share('t3')} of pure noise" in TEXT
    assert f"an overlap of {said(table, 'left_overlap', '{:.2f}', entries='t3')} instead" in TEXT
    assert f"still {share('t5')} of matrices" in TEXT
    assert f"it is {share('t10')}, with Gaussian entries {share('gaussian')}, at" in TEXT
    assert table.where(entries="correlated").column("white") == [0.0]
    assert f"find a spike in {share('correlated', 'false_alarm_known')} of them" in TEXT
    assert f"edge does in {share('correlated')}." in TEXT
