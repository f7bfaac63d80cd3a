"""A gate loses no work, leaves nothing that looks done, and keeps what another has written."""

import errno
import os
import tempfile

import pytest
import torch
from safetensors.torch import load_file

import bulkedge.auditing
from bulkedge import Recipe
from commands import run
from helpers import save, save_adapter, some, weights

FAILURE = 2
FOUND = ["--fail-on", "never"]


@pytest.fixture
def base(tmp_path):
    return save(tmp_path / "base.safetensors", {"up.weight": weights(24, 16)})


def tuned_of(base, place, seed=1):
    layers = {n: W + 1e-3 * weights(*W.shape, seed=seed) for n, W in load_file(base).items()}
    return save(place, layers)


# ---- what is not repaired


def test_a_fine_tune_that_was_not_judged_leaves_no_copy(base, tmp_path):
    bad = load_file(base)
    bad["up.weight"][0, 0] = float("nan")
    tuned = save(tmp_path / "tuned.safetensors", bad)
    result = run("repair", base, tuned, "-o", tmp_path / "out", "-q")
    assert result.returncode == FAILURE
    assert "nothing can be repaired; not everything could be judged" in result.stdout
    assert "not audited: up.weight: tuned holds 1 NaN and 0 Inf" in result.stdout
    assert f"nothing was repaired: {tmp_path / 'out'} is not written" in result.stderr
    assert not list(tmp_path.glob("*out*"))


def test_a_fine_tune_without_anything_to_repair_is_copied(base, tmp_path):
    tuned = tuned_of(base, tmp_path / "tuned.safetensors")
    result = run("repair", base, tuned, "-o", tmp_path / "out")
    assert result.returncode == 0
    copy = tmp_path / "out"
    assert f"nothing was repaired: the copy in {copy} is unchanged" in result.stderr
    assert torch.equal(
        load_file(copy / "tuned.safetensors")["up.weight"], load_file(tuned)["up.weight"]
    )


# ---- what is to be written


@pytest.fixture
def refusing(monkeypatch):
    """Folders that take no file, and an audit that must not begin."""

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def begun(*_, **__):
        raise AssertionError("the work began before its output was tried")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(bulkedge.auditing, "run_plan", begun)
    monkeypatch.setattr("bulkedge._repair.run_plan", begun)


@pytest.mark.parametrize("option", ["--report", "--csv", "--peft", "-o"])
def test_an_audit_tries_its_outputs_first(option, refusing, base, tmp_path):
    factors = {"base_model.model.up.lora_A.weight": weights(2, 16),
               "base_model.model.up.lora_B.weight": weights(24, 2)}  # fmt: skip
    adapter = save_adapter(tmp_path / "adapter", factors)
    place = tmp_path / ("out" if option == "-o" else "out.html")
    result = run("audit", base, adapter, option, place)
    assert result.returncode == FAILURE
    assert f"{tmp_path} is not a writable folder ({os.strerror(errno.ENOSPC)})" in result.stderr


@pytest.mark.parametrize("option", ["-o", "--record", "--report"])
def test_a_repair_tries_its_outputs_first(option, refusing, base, tmp_path):
    tuned = tuned_of(base, tmp_path / "tuned.safetensors")
    rest = [] if option == "-o" else ["--dry-run"]
    result = run("repair", base, tuned, option, tmp_path / "out.html", *rest)
    assert result.returncode == FAILURE
    assert "is not a writable folder" in result.stderr


def test_moments_try_their_output_first(refusing, base, tmp_path):
    texts = tmp_path / "keep.txt"
    texts.write_text("a text\n")
    result = run("moments", base, texts, "-o", tmp_path / "sub/x.moments")
    assert result.returncode == FAILURE
    assert f"{tmp_path} is not a writable folder" in result.stderr


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no folder that refuses everyone")
def test_a_folder_that_refuses_a_superuser(base, tmp_path):
    tuned = tuned_of(base, tmp_path / "tuned.safetensors")
    result = run("audit", base, tuned, "--report", "/proc/r.html")
    assert result.returncode == FAILURE
    assert "/proc/r.html: /proc is not a writable folder" in result.stderr
    assert result.stdout == ""


# ---- what another audit has written


@pytest.mark.parametrize("unchanged", [False, True])
def test_a_finished_record_of_other_inputs_is_kept(unchanged, base, tmp_path):
    one, other = (tuned_of(base, tmp_path / f"{i}.safetensors", seed=i) for i in (1, 2))
    out = tmp_path / "out"
    assert run("audit", base, one, "-o", out, *FOUND).returncode == 0
    before = (out / "record.json").read_bytes()
    result = run("audit", base, one if unchanged else other, "-o", out, "--resume", "-q", *FOUND)
    if unchanged:
        assert result.returncode == 0
        assert "1 of 1 matrix taken from it" in result.stderr
        return
    assert result.returncode == FAILURE
    assert f"record.json: is the record of {one} against {base}" in result.stderr
    assert "--force in place of --resume" in result.stderr
    assert (out / "record.json").read_bytes() == before
    assert run("audit", base, other, "-o", out, "--force", "-q", *FOUND).returncode == 0


