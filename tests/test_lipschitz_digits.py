"""The digits example holds what it says it holds, and its page says what was measured."""

import contextlib
import importlib
import io
import json
import math
import re

import pytest

from helpers import EXAMPLE, some

HERE = EXAMPLE.parent / "lipschitz_digits"
STORED = json.loads((HERE / "results.json").read_text())
ROUNDED = 1e-4  # what a cap without a certificate may leave
HELD_BY_US = ("cap", "projected, clip", "projected, rescale")


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        return importlib.import_module("lipschitz_digits")


@pytest.fixture(scope="module")
def quick(script, tmp_path_factory):
    """A quick run, with no git at hand: what it stored and what it printed."""
    folder, printed = tmp_path_factory.mktemp("digits"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("PATH", str(folder))
        script.main(["--quick", "--output", str(folder / "results.json")])
    return json.loads((folder / "results.json").read_text()), printed.getvalue()


@pytest.fixture(params=["quick", "stored"])
def measured(request):
    """What must hold holds of a run made now and of the stored one."""
    if request.param == "stored":
        return STORED["measured"]
    return request.getfixturevalue("quick")[0]["measured"]


def test_a_run_stores_where_it_ran_and_prints_its_tables(quick):
    stored, printed = quick
    assert stored["where"]["commit"] == "unknown"
    assert stored["where"].keys() == STORED["where"].keys()
    assert stored["measured"].keys() == STORED["measured"].keys()
    for name in (*HELD_BY_US, "torch, 1 iteration", "cap, operator"):
        assert f"\n| {name} | " in printed


def test_held_layers_are_certified_below_the_bound(measured):
    bound = measured["settings"]["bound"]
    for row in some(measured["mlp"] + measured["cnn"]):
        lower, upper = (max(ends) for ends in zip(*row["norms"], strict=True))
        assert lower <= upper
        assert row["excess_in_evaluation"] == pytest.approx(upper / bound - 1)
        assert row["lipschitz"] >= math.prod(upper for _, upper in row["norms"])
        if row["name"] in (*HELD_BY_US, "cap, operator"):
            assert upper <= bound * (1 + ROUNDED)
        if row["name"] == "cap, then certified":
            assert upper <= bound
            assert upper >= bound * (1 - ROUNDED)
        if row["name"] == "cap, reshaped kernel":
            assert max(row["reshaped_norms"]) <= bound * (1 + ROUNDED)


def test_held_layers_never_leave_the_ball(measured):
    """At the first forward, in training, and around weights that were trained without it."""
    for row in some(measured["mlp"]):
        if row["name"] in HELD_BY_US:
            keys = [key for key in row if key.startswith("excess_")]
            assert len(keys) == (5 if row["name"] == "cap" else 3)
            assert max(row[key] for key in keys) <= ROUNDED


def test_the_reshaped_kernel_does_not_bound_the_convolution(measured):
    for row in some(measured["cnn"]):
        if row["name"] == "cap, reshaped kernel":
            assert max(upper for _, upper in row["norms"]) > 1.5 * max(row["reshaped_norms"])


def test_the_networks_learn_and_sealing_costs_no_accuracy(measured):
    for rows in (measured["mlp"], measured["cnn"]):
        assert min(row["accuracy"] for row in rows) > 0.7
        for row in some(rows):
            assert row["accuracy"] >= row["robust"][0] >= row["robust"][1] >= 0
    by_name = {(row["name"], row["seed"]): row for row in measured["mlp"]}
    for seed in some(measured["settings"]["seeds"]):
        sealed, capped = by_name["cap, then certified", seed], by_name["cap", seed]
        assert sealed["accuracy"] == pytest.approx(capped["accuracy"], abs=0.005)


@pytest.fixture
def tables(script, capsys):
    """What the script prints of the stored results."""
    script.show(STORED["measured"])
    return capsys.readouterr().out


def test_the_readme_shows_the_stored_tables(tables):
    readme = (HERE / "README.md").read_text()
    assert len(tables.split("\n\n")) == 4
    for table in some(tables.split("\n\n")):
        assert table.strip() in readme


def test_the_readme_quotes_no_other_number(tables):
    readme = (HERE / "README.md").read_text()
    prose = "\n".join(line for line in readme.splitlines() if not line.startswith("|"))
    quoted = re.findall(r"\d[\d,]*\.\d+|\d[\d,.]*(?= %| times)|(?<=up to )\d+", prose)
    known = tables + json.dumps(STORED["measured"]["settings"])
    assert len(quoted) > 10
    for number in some(quoted):
        assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d]|[.,]\d)", known), number


def test_the_readme_tells_the_settings():
    settings = STORED["measured"]["settings"]
    readme = " ".join((HERE / "README.md").read_text().split())
    assert f"{settings['trained_on']:,} images to train on and {settings['tested_on']}" in readme
    assert f"{len(settings['seeds'])} seeds, {settings['epochs']} epochs" in readme
    assert f"batches of {settings['batch']}" in readme
    widths = [
        upper / lower - 1
        for row in STORED["measured"]["mlp"] + STORED["measured"]["cnn"]
        for lower, upper in row["norms"]
    ]
    assert max(widths) < 2e-9
    assert "relative width below 2e-9" in readme
