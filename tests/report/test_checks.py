"""JUnit and Markdown: the counts of the record, whatever the names are."""

import csv
import io
from xml.etree import ElementTree

import pytest

import bulkedge
from bulkedge.intruder import Verdict
from bulkedge.report import Gate, to_csv, to_junit, to_markdown, to_parquet
from helpers import save, weights


@pytest.fixture
def record(shipped):
    return shipped["lora-r1"]


@pytest.mark.parametrize(("fail_on", "failures"), [(Verdict.ROTATED, 8), (Verdict.INTRUDER, 4)])
def test_a_test_case_a_matrix(record, fail_on, failures):
    suite = ElementTree.fromstring(to_junit(record, Gate(fail_on)).encode())  # noqa: S314 — our own
    assert int(suite.get("tests")) == len(suite) == 37
    assert int(suite.get("failures")) == len(suite.findall("testcase/failure")) == failures
    assert suite.get("errors") == "0"


def test_what_could_not_be_judged_is_an_error(tmp_path):
    bad = weights(20, 16)
    bad[0, 0] = float("nan")
    save(tmp_path / "a.safetensors", {"w.weight": weights(20, 16), "x.weight": weights(9, 8)})
    save(tmp_path / "b.safetensors", {"w.weight": bad, "x.weight": 2 * weights(9, 8)})
    record = bulkedge.audit(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    suite = ElementTree.fromstring(to_junit(record).encode())  # noqa: S314 — our own
    assert suite.get("errors") == "1"
    assert "NaN" in suite.find("testcase/error").get("message")


def test_markdown_has_the_verdict_and_the_affected(record):
    text = to_markdown(record)
    assert "8 of 370 leading directions are new" in text
    assert text.count("| `") == 8
    assert text.index("pooler.dense.weight") < text.index("encoder.layer.0")  # the worst first


def test_names_are_no_markup(tmp_path):
    name = "a|b`<script>[x](http://y).weight\x07"
    save(tmp_path / "a.safetensors", {name: weights(30, 20)})
    save(tmp_path / "b.safetensors", {name: weights(30, 20, seed=1)})
    record = bulkedge.audit(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    row = next(line for line in to_markdown(record).splitlines() if line.startswith("| `a"))
    assert row.count("`") == 2
    assert "<script>" not in row
    assert "\x07" not in to_junit(record)
    ElementTree.fromstring(to_junit(record).encode())  # noqa: S314 — our own


def test_parquet_has_the_rows_of_the_csv(record):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(io.BytesIO(to_parquet(record)))
    rows = list(csv.DictReader(io.StringIO(to_csv(record))))
    assert table.num_rows == len(rows) == 370
    assert table.column_names == list(rows[0])
    assert table["score"].to_pylist() == [float(row["score"]) for row in rows]
    assert table["verdict"].to_pylist() == [row["verdict"] for row in rows]