OTHER = {
    "top_k": ["-k", "3"], "epsilon": ["--epsilon", "0.4"], "side": ["--side", "both"],
    "method": ["--method", "dense"], "include": ["--include", "up*"],
    "exclude": ["--exclude", "down*"], "partial": ["--partial"],
    "critical_scale": ["--critical-scale"], "seed": ["--seed", "1"],
    "split": ["--recipe", "split.yaml"], "shard": ["--shard", "1/2"], "device": None,
}  # fmt: skip
"""Options that make another question of the same inputs, by the field of a recipe."""


def test_a_finished_record_by_other_settings_is_kept(tmp_path, monkeypatch):
    layers = {"up.weight": weights(24, 16), "down.weight": weights(16, 24)}
    base, tuned = save(tmp_path / "base.safetensors", layers), tmp_path / "tuned.safetensors"
    tuned_of(base, tuned)
    tuned_of(base, tmp_path / "other.safetensors", seed=2)
    (tmp_path / "split.yaml").write_text("split: {up.weight: [12, 12]}\n")
    monkeypatch.chdir(tmp_path)
    assert set(OTHER) == {*Recipe.model_fields, "shard"}  # a new setting is tried, too
    kept = ["-o", tmp_path / "out", "-q", *FOUND]
    assert run("audit", base, tuned, *kept).returncode == 0
    several = ["audit", base, tuned, tmp_path / "other.safetensors", "-o", tmp_path / "s", "-q"]
    assert run(*several, *FOUND).returncode == 0
    before = [path.read_bytes() for path in some(sorted(tmp_path.rglob("record.json")))]
    for name, options in some(OTHER.items()):
        if options is None:  # of this machine's devices there is one
            continue
        what = "the whole audit, not of part 1 of 2" if name == "shard" else f"({name}="
        for command in (["audit", base, tuned, *kept], *([several] if name != "shard" else [])):
            result = run(*command, *options, "--resume")
            assert result.returncode == FAILURE, (name, result)
            assert "record.json: is the record of" in result.stderr
            assert what in result.stderr
            assert "give another folder, or --force in place of --resume" in result.stderr
    assert before == [path.read_bytes() for path in sorted(tmp_path.rglob("record.json"))]
    replaced = run("audit", base, tuned, *kept, "-k", "3", "--force")
    assert replaced.returncode == 0
    assert run("audit", base, tuned, *kept, "-k", "3", "--resume").returncode == 0


# ---- shards


def test_shards_without_their_index(base, tmp_path):
    folder = tmp_path / "shards"
    for i in range(1, 4):
        save(folder / f"model-0000{i}-of-00003.safetensors", {f"{i}.weight": weights(9, 8)})
    result = run("audit", folder, base)
    assert result.returncode == FAILURE
    assert "3 shards without their index; download model.safetensors.index.json" in result.stderr


def test_two_checkpoints_are_no_shards(base, tmp_path):
    folder = tmp_path / "two"
    for name in ("a", "b"):
        save(folder / f"{name}.safetensors", {"up.weight": weights(9, 8)})
    assert (
        "several checkpoints, and nothing says which to read" in run("audit", folder, base).stderr
    )


# ---- what is doubted


def test_doubts_of_several_are_told_and_can_fail_a_build(base, tmp_path):
    fine = tuned_of(base, tmp_path / "fine.safetensors")
    wrong = save(tmp_path / "wrong.safetensors", {"up.weight": 50 * weights(24, 16)})
    result = run("audit", base, fine, wrong, "-q", "-o", tmp_path / "out")
    assert result.returncode == 0
    (line,) = (x for x in result.stdout.splitlines() if "doubt:" in x)
    assert line.startswith("wrong: doubt: In up.weight the update is larger than the base's")
    heads, *rows = (tmp_path / "out/comparison.csv").read_text().splitlines()
    assert heads.endswith('"doubts"')
    assert ["larger than" in row for row in rows] == [False, True]
    for tuned, code in (([fine], 0), ([wrong], 1), ([fine, wrong], 1)):
        options = ["-o", tmp_path / f"{len(tuned)}{code}", "-q", "--fail-on-doubt"]
        assert run("audit", base, *tuned, *options).returncode == code
