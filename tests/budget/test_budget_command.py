"""``bulkedge budget``."""

import csv
import json
import shlex

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import bulkedge
import commands
from bulkedge import OutputError
from bulkedge.cli import cli
from bulkedge.records.budget import BudgetRecord
from bulkedge.report.advice import steps
from helpers import save, save_adapter, weights


@pytest.fixture
def base(tmp_path):
    tensors = {"up.weight": weights(60, 40), "down.weight": 3 * weights(40, 60, seed=1)}
    return save(tmp_path / "base" / "model.safetensors", tensors)


def run(*arguments):
    return CliRunner().invoke(cli, ["budget", *map(str, arguments)])


def test_table_record_csv_and_settings(base, tmp_path):
    out, sheet, peft = tmp_path / "out", tmp_path / "b.csv", tmp_path / "peft.json"
    result = run(base, "-r", 4, "--alpha", 8, "-o", out, "--csv", sheet, "--peft", peft)
    assert result.exit_code == 0, result.output
    for word in ("θ_c", "θ_k", "noise", "max ‖BA‖", "2 of 2 matrices have a limit"):
        assert word in result.output
    record = BudgetRecord.from_json(out / "budget.json")
    expected = bulkedge.budget(base, rank=4, alpha=8)
    assert record.matrices == expected.matrices
    assert json.loads(peft.read_text()) == bulkedge.lora_config(expected)
    rows = list(csv.DictReader(sheet.read_text().splitlines()))
    assert [float(row["top_k_threshold"]) for row in rows] == [
        row.top_k_threshold for row in record.matrices
    ]
    assert run(base, "-o", out).exit_code != 0  # it exists
    again = run(base, "-o", out, "--resume", "--json", "-q")
    assert json.loads(again.output)["run"]["resumed"] == 2


def test_a_matrix_without_a_limit_is_said_loudly(base, tmp_path):
    bad = save(
        tmp_path / "bad.safetensors",
        {"up.weight": weights(60, 40) / 0, "b.weight": weights(40, 40)},
    )
    result = run(bad, "--quiet")
    assert result.exit_code == 2
    assert "NO LIMIT: up.weight" in result.output
    assert "1 of 2 matrices" in result.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--peft", "p.json"], "--peft needs --rank and --alpha"),
        (["--rank", 4], "--rank needs --alpha, and the reverse"),
        (["--alpha", 4], "--rank needs --alpha, and the reverse"),
        (["--level", 0.5], "--level needs --rank and --alpha, or --like"),
        (
            ["-r", 4, "--alpha", 8, "--level", 0.5, "--peft", "p.json"],
            "--level changes no α that --rank and --alpha give",
        ),
        (["-r", 4, "--alpha", 8, "--peft", "f", "--csv", "./f"], "would be written twice"),
        (["-o", "out", "--csv", "out/budget.json"], "would be written twice"),
        (["--resume"], "--resume needs the folder of the journal"),
        (["--resume", "-o", "x", "--force"], "--resume continues what --force would replace"),
    ],
)
def test_what_does_not_go_together(base, options, words):
    result = run(base, *options)
    assert result.exit_code != 0
    assert words in f"{result.output}{result.exception}"


def test_nothing_is_written_into_the_base(base):
    result = run(base.parent, "-o", base.parent / "out")
    assert result.exit_code != 0
    assert "lies inside the input" in str(result.exception)


def test_a_glob_that_is_the_end_of_a_name(tmp_path):
    base = save(tmp_path / "base.safetensors", {"encoder.0.query.weight": weights(60, 40)})
    found = run(base, "--target", "query")
    assert "a glob matches the whole name: try '*.query'" in str(found.exception)
    assert run(base, "--target", "*.query", "-q").exit_code == 0


def test_it_says_what_to_do_next(base, tmp_path):
    told = run(base).output
    assert "next: write the settings for LoraConfig\n" in told
    assert f"  bulkedge budget {base} --rank 8 --alpha 16 --peft lora.json" in told
    assert "next:" not in run(base, "-q").output
    peft = run(base, "-r", 4, "--alpha", 8, "--peft", tmp_path / "p.json")
    assert "next: train with" in peft.output
    assert f"\n  bulkedge audit {base} ADAPTER\n" in peft.output


def test_what_to_do_with_an_adapter_below_its_limits(base, tmp_path):
    name = "base_model.model.up.lora_"
    tensors = {f"{name}B.weight": 1e-3 * weights(60, 2), f"{name}A.weight": weights(2, 40)}
    like = save_adapter(tmp_path / "weak", tensors)
    told = run(base, "--like", like).output
    assert "next: no update is above its limit" in told
    assert f"\n  bulkedge audit {base} {like}\n" in told


