"""What a new user meets in the first minutes: help, settings, stdout, records in Python."""

import json
import os
import shlex
import subprocess
import sys
from glob import glob
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

import bulkedge
import practice
from bulkedge import CheckpointError, InputError, MissingExtraError, Record
from bulkedge.cli import cli
from bulkedge.cli._group import EXAMPLES, SECTIONS
from bulkedge.report.base_name import compare_names
from bulkedge.report.doubts import doubts
from cases import gaussian, orthonormal
from helpers import save, save_adapter, some, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base and a fine-tune with a new direction in one of two layers."""
    place = tmp_path_factory.mktemp("first")
    base = {"a.weight": gaussian(60, 50), "b.weight": gaussian(50, 40)}
    spike = 40 * orthonormal(60, 1, 1) @ orthonormal(50, 1, 2).mT
    save(place / "base.safetensors", base)
    save(place / "tuned.safetensors", base | {"a.weight": base["a.weight"] + spike,
                                              "b.weight": base["b.weight"] * 1.01})  # fmt: skip
    return place


@pytest.fixture(scope="module")
def record(folder):
    return bulkedge.audit(
        folder / "base.safetensors", folder / "tuned.safetensors", recipe={"top_k": 4}
    )


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """The command line in an empty folder, where `base` and `tuned` lie."""
    for name in ("base", "tuned"):
        (tmp_path / f"{name}.safetensors").symlink_to(folder / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    return lambda line: CliRunner().invoke(cli, shlex.split(line))


ROOT = Path(__file__).parents[1]
AUDIT = "audit base.safetensors tuned.safetensors"


# ---- help


def test_every_command_has_a_section_and_an_example():
    listed = {name for names in SECTIONS.values() for name in names} | {"help"}
    assert listed == set(cli.commands) == set(EXAMPLES)
    text = CliRunner().invoke(cli, ["help"]).output
    for title in some(SECTIONS):
        assert f"\n{title}:\n" in text
    for name, lines in some(EXAMPLES.items()):
        told = CliRunner().invoke(cli, ["help", name]).output
        assert " ".join(told.split()).endswith(" ".join("  ".join(lines).split()))


@pytest.fixture
def model(tmp_path):
    """A small model with its tokenizer, an adapter, texts and an evaluation."""
    pytest.importorskip("transformers")
    return practice.fill(tmp_path)


def test_the_examples_of_the_help_run_one_after_the_other(model, monkeypatch):
    monkeypatch.chdir(model)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for lines in some(EXAMPLES.values()):
        for line in some(lines):
            program, *words = shlex.split(line)
            arguments = [name for word in words for name in (sorted(glob(word)) or [word])]
            ended = CliRunner().invoke(cli, arguments)
            assert program == "bulkedge"
            assert ended.exit_code in (0, 1), (line, ended.output)
            assert isinstance(ended.exception, SystemExit | None), (line, ended.exception)
    written = [
        "report.html",
        "out/record.json",
        "summary.md",
        "repaired/repair.json",
        "compare.html",
    ]
    written += [
        "several/comparison.html",
        "base.moments",
        "points/frontier.html",
        "lora.json",
        "whole/record.json",
    ]
    assert [name for name in written if not (model / name).stat().st_size] == []


def test_no_help_warns(tmp_path):
    """Compiled and imported anew, since a warning of either is given once."""
    code = """
import sys
from bulkedge.cli import cli
for name in [None, *sorted(cli.commands)]:
    cli([*filter(None, [name]), "--help"], standalone_mode=False)
