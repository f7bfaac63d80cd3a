"""``bulkedge report`` and ``--report``: files as asked for, and what does not go together."""

import pytest
from click.testing import CliRunner

from bulkedge.cli import cli
from helpers import save, weights


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audited")
    for factor, file in ((0, "a"), (1, "b")):
        tensors = {"w.weight": weights(30, 20) + factor * weights(30, 20, seed=1)}
        save(folder / f"{file}.safetensors", tensors)
    return folder


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def audit(folder, *options):
    return run("audit", folder / "a.safetensors", folder / "b.safetensors", *options)


@pytest.mark.parametrize(
    ("name", "begins"),
    [("r.html", "<!doctype html>"), ("r.md", "### bulkedge"), ("r.xml", "<?xml"), ("r.csv", '"')],
)
def test_a_format_by_its_ending(audited, tmp_path, name, begins):
    audit(audited, "-o", tmp_path / "out")
    for record in (tmp_path / "out", tmp_path / "out" / "record.json"):
        result = run("report", record, "-o", tmp_path / name, "--force")
        assert result.exit_code == 0, result.output
        assert (tmp_path / name).read_text().startswith(begins)


def test_an_audit_writes_it_too(audited, tmp_path):
    result = audit(audited, "--report", tmp_path / "page.html")
    assert result.exit_code == 1
    assert "report written to" in result.stderr
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    again = audit(audited, "--report", tmp_path / "page.html")
    assert again.exception
    assert "exists" in str(again.exception)


def test_several_records(audited, tmp_path):
    for name in ("one", "two"):
        audit(audited, "-o", tmp_path / name)
    both = [tmp_path / "one", tmp_path / "two"]
    result = run("report", *both, "-o", tmp_path / "r.html", "--label", "A", "--label", "B")
    assert result.exit_code == 0
    assert '"label":"B"' in (tmp_path / "r.html").read_text()
    for options, message in (
        (["-o", tmp_path / "r.csv"], "csv is of one record, got 2"),
        (["-o", tmp_path / "r2.html", "--label", "A"], "expected 2 labels, one for each audit"),
        (
            ["-o", tmp_path / "r.pdf"],
            "expected a name that ends in .html, .md, .xml, .sarif, .csv or .parquet",
        ),
    ):
        result = run("report", *both, *options)
        assert result.exit_code != 0
        assert message in " ".join(f"{result.stderr} {result.exception}".split())


def test_bad_inputs_are_told_before_anything_is_computed(audited, tmp_path):
    result = audit(audited, "--report", tmp_path / "r.docx")
    assert result.exit_code == 2
    assert "expected a name that ends in" in result.stderr
    result = audit(audited, "--report", audited / "a.safetensors" / "r.html")
    assert result.exception
    assert run("report", tmp_path / "none.json", "-o", tmp_path / "r.html").exception
