import csv
import io

import pytest
import torch
from rich.console import Console

import bulkedge
from bulkedge import report
from bulkedge._errors import printable
from bulkedge.intruder import Verdict
from bulkedge.records import Skipped
from bulkedge.report.terminal import MAX_ROWS
from cases import gaussian, orthonormal
from helpers import save, some


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    name = "encoder.layer.{}.attention.self.query.weight"
    base = {name.format(i): gaussian(120, 90) for i in range(45)} | {"x.bias": torch.zeros(3)}
    spike = 40 * orthonormal(120, 1, 1) @ orthonormal(90, 1, 2).mT
    tuned = {key: W + spike for key, W in base.items() if key != "x.bias"}
    tuned |= {f"head{i}.bias": torch.zeros(2) for i in range(3)}
    paths = save(folder / "b.safetensors", base), save(folder / "t.safetensors", tuned)
    return bulkedge.audit(*paths, recipe=bulkedge.Recipe(top_k=2))


def printed(record, *, terminal, width=80, **options):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=width, color_system=None)
    report.print_record(record, console, **options)
    return stream.getvalue()


def test_the_table_fits_a_terminal_of_80_columns(record):
    lines = printed(record, terminal=True).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("attention" in line for line in lines) == MAX_ROWS
    assert "… and 5 matrices less affected: see the record (--output)" in lines
    worst = [float(line.split()[-1]) for line in lines if "attention" in line and ".0" in line]
    assert worst == sorted(worst)


def test_a_pipe_gets_sentences_on_one_line(record):
    lines = printed(record, terminal=False).splitlines()
    assert report.verdict_line(record) in lines
    assert "skipped: 3, such as head0.bias: no counterpart in the base" in lines
    assert "skipped: x.bias: not stored in the tuned checkpoint" in lines
    assert printed(record, terminal=False, brief=True) == report.verdict_line(record) + "\n"


def test_what_is_lost_is_said_loudly(record):
    lost = [
        Skipped(name=f"l{i}.lora_A", reason=f"no counterpart in the base{near}", lost=True)
        for i, near in enumerate([" (nearest: 'l7')", ""])
    ]
    changed = record.model_copy(update={"skipped": [*record.skipped, *lost]})
    lines = printed(changed, terminal=False).splitlines()
    told = "NOT judged: 2, such as l0.lora_A: no counterpart in the base (nearest: 'l7')"
    assert told in lines
    assert "skipped: 3, such as head0.bias: no counterpart in the base" in lines


def test_findings_by_severity(record):
    verdicts = {Verdict.ALIGNED: 1, Verdict.ROTATED: 2, Verdict.INTRUDER: 4, Verdict.UNDECIDED: 8}
    summary = record.summary.model_copy(update={"verdicts": verdicts})
    changed = record.model_copy(update={"summary": summary})
    assert report.findings(changed, Verdict.ROTATED) == 6
    assert report.findings(changed, Verdict.INTRUDER) == 4
    line = report.verdict_line(changed)
    assert line.startswith("45 of 15 leading directions are new by the paper's count")
    assert "2 rotated, 4 intruder; 8 directions UNDECIDED" in line


def test_both_sides_are_told_apart(record):
    recipe = record.recipe.model_copy(update={"side": "both"})
    both = record.model_copy(update={"recipe": recipe})
    assert "intruder (left 45, right 0)" in report.verdict_line(both)


def csv_rows(record):
    return list(csv.DictReader(io.StringIO(report.to_csv(record))))


def test_csv_has_every_direction_and_every_field(record):
    rows = csv_rows(record)
    expected = [(m, d) for m in record.matrices for d in m.directions]
    assert len(rows) == len(expected) == 90
    for row, (matrix, direction) in some(zip(rows, expected, strict=True)):
        assert (row["matrix"], row["tuned_name"]) == (matrix.name, matrix.tuned_name)
        assert (row["status"], float(row["threshold"])) == ("audited", matrix.threshold)
        for field, value in some(direction.model_dump(mode="json").items()):
            if isinstance(value, float):
                assert float(row[field]) == value
            else:
                assert row[field] == ("" if value is None else str(value))


def test_csv_tells_what_was_not_judged(record):
    broken = record.matrices[0].model_copy(
        update={"status": "failed", "directions": [], "threshold": None, "note": "oh, no\nno"}
    )
    lost = Skipped(name="x.lora_A", reason="DoRA", lost=True)
    skipped = [*record.skipped, lost]
    rows = csv_rows(record.model_copy(update={"matrices": [broken], "skipped": skipped}))
    assert [(r["matrix"], r["tuned_name"], r["status"], r["note"]) for r in rows] == [
        (broken.name, broken.tuned_name, "failed", r"oh, no\nno"),
        ("", "x.lora_A", "lost", "DoRA"),
    ]
    assert {row[field] for row in rows for field in ("score", "side", "verdict")} == {""}


HOSTILE = {
    "=cmd|'/c calc'!A1": "'=cmd|'/c calc'!A1",
    "+1": "'+1",
    "-1": "'-1",
    "@SUM(A1)": "'@SUM(A1)",
    "\t=1": r"'\t=1",
    "\r=1": r"'\r=1",
    "\n=1": r"'\n=1",
    "＝1": "'＝1",
    'a","=1': 'a","=1',
    "a;=1": "a;=1",
    "a\r\n=1,2": r"a\r\n=1,2",
    "a\x1b[31m\u202e\0": r"a\x1b[31m\u202e\x00",
    "größe.weight": "größe.weight",
    "": "",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_csv_cells_of_hostile_names_stay_text(name, record):
    matrix = record.matrices[0].model_copy(update={"name": name, "tuned_name": name})
    lost = Skipped(name=name, reason=name, lost=True)
    changed = record.model_copy(update={"matrices": [matrix], "skipped": [lost]})
    text = report.to_csv(changed)
    assert len(text.splitlines()) == 1 + len(matrix.directions) + 1
    *rows, last = csv_rows(changed)
    cells = [row[field] for row in rows for field in ("matrix", "tuned_name")]
    assert {*cells, last["tuned_name"], last["note"]} == {HOSTILE[name]}
    assert all(line.startswith('"') for line in text.splitlines())


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a.b", "a.b"), ("a\x1bb", r"a\x1bb"), ("\u202ex", r"\u202ex"), ("größe", "größe")],
)
def test_printable(name, shown):
    assert printable(name) == shown
