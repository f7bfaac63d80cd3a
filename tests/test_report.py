import csv
import io
import json
import re

import pytest
import torch
from rich.console import Console

import bulkedge
from bulkedge import CheckpointError, InputError, report
from bulkedge._errors import printable
from bulkedge.intruder import COUNTED, Verdict
from bulkedge.records import Skipped
from bulkedge.report import columns
from bulkedge.report.terminal import MAX_ROWS
from bulkedge.report.verdicts import APPEARANCE
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
    assert max(len(line) for line in lines if not line.startswith("  bulkedge ")) <= 80
    rows = [line for line in lines if line.startswith("encoder.")]
    assert len(rows) == MAX_ROWS
    assert "… and 5 matrices less affected: see the record (--output)" in lines
    worst = [float(line.split()[-1]) for line in rows]
    assert worst == sorted(worst)


def test_a_pipe_gets_sentences_on_one_line(record):
    lines = printed(record, terminal=False).splitlines()
    assert report.verdict_line(record) in lines
    assert "skipped: 3, such as head0.bias: no counterpart in the base" in lines
    assert "skipped: x.bias: not stored in the tuned checkpoint" in lines
    quiet = printed(record, terminal=False, brief=True).splitlines()
    assert quiet[0] == report.verdict_line(record)
    assert not any(line.startswith(("skipped:", "certainty:", "hint:")) for line in quiet)


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
    line = report.verdict_line(changed)
    assert line.startswith("45 of 15 leading directions are new")
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


def test_one_of_anything_is_told_in_the_singular(record):
    matrix = record.matrices[0]
    few = matrix.model_copy(update={"directions": matrix.directions[:1], "new_directions": 1})
    verdicts = dict.fromkeys(Verdict, 0) | {few.directions[0].verdict: 1}
    summary = record.summary.model_copy(
        update={"matrices": 2, "audited": 1, "unchanged": 1, "new_directions": 1, "not_audited": 1,
                "lost": 0, "verdicts": verdicts, "spikes": 1, "beyond_top_k_threshold": 1,
                "tensors": None}
    )  # fmt: skip
    one = record.model_copy(update={"summary": summary, "matrices": [few], "skipped": []})
    lines = printed(one, terminal=False).splitlines()
    spikes = "1 of 1 spike of the update exceeds the limit θ_k of its matrix"
    assert f"hint: {spikes}" in lines
    line = next(line for line in lines if line.startswith("1 of 1 leading direction is new"))
    assert "in 1 of 1 matrix: 0 rotated, 1 intruder; 1 matrix unchanged" in line
    assert line.endswith("1 matrix could NOT be audited (its tensors count as lost)")


def test_a_wrong_base_is_doubted_in_the_terminal_too(record):
    line = "doubt: The base looks like noise in every matrix: is this the pretrained model?"
    assert line in printed(record, terminal=False).splitlines()  # of 45 matrices of noise
    assert line in printed(record, terminal=False, brief=True).splitlines()


def test_a_matrix_that_is_not_finite_has_a_remedy(record):
    note = "tuned holds 1 NaN and 0 Inf"
    bad = record.matrices[0].model_copy(update={"status": "not_finite", "note": note})
    changed = record.model_copy(update={"matrices": [bad]})
    told = f"not audited: {bad.name}: {note}; save the model again, or download it again, or"
    assert told in printed(changed, terminal=False)


# ---- one table of verdicts, one of columns


def test_every_verdict_has_its_appearance():
    assert set(APPEARANCE) == set(Verdict)
    assert [verdict for verdict in APPEARANCE if verdict in COUNTED] == list(COUNTED)
    for field in ("ink", "mark", "light", "dark"):
        assert len({getattr(look, field) for look in APPEARANCE.values()}) == len(Verdict)


def test_a_column_has_one_entry(record, monkeypatch):
    """Terminal, Markdown, CSV and page take their columns from the one list."""
    passes = columns.number(
        "passes", "products", lambda m: m.passes, digits=0, views=columns.EVERYWHERE
    )
    monkeypatch.setattr(columns, "COLUMNS", (*columns.COLUMNS, passes))
    count = str(record.matrices[0].passes)
    assert printed(record, terminal=False).splitlines()[0].endswith(" products")
    header, _, row = report.to_markdown(record).partition("| matrix ")[2].splitlines()[:3]
    assert header.endswith("| products |")
    assert row.endswith(f"| {count} |")
    assert csv_rows(record)[0]["passes"] == count
    data = json.loads(re.search(r'id="data">(.*?)</script>', report.to_html(record))[1])
    assert data["columns"][-1]["heading"] == "products"
    assert data["records"][0]["matrices"][0]["cells"]["passes"] == [int(count), count]


def test_what_the_command_writes_is_what_python_users_get(record, tmp_path):
    (tmp_path / "record.json").write_text(record.to_json())
    for path in (tmp_path, tmp_path / "record.json"):
        assert report.read(path) == record
    for name, format_ in some(report.FORMATS.items()):
        if name == "parquet":
            continue
        assert report.format_of(f"x{format_.endings[0]}") == name
        assert isinstance(report.render([record], name), str)
    assert report.render(record, "csv") == report.to_csv(record)
    assert report.render(record, labels=["A"]) == report.to_html(record, ["A"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda r, f: report.render(r, "pdf"), InputError, "expected a format of html, markdown,"),
        (lambda r, f: report.render([r, r], "csv"), InputError, "csv is of one record, got 2"),
        (lambda r, f: report.render([], "csv"), InputError, "csv is of one record, got 0"),
        (lambda r, f: report.format_of("x.pdf"), InputError, "a name that ends in .html, .md,"),
        (lambda r, f: report.read(f), CheckpointError, "holds no record.json; run `bulkedge audit"),
    ],
)
def test_what_cannot_be_rendered_or_read(call, error, message, record, tmp_path):
    with pytest.raises(error, match=message):
        call(record, tmp_path)
