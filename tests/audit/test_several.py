"""Several fine-tunes of one base in one call: each record is that of a call of its own."""

import json
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

import bulkedge
from bulkedge import Recipe, Record
from bulkedge.auditing import known, run_plans
from bulkedge.cli import _audit, _several, cli
from bulkedge.cli._several import names_of
from bulkedge.comparison import make_plan
from bulkedge.report import FORMATS
from helpers import save, save_adapter, some, weights

SHAPES = {"h.0.q.weight": (70, 50), "h.1.q.weight": (160, 90), "h.2.q.weight": (90, 160)}
"""Decomposed by an SVD, and by the Gram matrix of either side."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base, two adapters of it, and a full fine-tune."""
    folder = tmp_path_factory.mktemp("several")
    base = {name: weights(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    paths = [save(folder / "base.safetensors", base)]
    for run, strength in (("a", 0.1), ("b", 4.0)):
        factors = {}
        for i, (name, (m, n)) in enumerate(SHAPES.items()):
            stem = name.removesuffix("weight")
            factors[f"{stem}lora_A.weight"] = weights(2, n, seed=i)
            factors[f"{stem}lora_B.weight"] = strength * weights(m, 2, seed=i + 5)
        paths.append(save_adapter(folder / run / "checkpoint-5", factors))
    tuned = {name: W + 0.01 * weights(*W.shape, seed=9) for name, W in base.items()}
    return [*paths, save(folder / "full.safetensors", tuned)]


def content(record):
    return record.model_dump(exclude={"run"})


@pytest.fixture(scope="module")
def alone(inputs):
    return [bulkedge.audit(inputs[0], tuned) for tuned in inputs[1:]]


@pytest.mark.parametrize("method", ["certified", pytest.param("dense", marks=pytest.mark.slow)])
def test_each_record_is_that_of_an_audit_of_its_own(method, inputs):
    recipe = Recipe(method=method, top_k=2, side="both")
    plans = [make_plan(inputs[0], tuned, recipe) for tuned in inputs[1:]]
    alone = [bulkedge.audit(inputs[0], tuned, recipe=recipe) for tuned in inputs[1:]]
    found = run_plans(plans, recipe, jobs=2 if method == "dense" else 1)
    assert [content(record) for record in found] == [content(record) for record in alone]


def test_the_base_is_decomposed_once_and_by_the_cache_not_again(
    inputs, alone, tmp_path, monkeypatch
):
    computed = []
    stored = known.KnownBases._stored

    def watched(self, what, base, device, compute):
        return stored(self, what, base, device, lambda: computed.append(what) or compute())

    monkeypatch.setattr(known.KnownBases, "_stored", watched)
    plans = [make_plan(inputs[0], tuned, Recipe()) for tuned in inputs[1:]]
    for svds, grams in ((1, 2), (0, 0)):
        found = run_plans(plans, Recipe(), cache=tmp_path / "c")
        assert [content(record) for record in found] == [content(record) for record in alone]
        assert computed.count("base") == 3  # read once, whatever is kept
        assert (computed.count("svd"), computed.count("eigen")) == (svds, grams)
        computed.clear()
    for file in (tmp_path / "c").iterdir():  # damaged, truncated, of something else
        file.write_bytes(file.read_bytes()[:-9])
    again = run_plans(plans, Recipe(), cache=tmp_path / "c")
    assert [content(record) for record in again] == [content(record) for record in alone]
    assert (computed.count("svd"), computed.count("eigen")) == (1, 2)


def test_the_cache_goes_by_the_content_of_the_base(inputs, tmp_path):
    bulkedge_audit = [make_plan(inputs[0], inputs[1], Recipe())]
    run_plans(bulkedge_audit, Recipe(), cache=tmp_path / "c")
    names = {file.name for file in (tmp_path / "c").iterdir()}
    base = {name: weights(*shape, seed=50) for name, shape in SHAPES.items()}
    other = save(tmp_path / "other" / inputs[0].name, base)
    (found,) = run_plans([make_plan(other, inputs[1], Recipe())], Recipe(), cache=tmp_path / "c")
    assert content(found) == content(bulkedge.audit(other, inputs[1]))
    assert len({file.name for file in (tmp_path / "c").iterdir()}) == 2 * len(names)


def run(*arguments):
    return CliRunner().invoke(cli, ["audit", *map(str, arguments)])


def test_the_command_writes_a_record_each_and_one_table_and_page(inputs, alone, tmp_path):
    out = tmp_path / "out"
    done = run(*inputs, "--output", out, "--cache", tmp_path / "c")
    assert done.exit_code == 1, done.output
    names = ["a_checkpoint-5", "b_checkpoint-5", "full"]
    assert sorted(p.name for p in out.iterdir()) == [
        *names[:2], "comparison.csv", "comparison.html", "full"
    ]  # fmt: skip
    for name, record in zip(names, alone, strict=True):
        read = Record.model_validate_json((out / name / "record.json").read_text())
        assert content(read) == content(record)
        assert (out / name / "journal.jsonl").exists()
    rows = (out / "comparison.csv").read_text().splitlines()
    assert rows[0].startswith('"fine-tune","audited","directions","new"')
    new = [record.summary.new_directions for record in alone]
    assert [row.split(",")[3] for row in rows[1:]] == list(map(str, new))
    line = f"{sum(map(bool, new))} of 3 fine-tunes have new leading directions"
    assert f"{line}, most of them {names[new.index(max(new))]}: {max(new)}" in done.output
    page = (out / "comparison.html").read_text()
    assert all(name in page for name in names)
    assert "exists; give another folder" in str(run(*inputs, "--output", out).exception)
    again = run(*inputs, "--output", out, "--resume", "--json")
    assert json.loads(again.stdout)["b_checkpoint-5"]["new_directions"] == new[1]
    told = json.loads((out / "full" / "record.json").read_text())
    assert told["run"]["resumed"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "several TUNED need a folder for their records"),
        (["--output", "o", "--shard", "1/2"], "--shard is for one fine-tune, but several"),
        (["--output", "-"], "--output -: several records need a folder"),
        (["--output", "o", "--csv", "x.csv"], "comparison.csv is written into DIR"),
        (["--output", "o", "--report", "x.csv"], "comparison.csv is written into DIR"),
        (["--output", "o", "--peft", "x.json"], "audit that adapter alone for its ranks"),
        (["--output", "o", "--engine", "ray"], "--engine is for one fine-tune"),
        (["--output", "o", "--ray-address", "h:1"], "--ray-address is for one fine-tune"),
        (["--output", "o", "--insecure-ray"], "audit each alone on the cluster"),
    ],
)
def test_what_several_cannot_have(options, message, inputs):
    done = run(*inputs, *options)
    assert (done.exit_code, message in done.output) == (2, True), done.output


