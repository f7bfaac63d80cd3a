"""``bulkedge compare``: what changed between two saved records."""

import json

import pytest

import bulkedge
from bulkedge import InputError
from bulkedge.report import SideBySide, read
from commands import run
from helpers import save, some, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Audits of a weak and a strong fine-tune, one of fewer matrices, and a repaired copy."""
    folder = tmp_path_factory.mktemp("compared")
    base = {f"layer.{i}.weight": weights(40, 30, seed=i) for i in range(3)}
    save(folder / "base.safetensors", base)
    for name, factors in {"weak": (0, 0.01, 1), "strong": (0, 1, 1), "fewer": (0, 1)}.items():
        tuned = {
            f"layer.{i}.weight": base[f"layer.{i}.weight"] + factor * weights(40, 30, seed=9 + i)
            for i, factor in enumerate(factors)
        }
        save(folder / f"{name}.safetensors", tuned)
        options = ("--partial",) if name == "fewer" else ()
        files = (folder / "base.safetensors", folder / f"{name}.safetensors")
        assert run("audit", *files, "-q", "-o", folder / name, *options).returncode == 1
    files = (folder / "base.safetensors", folder / "strong.safetensors")
    assert run("repair", *files, "-q", "-o", folder / "repaired").returncode in (0, 1)
    return folder


def test_what_changed_is_shown_matrix_by_matrix(folder):
    ended = run("compare", folder / "weak", folder / "strong")
    assert ended.returncode == 0, ended.stderr
    found = read(folder / "weak").compare(read(folder / "strong"))
    (change,) = found.changed
    lines = ended.stdout.splitlines()
    assert lines[0].split() == ["weak", "strong"]
    (counts,) = [line.split() for line in lines if line.startswith("new ")]
    totals = [sum(getattr(row, f"new_{x}") for row in found.matrices) for x in ("first", "second")]
    assert counts == ["new", *map(str, totals)]
    (row,) = [line for line in lines if line.startswith("layer.")]
    assert row.startswith("layer.1 ")
    assert f"0 → {change.new_second}" in row
    assert f"{change.worst_first:.3f} → {change.worst_second:.3f}" in row
    assert (
        f"from weak to strong: {totals[0]} → {totals[1]} new directions in 3 matrices that both "
        "have (1 of them unchanged in both); "
    ) in ended.stdout
    shown = {heading: int(number) for heading, number, _ in map(str.split, lines[1:4])}
    assert shown["matrices"] + shown["unchanged"] == len(found.matrices)
    assert "0 have fewer, 1 more" in ended.stdout


def test_one_line_and_one_verdict_where_it_is_to_be_quiet(folder):
    lines = run("compare", "-q", folder / "strong", folder / "weak").stdout.splitlines()
    assert lines[0].startswith("from strong to weak: ")
    assert "1 have fewer, 0 more" in lines[0]
    assert not any(line.startswith("layer.") for line in lines)


def test_a_repaired_copy_is_the_audit_after_it(folder):
    ended = run("compare", folder / "strong" / "record.json", folder / "repaired", "--json")
    found = json.loads(ended.stdout)
    repaired = read(folder / "repaired")
    assert (found["first"]["label"], found["second"]["label"]) == ("strong", "repaired")
    assert found["first"]["new_directions"] == read(folder / "strong").summary.new_directions
    assert found["second"]["new_directions"] == repaired.after.summary.new_directions
    for row in some(found["matrices"]):
        for end in ("first", "second"):
            verdicts = row[f"verdicts_{end}"]
            assert verdicts["rotated"] + verdicts["intruder"] == row[f"new_{end}"]


def test_matrices_of_one_alone_are_named(folder):
    ended = run("compare", folder / "strong", folder / "fewer")
    assert "only in strong: layer.2" in ended.stdout
    found = json.loads(run("compare", folder / "fewer", folder / "strong", "--json").stdout)
    assert (found["only_first"], found["only_second"]) == ([], ["layer.2.weight"])


def test_the_same_record_twice_has_two_names(folder):
    ended = run("compare", folder / "weak", folder / "weak")
    assert "(first)" in ended.stdout
    assert "0 have fewer, 0 more" in ended.stdout
    assert not [line for line in ended.stdout.splitlines() if line.startswith("layer.")]


@pytest.mark.parametrize(("name", "begins"), [("c.html", "<!doctype html>"), ("c.json", "{")])
def test_a_page_or_json_is_written(folder, tmp_path, name, begins):
    both = (folder / "weak", folder / "strong")
    ended = run("compare", *both, "-o", tmp_path / name, "--label", "A", "--label", "B")
    assert ended.returncode == 0, ended.stderr
    assert "comparison written to" in ended.stderr
    text = (tmp_path / name).read_text()
    assert text.startswith(begins)
    assert '"label":"B"' in text.replace(" ", "")
    again = run("compare", *both, "-o", tmp_path / name)
    assert (again.returncode, "exists" in again.stderr) == (2, True)
    assert run("compare", *both, "-o", tmp_path / name, "--force").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["weak", "none"], "none: cannot be read"),
        (["weak", "."], "holds the records of several runs, in fewer, repaired, strong, weak"),
        (["weak", "strong", "-o", "c.csv"], "expected a name that ends in .html or .json"),
        (["weak", "strong", "--label", "A"], "expected two labels, one for each record, got 1"),
        (["weak", "other"], "expected two audits of the same epsilon, got 0.5 and 0.6"),
    ],
)
def test_what_cannot_be_compared_is_exit_code_2(folder, arguments, words, monkeypatch):
    monkeypatch.chdir(folder)
    if "other" in arguments:
        files = ("base.safetensors", "strong.safetensors", "-q", "--epsilon", 0.6)
        run("audit", *files, "-o", folder.parent / "other")
        arguments = [folder.parent / "other" if x == "other" else x for x in arguments]
    ended = run("compare", *arguments)
    assert (ended.returncode, words in ended.stderr) == (2, True), ended.stderr


def test_labels_must_differ(folder):
    record = bulkedge.Record.from_json(folder / "weak")
    with pytest.raises(InputError, match="expected two records of different labels, got 1"):
        SideBySide({"weak": record})
