"""What a repair did, before and after, stands in every report of a repaired copy."""

import json
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

import bulkedge
from bulkedge.cli import cli
from bulkedge.report import render
from cases import orthonormal
from helpers import save, weights

KINDS = ["markdown", "junit", "sarif"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, a fine-tune with a new direction, and its repair."""
    folder = tmp_path_factory.mktemp("repaired")
    W0 = weights(48, 40)
    spike = 60 * orthonormal(48, 1, 1) @ orthonormal(40, 1, 2).mT
    base = save(folder / "base.safetensors", {"q.weight": W0})
    tuned = save(folder / "tuned.safetensors", {"q.weight": (W0 + spike).float()})
    bulkedge.repair(base, tuned, folder / "out")
    return folder


def told(kind, text):
    """What a report says of repairs."""
    if kind == "junit":
        root = ElementTree.fromstring(text.encode())  # noqa: S314 — our own
        return [x.get("value") for x in root.iter("property") if x.get("name") == "repair"]
    if kind == "sarif":
        (run,) = json.loads(text)["runs"]
        found = [row for row in run["results"] if row["ruleId"] == "repair"]
        assert {row["level"] for row in found} <= {"note"}
        return [row["message"]["text"] for row in found]
    lines = text.replace("\\", "").splitlines()
    return [line.removeprefix("repair: ") for line in lines if line.startswith("repair: ")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["out", "out/repair.json"])
def test_a_report_says_what_was_before_and_after(kind, place, folder):
    done = CliRunner().invoke(cli, ["report", str(folder / place), "-o", "-", "--format", kind])
    (line,) = told(kind, done.stdout)
    assert line.startswith("clip: 1 direction new before, 0 after, 1 of 1 matrix changed")
    assert "evaluate before you ship" in line
    audit = bulkedge.audit(folder / "base.safetensors", folder / "tuned.safetensors")
    assert told(kind, render(audit, kind)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_beside_others_each_repair_is_told_with_its_name(kind, folder):
    records = [bulkedge.report.read(folder / "out"), bulkedge.report.read(folder / "out").before]
    text = render(records, kind, labels=["mended", "as it was"])
    (line,) = told(kind, text)
    assert "1 direction new before, 0 after" in line
    assert text.index("mended") < text.index("new before, 0 after")


@pytest.mark.parametrize("kind", KINDS)
def test_a_repair_that_wrote_nothing_says_what_it_would(kind, folder):
    base, tuned = folder / "base.safetensors", folder / "tuned.safetensors"
    (line,) = told(kind, render(bulkedge.repair(base, tuned, None), kind))
    assert line.startswith("would repair 1 matrix with 1 direction new")