def test_an_untrained_layer_is_left_out_of_the_settings_and_named(tmp_path):
    """The rule of an audit's advice: noise, from which nothing stands out, beside other bases."""
    W = weights(60, 40)
    W[:, 0] += 30 * torch.nn.functional.normalize(weights(60, seed=9), dim=0)
    pooler = weights(50, 50, seed=3)
    base = save(tmp_path / "base.safetensors", {"up.weight": W, "pooler.weight": pooler})
    tensors = {"up.weight": 1.01 * W, "pooler.weight": weights(50, 50, seed=4)}
    record = bulkedge.audit(base, save(tmp_path / "tuned.safetensors", tensors))
    assert any("leave out pooler" in (step.brief or "") for step in steps(record))

    def targets(*options):
        file = tmp_path / "lora.json"
        told = run(base, "-r", 4, "--alpha", 8, "--peft", file, "--force", *options)
        settings = json.loads(file.read_text())
        names = sorted(settings["target_modules"])
        assert ("pooler.weight: NOT in" in told.output) == ("pooler" not in names)
        return names, settings["alpha_pattern"]

    names, alphas = targets()
    assert (names, alphas) == (["up"], {"up": 8})  # alone, it has the mean α
    names, alphas = targets("--target", "*")
    assert names == ["pooler", "up"]
    assert sum(alphas.values()) == pytest.approx(16, rel=1e-4)


def test_a_base_that_is_all_noise_is_trained_as_a_whole(tmp_path):
    tensors = {"up.weight": weights(60, 40), "down.weight": weights(40, 60, seed=1)}
    record = bulkedge.budget(save(tmp_path / "base.safetensors", tensors), rank=4, alpha=8)
    assert record.untrained == []
    assert sorted(bulkedge.lora_config(record)["target_modules"]) == ["down", "up"]


@pytest.fixture
def other(tmp_path):
    """Another base with the same names and shapes, and an adapter of both."""
    tensors = {"up.weight": weights(60, 40, seed=7), "down.weight": weights(40, 60, seed=8)}
    factors = {"up.lora_A": (2, 40), "up.lora_B": (60, 2)}
    adapter = {
        f"base_model.model.{name}.weight": weights(*shape, seed=9)
        for name, shape in factors.items()
    }
    return {
        "base": save(tmp_path / "other" / "model.safetensors", tensors),
        "adapter": save_adapter(tmp_path / "adapter", adapter),
    }


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ("base", "budget of base "),
        ("like", "budget of like none"),
        (["-k", "3"], "budget of other settings (top_k=10, not 3)"),
        (["--target", "up.*"], "budget of other settings (target=none, not up.*)"),
        (["--exclude", "up.*"], "budget of other settings (exclude=none, not up.*)"),
        (["--seed", "1"], "budget of other settings (seed=0, not 1)"),
    ],
)
def test_resume_replaces_no_finished_record_of_other_limits(changed, told, base, other, tmp_path):
    out = tmp_path / "out"
    assert run(base, "-o", out).exit_code == 0
    before = (out / "budget.json").read_bytes()
    given = {"base": [other["base"]], "like": [base, "--like", other["adapter"]]}
    words = given[changed] if isinstance(changed, str) else [base, *changed]
    result = commands.run("budget", *words, "-o", out, "--resume")
    assert result.returncode == 2
    assert told in result.stderr
    assert (out / "budget.json").read_bytes() == before
    assert run(*words, "-o", out, "--force").exit_code == 0


def test_resume_with_another_rank_takes_the_same_limits(base, tmp_path):
    out = tmp_path / "out"
    assert run(base, "-o", out).exit_code == 0
    given = "--rank", 4, "--alpha", 8, "--resume", "--json", "-q"
    result = json.loads(run(base, "-o", out, *given).output)
    assert (result["run"]["resumed"], result["settings"]["rank"]) == (2, 4)