def test_every_option_has_an_effect_or_is_refused(inputs, tmp_path, monkeypatch):
    """What no code looks at would be ignored in silence."""
    read = set()

    class Watched(dict):
        def __getitem__(self, name):
            read.add(name)
            return super().__getitem__(name)

        def get(self, name, default=None):
            read.add(name)
            return super().get(name, default)

    given = {str(o.name) for o in cli.commands["audit"].params if isinstance(o, click.Option)}
    assert not set(_several.FOR_ONE) & _several.HANDLED
    assert given == set(_several.FOR_ONE) | _several.HANDLED

    def watched(function):
        return lambda *args: function(*args[:-1], Watched(args[-1]))

    for name in ("audit_several", "fetch_if_asked"):
        monkeypatch.setattr(_audit, name, watched(getattr(_audit, name)))
    assert run(*inputs, "--output", tmp_path / "o").exit_code == 1
    assert _several.HANDLED - set(Recipe.model_fields) - {"recipe"} <= read


@pytest.mark.parametrize("options", [["--ray-address", "h:1"], ["--insecure-ray"]])
def test_a_cluster_is_named_for_the_engine_that_uses_it(options, inputs):
    assert "need --engine ray" in run(*inputs[:2], *options).output


def test_all_that_are_bad_are_named(inputs, tmp_path):
    (tmp_path / "empty").mkdir()
    done = run(*inputs, tmp_path / "gone", tmp_path / "empty", "--dry-run")
    assert isinstance(done.exception, bulkedge.InputError)
    told = str(done.exception)
    assert told.startswith("2 of 5 fine-tunes cannot be audited: ")
    assert str(tmp_path / "gone") in told
    assert str(tmp_path / "empty") in told
    alone = run(*inputs, tmp_path / "gone", "--dry-run")
    assert str(alone.exception).startswith(str(tmp_path / "gone"))
    nowhere = run(tmp_path / "no", *inputs[1:], "--dry-run")
    assert str(nowhere.exception).count(str(tmp_path / "no")) == 1


