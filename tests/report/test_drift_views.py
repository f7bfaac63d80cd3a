"""What every view of a record says of drift, and the gate on it."""

import csv
import io
import json
import re

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

import bulkedge
from bulkedge import report
from bulkedge.cli import cli
from bulkedge.moments import Moments
from bulkedge.report.advice import steps
from bulkedge.report.commands import audit_command
from bulkedge.report.drift import drift_lines, drift_sentences
from helpers import save, save_adapter, some, weights

CLEAN, FINDINGS, FAILURE = 0, 1, 2


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base of two layers and its moments, and of one layer alone; fine-tunes, weak and strong."""
    folder = tmp_path_factory.mktemp("moved")
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 20))
    base = save(folder / "base.safetensors", dict(model.state_dict()))
    with Moments(model) as moments, torch.no_grad():
        model(weights(200, 16))
    with Moments(model) as part, torch.no_grad():
        model[0](weights(200, 16))
    moments.save(folder / "base.moments")
    part.save(folder / "part.moments")
    for name, alpha in (("weak", 1e-3), ("strong", 4)):
        tensors = {
            f"base_model.model.{i}.lora_{x}.weight": weights(*shape, seed=i)
            for i, m, n in ((0, 24, 16), (2, 20, 24))
            for x, shape in (("A", (2, n)), ("B", (m, 2)))
        }
        save_adapter(folder / name, tensors, lora_alpha=alpha)
    save(folder / "same.safetensors", dict(model.state_dict()))
    return folder, base


@pytest.fixture(scope="module")
def records(files):
    folder, base = files
    return {
        f"{tuned}, {name}": bulkedge.audit(
            base, folder / tuned, recipe={"top_k": 2}, moments=_file(folder, name)
        )
        for tuned, name in (("weak", "base"), *(("strong", n) for n in ("base", "part", "")))
    }


def _file(folder, name):
    return folder / f"{name}.moments" if name else None


def printed(record, **options):
    stream = io.StringIO()
    report.print_record(record, Console(file=stream, width=160, color_system=None), **options)
    return stream.getvalue()


def test_a_terminal_has_the_column_and_the_line_where_moments_were_given(records):
    record = records["strong, base"]
    text = printed(record)
    head, first = text.splitlines()[:2]
    assert head.split()[-1] == "drift"
    worst = next(m for m in record.matrices if first.startswith(m.name.removesuffix(".weight")))
    assert first.split()[-1] == f"{worst.drift:.3g}"
    mean = record.summary.drift.mean
    assert f"drift on the inputs of the moments: mean {mean:.3g} of 2 matrices" in text
    assert drift_lines(record)[0] in printed(record, brief=True)
    assert drift_lines(records["strong, "]) == drift_sentences(records["strong, "]) == []
    assert "drift" not in printed(records["strong, "])


def test_what_was_not_measured_is_said_in_every_view(records):
    record = records["strong, part"]
    line = "2.weight: no inputs of this layer in the base moments: it did not run"
    assert f"drift NOT measured: {line}" in printed(record, brief=True)
    assert f"drift NOT measured: {line}" in report.to_markdown(record)
    assert f"Drift was not measured: {line}." in drift_sentences(record)
    (row,) = [r for r in csv.DictReader(io.StringIO(report.to_csv(record))) if r["index"] == "0"
              and r["matrix"] == "2.weight"]  # fmt: skip
    assert (row["drift"], row["drift_along"]) == ("", "")
    assert row["drift_note"] == line.partition(": ")[2]


def test_markdown_and_csv_have_the_column(records):
    record = records["strong, base"]
    with_it, without = (report.to_markdown(records[f"strong, {name}"]) for name in ("base", ""))
    assert "| drift |" in with_it
    assert "drift" not in without
    rows = list(csv.DictReader(io.StringIO(report.to_csv(record))))
    for matrix in some(record.matrices):
        mine = [row for row in rows if row["matrix"] == matrix.name]
        assert {float(row["drift"]) for row in some(mine)} == {matrix.drift}
        along = [d.drift_along for d in matrix.directions]
        assert [float(row["drift_along"]) for row in mine] == along
    junit = [report.to_junit(records[f"strong, {name}"]) for name in ("base", "")]
    assert len({re.sub(r'time="[^"]*"', "", text) for text in junit}) == 1


def test_advice_follows_the_drift_and_keeps_the_moments(records, files):
    folder, _ = files
    record = records["strong, base"]
    command = next(step.command for step in steps(record) if "method protect" in f"{step.command}")
    assert f"--method protect --moments {folder / 'base.moments'} --exclude 0" in command
    assert command.endswith("-o protected")
    assert f"--moments {folder / 'base.moments'}" in audit_command(record)
    for name in ("weak, base", "strong, "):
        assert not any("protect" in f"{step.command}" for step in steps(records[name]))
    assert "--moments" not in audit_command(records["strong, "])


def test_the_page_has_what_its_charts_need(records):
    page = report.to_html([records["strong, base"], records["strong, "]], ["with", "without"])
    text = re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1)
    measured, bare = json.loads(text)["records"]
    assert (measured["moments"], bare["moments"], bare["drift"]) == (True, False, None)
    assert any("mean square of a layer's outputs" in line for line in measured["explanation"])
    for shown, matrix in some(
        zip(measured["matrices"], records["strong, base"].matrices, strict=True)
    ):
        assert shown["drift"] == pytest.approx(matrix.drift, rel=1e-4)
        assert sum(part for _, part in shown["driftParts"]) == pytest.approx(matrix.drift, rel=1e-3)
        assert all(d["along"] is not None for d in shown["directions"])
    for shown in some(bare["matrices"]):
        assert (shown["drift"], shown["driftNote"], shown["driftParts"]) == (None, None, [])


def audit(*arguments):
    return CliRunner().invoke(cli, ["audit", *map(str, arguments), "-q"])


def test_changed_biases_are_told_and_may_close_the_gate(files, tmp_path):
    folder, base = files
    state = load_file(base)
    state["0.weight"] = state["0.weight"] * (1 + 1e-4)
    one, both = dict(state), dict(state)
    one["2.bias"] = state["2.bias"] + 1e-3
    both |= {"0.bias": state["0.bias"] * 2, "2.bias": state["2.bias"] + 30}
    given = ("--moments", folder / "base.moments", "--max-drift", "1", "--fail-on", "never")
    for name, tensors, code, bound in (
        ("none", state, CLEAN, False),
        ("one", one, CLEAN, True),
        ("both", both, FINDINGS, True),
    ):
        found = audit(base, save(tmp_path / f"{name}.safetensors", tensors), *given)
        assert found.exit_code == code
        assert ("with the changed biases of the layers" in found.stdout) is bound
        assert "NOT all" not in found.stdout
        assert ("with the most that changed biases can add" in found.stderr) is (code == FINDINGS)
    tuned = tmp_path / "both.safetensors"
    assert audit(base, tuned, *given, "--exclude", "*.bias").exit_code == CLEAN
    factors = load_file(folder / "weak/adapter_model.safetensors")
    for size, code in ((0.0, CLEAN), (5.0, FAILURE)):
        name = "base_model.model.2.lora_B.bias"
        biased = save_adapter(tmp_path / f"b{size}", factors | {name: torch.full((20,), size)},
                              lora_alpha=1e-3, lora_bias=True)  # fmt: skip
        found = audit(base, biased, *given)
        assert found.exit_code == code
        glob = "--exclude '*.lora_B.bias'"
        assert (f"1 changed norm or vector is no part of it: {name}; " in found.stdout) == bool(
            code
        )
        assert (glob in found.stdout) == bool(code)
        assert audit(base, biased, *given, "--exclude", "*.lora_B.bias").exit_code == CLEAN
    record = bulkedge.audit(base, biased, moments=folder / "base.moments", recipe={"top_k": 2})
    assert record.summary.drift.vectors == 1
    assert any("no part of it" in line for line in drift_sentences(record))


def test_the_gate_on_drift(files):
    folder, base = files
    given = ("--fail-on", "never", "--moments")
    weak = audit(base, folder / "weak", *given, folder / "base.moments", "--max-drift", "0.01")
    assert weak.exit_code == CLEAN
    strong = (base, folder / "strong", *given)
    for limit, code in (("0.01", FINDINGS), ("1e9", CLEAN)):
        found = audit(*strong, folder / "base.moments", "--max-drift", limit)
        assert found.exit_code == code
    assert audit(*strong, folder / "part.moments").exit_code == CLEAN
    found = audit(*strong, folder / "part.moments", "--max-drift", "1e9")
    assert found.exit_code == FAILURE
    assert "drift NOT measured: 2.weight" in found.stdout
    refused = audit(base, folder / "weak", "--max-drift", "0.1")
    assert "--max-drift needs the inputs to measure it on (--moments FILE)" in refused.stderr
    refused = audit(*strong, folder / "base.moments", "--max-drift", "nan")
    assert "expected a number of at least 0, got nan" in refused.stderr
    inside = audit(*strong, folder / "base.moments", "-o", folder / "base.moments/out")
    assert "is not a writable folder" in str(inside.exception)


def test_parts_without_moments_have_no_gate(files, tmp_path):
    folder, base = files
    for moments, code in (((), 1), (("--moments", folder / "base.moments"), CLEAN)):
        for i in (1, 2):
            out = tmp_path / f"{len(moments)}/{i}"
            done = audit(base, folder / "weak", *moments, "--shard", f"{i}/2", "-o", out)
            assert done.exit_code == CLEAN
        parts = [str(tmp_path / f"{len(moments)}/{i}") for i in (1, 2)]
        merged = CliRunner().invoke(cli, ["merge", *parts, "-q", "--max-drift", "0.01"])
        assert merged.exit_code == code
        if code:
            assert "the parts were audited without moments" in str(merged.exception)


def test_a_dry_run_counts_the_moments(files):
    folder, base = files
    plain, measured = (
        json.loads(audit(base, folder / "weak", *more, "--dry-run", "--json").stdout)
        for more in ((), ("--moments", folder / "base.moments"))
    )
    assert measured["matrices"] == plain["matrices"] == 2
    assert measured["gigabytes_to_read"] >= plain["gigabytes_to_read"]
