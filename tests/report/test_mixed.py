"""Audits by different settings, or of different bases, are not compared in silence."""

import io
import json
import re

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import nn

import bulkedge
from bulkedge import InputError, Recipe, report
from bulkedge.cli import cli
from bulkedge.moments import Moments
from bulkedge.records import differences
from bulkedge.records.recipe import HARMLESS
from helpers import save, some, weights

OTHER = {
    "top_k": 3, "epsilon": 0.6, "side": "both", "include": ("a.*",), "exclude": ("b.*",),
    "partial": True, "split": {"a.weight": (12, 12)}, "seed": 1, "method": "dense",
    "critical_scale": True,
}  # fmt: skip
REFUSED = {"top_k", "epsilon", "side"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    model = nn.ModuleDict({n: nn.Linear(16, 24, bias=False) for n in ("a", "b")})
    state = {name: weights(24, 16, seed=i) for i, name in enumerate(model.state_dict())}
    model.load_state_dict(state)
    for seed in (1, 2):
        with Moments(model) as moments, torch.no_grad():
            model["a"](weights(50, 16, seed=seed))
        moments.save(folder / f"{seed}.moments")
    save(folder / "base.safetensors", state)
    save(folder / "again.safetensors", state)
    save(folder / "other.safetensors", {n: W + 1e-6 for n, W in state.items()})
    save(folder / "tuned.safetensors", {n: W + 0.01 * weights(24, 16) for n, W in state.items()})
    return folder


def audited(files, base="base", **more):
    return bulkedge.audit(files / f"{base}.safetensors", files / "tuned.safetensors", **more)


def said(record, other):
    """What each view of two records warns of."""
    named = {"one": record, "two": other}
    lines = differences(named)
    page = report.render([record, other], "html", list(named))
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert data["mixed"] == lines
    assert page.count('<p class="warning">') == len(lines)
    table = report.render([record, other], "markdown", list(named))
    before = table.partition("| fine-tune |")[0]  # at the top
    assert before.count("WARNING: ") == len(lines)
    told = io.StringIO()
    report.print_several(named, Console(file=told, width=300))
    assert [x for x in told.getvalue().splitlines() if x.startswith("WARNING: ")] == [
        f"WARNING: {line}" for line in lines
    ]
    return lines


@pytest.mark.parametrize("field", OTHER)
def test_another_setting_is_told(field, files):
    record, other = audited(files), audited(files, recipe={field: OTHER[field]})
    lines = said(record, other)
    assert len(lines) == (field not in HARMLESS)
    if field in REFUSED:
        assert lines[0].startswith(f"The audits differ in {field}, so that numbers of new")
        with pytest.raises(InputError, match=f"two audits of the same {field}"):
            record.compare(other)
        return
    found = record.compare(other)
    assert [f"WARNING: {line}" for line in found.warnings] == repr(found).splitlines()[: len(lines)]
    assert [line.partition(":")[0] for line in (*lines, *found.warnings)] == [
        f"The audits differ in {field}, so that not the same matrices are judged"
    ] * (2 * len(lines))
    assert all("(one)" in line and "(two)" in line for line in lines)


def test_every_setting_was_tried():
    assert set(OTHER) == set(Recipe.model_fields) - {"device"}


def test_the_same_settings_and_base_are_no_mixture(files):
    """The base may lie elsewhere."""
    assert said(audited(files), audited(files, "again")) == []
    assert audited(files).compare(audited(files, "again")).warnings == ()


def test_another_base_and_other_moments(files):
    record, other = audited(files), audited(files, "other")
    (line,) = said(record, other)
    assert line.startswith("The files of the bases differ: ")
    assert "other.safetensors (two)" in line
    assert "WARNING: The files of the bases differ" in repr(record.compare(other))
    one, two = (audited(files, moments=files / f"{i}.moments") for i in (1, 2))
    assert said(one, two) == [
        "The drift of the audits is on different inputs: their moments differ."
    ]
    assert said(one, record) == []  # without moments there is no drift to compare


def test_the_command_tells_it(files, tmp_path):
    for i, epsilon in enumerate(("0.5", "0.6")):
        paths = [str(files / f"{name}.safetensors") for name in ("base", "tuned")]
        done = CliRunner().invoke(cli, ["audit", *paths, "-q", "--epsilon", epsilon, "--fail-on",
                                        "never", "-o", str(tmp_path / f"{i}")])  # fmt: skip
        assert done.exit_code == 0, done.output
    places = [str(tmp_path / f"{i}") for i in range(2)]
    for ending in some(["html", "md"]):
        file = tmp_path / f"r.{ending}"
        done = CliRunner().invoke(cli, ["report", *places, "-o", str(file)])
        assert done.exit_code == 0, done.output
        assert "The audits differ in epsilon" in file.read_text()