def test_the_folder_of_several_names_its_subfolders(alone, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(alone[0].to_json())
    done = CliRunner().invoke(cli, ["show", str(tmp_path)])
    message = f"in a, b; give one of these folders, such as {tmp_path / 'a'}"
    assert message in str(done.exception)


def test_a_dry_run_and_a_fine_tune_given_twice(inputs):
    done = run(*inputs, "--dry-run", "--json")
    assert json.loads(done.output) == {"a_checkpoint-5": 3, "b_checkpoint-5": 3, "full": 3}
    twice = run(inputs[0], inputs[1], inputs[1], "--dry-run")
    assert "is given twice; leave one out" in twice.output


def test_names_tell_paths_apart():
    paths = [Path("x/run/a"), Path("y/run/a"), Path("b.safetensors"), Path("run_a"), Path("@b")]
    found = list(names_of(paths))
    assert len(set(found)) == len(found)
    assert found[2] == "b"
    assert not any("/" in name for name in found)


def test_names_stay_inside_the_output_folder(tmp_path, monkeypatch):
    (tmp_path / "a/ft/sub").mkdir(parents=True)
    (tmp_path / "comparison.csv").mkdir()
    monkeypatch.chdir(tmp_path / "a/ft/sub")
    found = list(names_of([Path(".."), tmp_path / "comparison.csv", Path("/")]))
    assert not {"", ".", "..", "comparison.csv", "comparison.html"} & set(found)
    assert found[0] == "ft"
    with pytest.raises(click.UsageError, match="is given twice"):
        names_of([tmp_path / "a/ft", tmp_path / "a/ft/sub/.."])


def test_a_cache_that_was_changed_is_computed_again(tmp_path):
    from safetensors.torch import load_file, save_file

    from bulkedge.auditing.known import _read, _write

    file = tmp_path / "x.safetensors"
    values = {"S": torch.arange(5).double()}
    _write(file, values)
    assert torch.equal(_read(file, {"S": (5,)})[0], values["S"])
    save_file({"S": load_file(file)["S"] + 1}, file)
    assert _read(file, {"S": (5,)}) is None


def test_a_cache_that_cannot_be_written(inputs, tmp_path):
    (tmp_path / "c").write_text("a file")
    done = run(*inputs[:2], "--cache", tmp_path / "c")
    assert isinstance(done.exception, bulkedge.OutputError)
    assert "give another folder" in str(done.exception)


def test_journals_are_one_a_plan(inputs, tmp_path):
    plans = [make_plan(inputs[0], tuned, Recipe()) for tuned in inputs[1:]]
    with pytest.raises(bulkedge.InputError, match="expected 3 journals, one per plan, got 1"):
        run_plans(plans, Recipe(), journals=[tmp_path / "j"])
    with pytest.raises(bulkedge.InputError, match="expected 3 journals, one per plan, got 0"):
        run_plans(plans, Recipe(), resume=True)


def test_the_page_says_which_reports_several_have(inputs, tmp_path):
    page = (Path(__file__).parents[2] / "docs/audit.md").read_text()
    told = page.partition("`--report` writes all of them")[2].partition("refused;")[0]
    written, refused = told.split("`--csv`")
    for kind, found in some(FORMATS.items()):
        file = tmp_path / f"of_all{found.endings[0]}"
        done = run(*inputs, "--output", tmp_path / kind, "--report", file, "--include", "h.0.*")
        assert done.exit_code == (1 if file.exists() else 2), done.output
        assert f"`{found.endings[0]}`" in (written if file.exists() else refused)