"""
    fresh = [sys.executable, "-W", "error", "-X", f"pycache_prefix={tmp_path}", "-c", code]
    ended = subprocess.run(fresh, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count("Usage: ") == 1 + len(cli.commands)


def test_help_of_an_unknown_command(run):
    assert "no command 'fly'; `bulkedge help` lists the commands" in run("help fly").output


def test_the_version_tells_what_a_report_of_a_bug_needs(run):
    told = run("-V").output
    assert told.startswith(f"bulkedge {bulkedge.__version__} (record schema 2, torch ")
    assert told == run("--version").output


def test_the_shell_completes(monkeypatch, capsys):
    monkeypatch.setenv("_BULKEDGE_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "bulkedge audit --crit")
    monkeypatch.setenv("COMP_CWORD", "2")
    with pytest.raises(SystemExit):
        cli.main(args=[], prog_name="bulkedge")
    assert "--critical-scale" in capsys.readouterr().out


# ---- stdout


def test_a_dash_is_stdout(run, tmp_path):
    data = json.loads(run(f"{AUDIT} -o - -q").stdout)
    assert data["schema_version"] == "2"
    assert run(f"{AUDIT} --csv - -q").stdout.startswith('"matrix","tuned_name"')
    assert run(f"{AUDIT} -o out -q").exit_code == 1
    assert run("report out -o - --format markdown").stdout.startswith("### bulkedge audit")
    sarif = json.loads(run("report out -o - --format sarif").stdout)
    (result,) = sarif["runs"][0]["results"]
    assert (sarif["version"], result["ruleId"], result["level"]) == ("2.1.0", "intruder", "error")
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == (
        "tuned.safetensors"
    )
    rules = {rule["id"] for rule in sarif["runs"][0]["tool"]["driver"]["rules"]}
    assert rules == {
        *("rotated", "intruder", "undecided", "not-judged", "doubt", "settings"),
        *("not-repaired", "max-drift", "repair"),
    }
    assert not (tmp_path / "-").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("repair base.safetensors tuned.safetensors -o -", "stdout cannot hold the folder of a"),
        (f"{AUDIT} -o - --csv -", "only one output can go to stdout (-)"),
        ("report out -o -", "expected a name that ends in .html"),
    ],
)
def test_what_cannot_go_to_stdout(line, message, run):
    told = run(line)
    assert (told.exit_code, told.stdout) == (2, "")
    assert message in told.stderr


def test_sarif_has_what_was_not_judged(record):
    broken = record.matrices[1].model_copy(update={"status": "failed", "note": "oh no"})
    shown = bulkedge.report.render(record.model_copy(update={"matrices": [broken]}), "sarif")
    result, _ = json.loads(shown)["runs"][0]["results"]  # and the settings
    assert (result["ruleId"], result["message"]["text"]) == (
        "not-judged", f"{broken.name}: oh no"
    )  # fmt: skip


# ---- saved records


def test_show_prints_a_saved_record(run):
    first = run(f"{AUDIT} -o out")
    again = run("show out")
    assert (again.exit_code, again.stdout) == (0, first.stdout)
    assert json.loads(run("show out --json").stdout)["schema_version"] == "2"
    assert len(run("show out -q").stdout.splitlines()) == 1
    run("repair base.safetensors tuned.safetensors -o repaired")
    assert "clip: 1 direction new before, 0 after" in run("show repaired").stdout


def test_what_was_advised_is_in_every_later_command(run):
    lines = run(AUDIT).stdout.splitlines()
    told = [line for line in lines if line.startswith(("next: ", "weaker: measure"))]
    commands = [line.strip() for line in lines if line.startswith("  bulkedge ")]
    assert len(told) == len(commands)
    assert "leave out a, whose base looks untrained" in told[1]
    assert all("--exclude a" in c for c in some(commands) if c.split()[1] in ("audit", "repair"))


def test_leaving_everything_out_is_not_blamed_on_the_base(run, tmp_path):
    tensors = {
        f"base_model.model.a.lora_{x}.weight": weights(*shape)
        for x, shape in {"A": (2, 50), "B": (60, 2)}.items()
    }
    save_adapter(tmp_path / "adapter", tensors)
    told = run("audit base.safetensors adapter --exclude *")
    assert isinstance(told.exception, bulkedge.NothingAuditedError)
    assert "excluded by the recipe" in str(told.exception)
    assert str(told.exception).endswith("; change --include or --exclude")


def test_a_dry_run_is_told_in_words(run):
    told = run(f"{AUDIT} --dry-run").stdout
    assert "matrices to judge              2\n" in told
    assert "memory of each job, about" in told
    assert "gigabytes" not in told


def test_names_break_after_dots(record):
    long = "model.language_model.layers.11.mlp.experts.down_projection.weight"
    matrix = record.matrices[0].model_copy(update={"name": long})
    stream = StringIO()
    console = Console(file=stream, width=60, force_terminal=True, color_system=None)
    bulkedge.report.print_record(record.model_copy(update={"matrices": [matrix]}), console)
    table = stream.getvalue().partition("\n\n")[0].splitlines()[1:]
    parts = [line.split()[0] for line in table]
    assert "".join(parts) == long.removesuffix(".weight")
    assert all(part.endswith(".") for part in some(parts[:-1]))


# ---- settings of a project


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bulkedge.yaml", "top_k: 3\nexclude: ['b.*']\n"),
        ("pyproject.toml", "[tool.bulkedge]\ntop_k = 3\nexclude = ['b.*']\n"),
    ],
)
def test_settings_are_found_as_a_linters_are(name, text, run, tmp_path, monkeypatch):
    (tmp_path / name).write_text(text)
    told = run(f"{AUDIT} --json")
    recipe = json.loads(told.stdout)["recipe"]
    assert (recipe["top_k"], recipe["exclude"]) == (3, ["b.*"])
    assert f"settings of {tmp_path / name}: top_k, exclude" in told.stderr
    assert json.loads(run(f"{AUDIT} --json -k 2").stdout)["recipe"]["top_k"] == 2
    (tmp_path / "own.yaml").write_text("epsilon: 0.4\n")
    given = json.loads(run(f"{AUDIT} --json --recipe own.yaml").stdout)["recipe"]
    assert (given["top_k"], given["epsilon"]) == (10, 0.4)
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    above = run("audit ../base.safetensors ../tuned.safetensors --json -q")
    assert json.loads(above.stdout)["recipe"]["top_k"] == 3
    first = above.stderr.splitlines()[0]
    assert first == f"settings of {tmp_path / name}: top_k, exclude"  # quiet or not


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tool.bulkedge\n", r"pyproject\.toml: not valid TOML"),
        ("[tool]\nbulkedge = 3\n", r"expected a table \[tool\.bulkedge\], got int"),
        ("[tool.bulkedge]\ntop_n = 3\n", r"pyproject\.toml: unknown field 'top_n'"),
        ("#" * 2**20 + "\n", r"has more than 1048576 bytes; is it a project file"),
    ],
)
def test_settings_that_cannot_be_used(text, message, run, tmp_path):
    (tmp_path / "pyproject.toml").write_text(text)
    told = run(AUDIT)
    with pytest.raises(bulkedge.RecipeError, match=message):
        raise told.exception


@pytest.mark.parametrize(
    "settings", [{"top_k": True}, {"epsilon": True}, {"seed": False}, {"split": {"a": [True]}}]
)
def test_a_truth_value_is_no_number(settings):
    name = next(iter(settings))
    with pytest.raises(bulkedge.RecipeError, match=rf"recipe: {name}.*: expected a number, got "):
        bulkedge.records.make_recipe(settings)
    with pytest.raises(bulkedge.RecipeError, match=r"repeats: expected a number, got True"):
        bulkedge.simulate.configure("transition", {"repeats": True})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top_k: 2\nside: left\ntop_k: 3\n", r"'top_k' is given twice, in lines 1 and 3; leave"),
        ("split:\n  a: [1]\n  a: [2]\n", r"'a' is given twice, in lines 2 and 3"),
        ('{"top_k": 1, "top_k": 2}', r"'top_k' is given twice, in line 1; leave one out"),
    ],
)
def test_a_key_given_twice_is_an_error(text, message, run, tmp_path):
    (tmp_path / "twice.yaml").write_text(text)
    for command in (f"{AUDIT} --recipe twice.yaml", "simulate transition --config twice.yaml"):
        with pytest.raises(bulkedge.RecipeError, match=message):
            raise run(command).exception


def test_merged_keys_may_be_overridden(tmp_path):
    (tmp_path / "m.yaml").write_text("a: {b: &b {<<: &c {x: 1}, x: 2}}\nd: {<<: *b, y: 3}\n")
    found = bulkedge.records.read_recipe(tmp_path / "m.yaml")
    assert found["a"]["b"] == {"x": 2}


def test_settings_in_two_places_empty_or_overridden(run, tmp_path):
    project, own = tmp_path / "pyproject.toml", tmp_path / "bulkedge.yaml"
    project.write_text("[tool.bulkedge]\ntop_k = 3\n")
    for empty in ("", "# none yet\n", "{}\n"):
        own.write_text(empty)
        assert run(f"{AUDIT} --dry-run").stderr == f"settings of {project}: top_k\n"
    own.write_text("top_k: 2\nepsilon: 0.4\n")
    told = f"settings of {own}: epsilon (options override top_k); [tool.bulkedge] of {project} is"
    assert run(f"{AUDIT} --dry-run -k 4").stderr == f"{told} not used\n"
    assert ": none used (options" in run(f"{AUDIT} --dry-run -k 4 --epsilon 0.3").stderr
    project.write_text("[tool.bulkedge\n")  # broken, and not needed
    assert run(f"{AUDIT} --dry-run").stderr == f"settings of {own}: top_k, epsilon\n"
    own.write_text("")
    project.unlink()
    assert run(f"{AUDIT} --dry-run").stderr == ""


def test_settings_that_cannot_be_read(run, tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()

    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", fail)
    with pytest.raises(bulkedge.RecipeError, match=r"cannot be read .*; fix or move it"):
        raise run(AUDIT).exception


# ---- the base that an adapter names


@pytest.mark.parametrize(
    ("named", "given", "same"),
    [
        ("org/All-MiniLM-L6", "build/all_minilm_l6/model", True),
        ("org/llama-7b", "/cache/models--org--llama-7b/snapshots/abc", True),
        ("org/llama-7b", "mistral", False),
        (None, "mistral", False),
    ],
)
def test_another_base_than_the_adapter_names_is_doubted(named, given, same, record):
    base = record.inputs.base.model_copy(update={"path": given})
    tuned = record.inputs.tuned.model_copy(update={"trained_on": named})
    inputs = record.inputs.model_copy(update={"base": base, "tuned": tuned})
    other = record.model_copy(update={"inputs": inputs})
    assert (compare_names(other) == "same") is same
    doubt = f"The adapter names {named} as its base, you gave {given}: are they the same model?"
    assert any(text.startswith(doubt) for text in doubts(other).values()) is (
        named is not None and not same
    )


def test_a_quiet_audit_names_what_it_could_not_judge(record):
    broken = record.matrices[1].model_copy(update={"status": "not_finite", "note": "holds NaN"})
    stream = StringIO()
    given = record.model_copy(update={"matrices": [broken]})
    bulkedge.report.print_record(given, Console(file=stream, width=300), brief=True)
    assert "not audited: b.weight: holds NaN; save the model again" in stream.getvalue()


# ---- records in Python


def test_a_record_prints_in_three_lines(record):
    lines = repr(record).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("1 new of 8 leading directions (0 rotated, 1 intruder), in 1 of 2")
    assert str(record) == repr(record)
    assert len(repr(record.matrices)) < 500
    assert "a.weight" in repr(record.matrices[0])
    undecided = dict.fromkeys(bulkedge.intruder.Verdict, 0) | {"undecided": 3}
    summary = record.summary.model_copy(update={"verdicts": undecided, "lost": 2})
    assert "; 3 undecided; 2 lost" in repr(record.model_copy(update={"summary": summary}))


def test_a_notebook_shows_the_worst_and_no_markup_of_names(record):
    matrices = [
        record.matrices[0].model_copy(update={"name": f"<script>{i}</script>"}) for i in range(12)
    ]
    shown = record.model_copy(update={"matrices": matrices})._repr_html_()
    assert "<script" not in shown
    assert shown.count("<tr>") == 11
    assert "and 2 more matrices" in shown


def test_other_records_print_in_a_line(folder):
    budget = bulkedge.budget(folder / "base.safetensors", rank=2, alpha=2.0)
    assert repr(budget).startswith("<")
    assert len(repr(budget)) < 200


def test_a_record_is_read_from_text_or_file(record, tmp_path):
    (tmp_path / "r.json").write_text(record.to_json())
    assert Record.from_json(record.to_json()) == record == Record.from_json(tmp_path / "r.json")
    with pytest.raises(CheckpointError, match=r"the text given: not a bulkedge record of schema"):
        Record.from_json('{"a": 1}')
    (tmp_path / "cut.json").write_text(record.to_json()[:-20])  # no field is to blame
    with pytest.raises(CheckpointError, match=r"of schema 2 \(Invalid JSON"):
        Record.from_json(tmp_path / "cut.json")


def test_a_record_is_a_data_frame(record):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(record.matrices)
    assert set(frame.columns) == set(bulkedge.records.Matrix.model_fields)
    assert list(frame["name"]) == ["a.weight", "b.weight"]
    print(frame, record.to_pandas())  # pandas looks into every cell that is a mapping
    flat = record.to_pandas().set_index("name")
    assert flat.loc["a.weight", "intruder"] == 1
    assert flat.loc["a.weight", "worst_score"] == min(
        d.score for d in record.matrices[0].directions
    )
    directions = record.to_pandas("directions")
    assert len(directions) == 8
    assert set(directions["verdict"]) <= {"aligned", "rotated", "intruder", "undecided"}


def test_what_is_no_record_is_not_compared(record):
    with pytest.raises(InputError, match="expected another record of an audit, got int"):
        record.compare(3)


def test_rows_are_mappings(record):
    row = record.matrices[0]
    assert dict(row)["name"] == row["name"] == "a.weight"
    with pytest.raises(KeyError):
        row["nothing"]


def test_a_misspelt_kind_of_rows_is_refused(record):
    with pytest.raises(InputError, match=r"expected rows 'matrices' or 'directions', got 'direc"):
        record.to_pandas("direction")


def test_a_verdict_that_became_another_is_a_change(record):
    row = record.matrices[0]
    first = row.directions[0]
    either = {bulkedge.intruder.Verdict.ROTATED, bulkedge.intruder.Verdict.INTRUDER}
    (other,) = either - {first.verdict}
    turned = row.model_copy(
        update={"directions": [first.model_copy(update={"verdict": other}), *row.directions[1:]]}
    )
    after = record.model_copy(update={"matrices": [turned, *record.matrices[1:]]})
    found = record.compare(after)
    assert [change.name for change in found.changed] == [row.name]
    assert f"{other.value} 0 → 1" in repr(found)


def test_without_pandas_it_says_what_to_install(record, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"to_pandas\(\) needs pandas: .*pandas\]"):
        record.to_pandas()


def test_two_records_are_compared(record):
    better = record.matrices[0].model_copy(update={"new_directions": 0})
    after = record.model_copy(update={"matrices": [better]})
    found = record.compare(after)
    assert [row.name for row in found.changed] == ["a.weight"]
    assert found.only_first == ("b.weight",)
    assert "1 new direction first, 0 second, in 1 matrix that both have" in repr(found)
    assert "a: 1 → 0" in repr(found)
    assert "1 only in the first, 0 only in the second" in repr(found)
    other = record.model_copy(update={"recipe": record.recipe.model_copy(update={"top_k": 2})})
    with pytest.raises(InputError, match=r"expected two audits of the same top_k, got 4 and 2"):
        record.compare(other)


def test_the_time_that_is_left_has_a_label(monkeypatch):
    from bulkedge.cli import _progress

    stream = StringIO()
    monkeypatch.setattr(
        "rich.console.Console",
        lambda **_: Console(file=stream, force_terminal=True, width=100, color_system=None),
    )
    with _progress.show_progress(False, 2) as progress:
        progress("a", 1)
    assert " left" in stream.getvalue()


def test_importing_torch_is_no_part_of_help():
    code = "import sys; from bulkedge.cli import cli; cli(['help'], standalone_mode=False); "
    check = "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code + check], check=True, capture_output=True)


def test_the_notebook_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    notebook = json.loads((ROOT / "examples/notebooks/first_look.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in some(cells))
    names = {}
    for cell in cells:
        exec("".join(cell["source"]), names)  # noqa: S102 — ours
    assert names["record"].summary.new_directions > 0
    assert "rank 8" in names["page"]
