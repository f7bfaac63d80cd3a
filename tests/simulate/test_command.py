"""`bulkedge simulate` as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from bulkedge import OutputError, RecipeError
from bulkedge._errors import InputError
from bulkedge.cli import cli
from bulkedge.simulate import EXPERIMENTS, Rank, Table, draw, run, to_svg
from commands import run as bulkedge
from helpers import some

QUICK = ("--set", "size=40", "--set", "ranks=[1, 4]", "--set", "repeats=2")
SETTINGS = {"size": 40, "ranks": [1, 4], "repeats": 2}
BLOCKED = """
import sys
sys.modules["matplotlib"] = None
sys.argv[0] = "bulkedge"
from bulkedge.cli import main
main()
"""


def call(*arguments):
    """In this process; errors of ours come through as they are."""
    result = CliRunner().invoke(cli, ["simulate", *map(str, arguments)], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result


def command(*arguments, code=None):
    start = [sys.executable, "-c", code] if code else [sys.executable, "-m", "bulkedge"]
    return subprocess.run(
        [*start, "simulate", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
        timeout=120,
    )


@pytest.mark.parametrize("arguments", [(), ("--list",)])
def test_the_list_has_every_experiment_on_a_line(arguments):
    lines = call(*arguments).stdout.splitlines()
    assert len(lines) == len(EXPERIMENTS)
    for line, (name, kind) in some(zip(lines, EXPERIMENTS.items(), strict=True)):
        assert line.split() == [name, *kind.summary().split()]


def test_the_list_of_one_has_its_settings():
    lines = call("rank", "--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(Rank.model_fields)
    assert "norm          ‖ΔW‖_F/θ_c. [4.0]" in lines
    assert list(json.loads(call("rank", "--list", "--json").stdout)) == list(Rank.model_fields)


def test_table_and_figure_are_those_of_the_library(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "out"
    result = call("rank", "--output", out, *QUICK)
    table = run("rank", **SETTINGS)
    assert Table.from_json((out / "rank.json").read_text(encoding="utf-8")) == table
    assert (out / "rank.svg").read_text(encoding="utf-8") == to_svg(draw(table))
    assert result.stdout == ""
    assert f"figure to {out / 'rank.svg'}" in result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["rank.json", "rank.svg"]


def test_json_goes_to_stdout():
    result = call("rank", "--json", "-q", *QUICK)
    assert Table.from_json(result.stdout) == run("rank", **SETTINGS)
    assert result.stderr == ""


def test_a_file_of_settings_and_what_overrides_it(tmp_path):
    (tmp_path / "s.yaml").write_text("{size: 40, ranks: [1, 4], repeats: 5, norm: 1e1}")
    table = Table.from_json(
        call("rank", "--json", "--config", tmp_path / "s.yaml", "--set", "repeats=2").stdout
    )
    assert table == run("rank", **SETTINGS, norm=10.0)


def test_nothing_is_overwritten_unless_asked(tmp_path):
    (tmp_path / "rank.svg").write_text("mine")
    with pytest.raises(OutputError, match=r"rank\.svg: exists; give another folder, or --force"):
        call("rank", "--output", tmp_path, *QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["rank.svg"]
    call("rank", "--output", tmp_path, "--force", *QUICK)
    assert Table.from_json((tmp_path / "rank.json").read_text(encoding="utf-8"))


def test_outputs_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file: is a file; give a folder"):
        call("rank", "--output", tmp_path / "file", *QUICK)
    (tmp_path / "rank.json").mkdir()
    with pytest.raises(OutputError, match=r"rank\.json: is a folder; give another place"):
        call("rank", "--output", tmp_path, "--force", *QUICK)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(OutputError, match=r"out: .* is not writable"):
        call("rank", "--output", tmp_path / "out", *QUICK)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("sank",), InputError, r"expected one of laws, .*, heavy_tailed; got 'sank'"),
        (
            ("rank", "--set", "sise=3"),
            RecipeError,
            r"mean size\? .*the fields are .*size, norm",
        ),
        (("rank", "--set", "norm=-1"), RecipeError, r"norm: more than 0.*, got -1"),
        (("rank", "--set", "norm"), RecipeError, r"expected --set FIELD=VALUE, got 'norm'"),
        (("rank", "--set", "ranks=[1"), RecipeError, r"--set ranks: expected a value in YAML, got"),
        (("rank", "--config", "none.yaml"), RecipeError, r"none\.yaml: cannot be read"),
    ],
)
def test_what_is_wrong_is_said_at_once(arguments, error, message, tmp_path):
    with pytest.raises(error, match=message):
        call(*arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    result = bulkedge("simulate", "rank", "--output", tmp_path / "out", "--set", "size=huge")
    assert result.returncode == 2
    assert result.stderr.startswith("bulkedge: settings: size: Input should be a valid integer")
    assert result.stderr.count("\n") == 1
    nowhere = bulkedge("simulate", "rank")
    assert nowhere.returncode == 2
    assert "give a folder for table and figure (--output DIR), or --json" in nowhere.stderr


def test_without_matplotlib_there_is_a_table(tmp_path):
    result = command("rank", "--output", tmp_path, *QUICK, code=BLOCKED)
    assert result.returncode == 0, result.stderr
    assert "no figure: expected matplotlib" in result.stderr
    assert "pip install 'bulkedge[report]'" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rank.json"]
    assert Table.from_json((tmp_path / "rank.json").read_text(encoding="utf-8"))