@pytest.mark.parametrize("option", ["--resume", "--force", None])
@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("first", ["audit", "budget"])
def test_an_audit_and_a_budget_share_no_folder(option, finished, first, base, other, tmp_path):
    out, word = tmp_path / "out", "record.json" if first == "audit" else "budget.json"
    calls = {"audit": ["audit", base, other["base"]], "budget": ["budget", base]}
    assert commands.run(*calls.pop(first), "-o", out).returncode in (0, 1)
    if not finished:
        (out / word).unlink()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    ((_, second),) = calls.items()
    result = commands.run(*second, "-o", out, *([option] if option else []))
    assert result.returncode == 2
    told = word if finished else "journal.jsonl"
    assert f"{out}: holds the {told} of " in result.stderr
    assert first in result.stderr.partition(" of ")[2]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_audit_and_a_budget_share_no_journal(base, other, tmp_path):
    journals = {name: tmp_path / f"{name}.jsonl" for name in ("audit", "budget")}
    bulkedge.budget(base, journal=journals["budget"])
    bulkedge.audit(base, other["base"], journal=journals["audit"])
    with pytest.raises(OutputError, match="is the journal of `bulkedge budget"):
        bulkedge.audit(base, other["base"], journal=journals["budget"], resume=True)
    with pytest.raises(OutputError, match="is the journal of `bulkedge audit"):
        bulkedge.budget(base, journal=journals["audit"], resume=True)


def next_command(told):
    """The command that a run says to give next, as words."""
    lines = told.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("next: "))
    return shlex.split(lines[at + 1])


def parsed(words):
    """The settings of a command line, as the command itself reads them."""
    assert words[0] == "bulkedge"
    command = cli.commands[words[1]]
    return command.make_context(words[1], list(words[2:])).params


GIVEN = ["-k", 3, "--target", "up*", "--exclude", "it's*", "--seed", 5]


@pytest.mark.parametrize("alpha", [1e-3, 1e3])
@pytest.mark.parametrize("way", ["like", "peft", "rank"])
def test_the_next_command_has_the_settings_of_this_one(way, alpha, base, other, tmp_path):
    adapter = save_adapter(
        tmp_path / "adapter's", load_file(other["adapter"] / "adapter_model.safetensors"),
        lora_alpha=alpha,
    )  # fmt: skip
    own = ["--like", adapter] if way == "like" else ["--rank", 4, "--alpha", alpha, "--rslora"]
    out = ["--peft", tmp_path / "p.json"] if way == "peft" else []
    save(base, {"up.weight": weights(60, 40), "it's.weight": weights(40, 60)})
    given = [x for x in GIVEN if way != "like" or x not in ("--exclude", "it's*")]
    words = next_command(commands.run("budget", base, *own, *out, *given).stderr)
    settings = parsed(words)
    assert (str(settings["base"]), settings["top_k"]) == (str(base), 3)
    if way == "rank":
        assert words[1] == "budget"
        assert (settings["rank"], settings["alpha"], settings["rslora"]) == (4, alpha, True)
        assert (settings["target"], settings["exclude"]) == (("up*",), ("it's*",))
        assert settings["seed"] == 5
    elif way == "like":
        assert words[1] == ("repair" if alpha > 1 else "audit")
        assert settings["include"] == ("up*",)
    else:
        assert words[1] == "audit"


def test_an_update_without_an_alpha_is_not_said_to_have_no_limit(base, other, tmp_path):
    factors = load_file(other["adapter"] / "adapter_model.safetensors")
    bad = {name: tensor * float("nan") for name, tensor in factors.items()}
    result = run(base, "--like", save_adapter(tmp_path / "bad", bad))
    assert result.exit_code == 2
    assert "NO α: up.weight: " in result.output
    assert "NO LIMIT" not in result.output
    assert "1 of 1 matrix has a limit" in result.output
    assert "; 1 update of these without an α" in result.output


@pytest.mark.parametrize("case", ["kohya", "zero", "negative"])
def test_settings_of_an_adapter_without_an_alpha_are_refused_first(
    case, base, other, tmp_path, monkeypatch
):
    factors = load_file(other["adapter"] / "adapter_model.safetensors")
    if case == "kohya":
        named = {
            "lora_unet_up.lora_down.weight": factors["base_model.model.up.lora_A.weight"],
            "lora_unet_up.lora_up.weight": factors["base_model.model.up.lora_B.weight"],
        }
        like = save(tmp_path / "k.safetensors", named)
        told = "has no adapter_config.json with the rank and α of the whole"
    else:
        alpha = {"zero": 0, "negative": -4}[case]
        like = save_adapter(tmp_path / "like", factors, lora_alpha=alpha)
        told = f"has lora_alpha = {alpha}, expected more than 0"
    monkeypatch.setattr("bulkedge.budgeting.run.measure_matrix", None)
    out, peft = tmp_path / "out", tmp_path / "p.json"
    result = commands.run("budget", base, "--like", like, "--peft", peft, "-o", out)
    assert result.returncode == 2
    assert f"{like}: {told}" in result.stderr
    assert not out.exists()
    assert not peft.exists()
