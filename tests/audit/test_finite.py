"""NaN and Inf in what no matrix is read from: norms, biases, heads, rows that were added."""

import pytest
import torch
from click.testing import CliRunner

import bulkedge
from bulkedge.cli import cli
from helpers import save, save_adapter, weights

NAN, INF = float("nan"), float("inf")
CLEAN, FAILURE = 0, 2
LAYER, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


def tensors():
    """A model with one layer, its norm and its embedding."""
    return {LAYER: weights(24, 16), NORM: torch.ones(16), EMBEDDING: weights(40, 16, seed=2)}


def tuned_of(base):
    """The same after a small update of every matrix."""
    return {name: W + 1e-3 * weights(*W.shape, seed=9) for name, W in base.items()}


def spoilt(tensor, value):
    """A tensor whose last number is another."""
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


def lost(record):
    return {(row.side, row.name): row.reason for row in record.skipped if row.lost}


@pytest.mark.parametrize(("value", "told"), [(NAN, "1 NaN and 0 Inf"), (-INF, "0 NaN and 1 Inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_is_not_finite_is_named(value, told, dtype, tmp_path):
    base = {name: W.to(dtype) for name, W in tensors().items()}
    tuned = {name: W.to(dtype) for name, W in tuned_of(tensors()).items()}
    files = (
        save(tmp_path / "base.safetensors", base),
        save(tmp_path / "tuned.safetensors", tuned | {NORM: spoilt(tuned[NORM], value)}),
    )
    record = bulkedge.audit(*files)
    assert list(lost(record)) == [("tuned", NORM)]
    assert told in lost(record)["tuned", NORM]
    assert [row.not_finite for row in record.skipped if row.name == NORM] == [told]
    assert not record.summary.complete


def test_the_same_nan_in_the_base_is_named_too(tmp_path):
    base = tensors() | {NORM: spoilt(torch.ones(16), NAN)}
    record = bulkedge.audit(
        save(tmp_path / "base.safetensors", base),
        save(tmp_path / "tuned.safetensors", tuned_of(base)),
    )
    assert set(lost(record)) == {("base", NORM), ("tuned", NORM)}


def test_a_new_head_that_is_not_finite_is_lost_and_counted_so(tmp_path):
    tuned = tuned_of(tensors())
    base = save(tmp_path / "base.safetensors", tensors())
    head = {"classifier.weight": weights(3, 16), "classifier.bias": torch.zeros(3)}
    good = bulkedge.audit(base, save(tmp_path / "good.safetensors", tuned | head))
    assert good.summary.complete
    assert good.summary.tensors.apart == 1
    head["classifier.weight"] = spoilt(head["classifier.weight"], INF)
    bad = bulkedge.audit(base, save(tmp_path / "bad.safetensors", tuned | head))
    assert set(lost(bad)) == {("tuned", "classifier.weight")}
    assert (bad.summary.tensors.apart, bad.summary.tensors.lost) == (0, 1)


def test_rows_added_to_a_vocabulary_are_looked_at(tmp_path):
    base, tuned = tensors(), tuned_of(tensors())
    tuned[EMBEDDING] = torch.cat([tuned[EMBEDDING], weights(4, 16, seed=3)])
    assert bulkedge.audit(
        save(tmp_path / "base.safetensors", base), save(tmp_path / "a.safetensors", tuned)
    ).summary.complete
    tuned[EMBEDDING] = spoilt(tuned[EMBEDDING], NAN)
    record = bulkedge.audit(tmp_path / "base.safetensors", save(tmp_path / "b.safetensors", tuned))
    assert set(lost(record)) == {("tuned", EMBEDDING)}


@pytest.mark.parametrize("part", ["saved norm", "norm of the base", "bias"])
def test_an_adapter_with_a_part_that_is_not_finite(part, tmp_path):
    base, prefix = tensors(), "base_model.model."
    stored = {
        f"{prefix}{LAYER.replace('.weight', '')}.lora_A.weight": 0.01 * weights(2, 16),
        f"{prefix}{LAYER.replace('.weight', '')}.lora_B.weight": 0.01 * weights(24, 2),
        f"{prefix}{NORM}": torch.ones(16),
    }
    if part == "saved norm":
        stored[f"{prefix}{NORM}"] = spoilt(torch.ones(16), NAN)
    elif part == "bias":
        stored[f"{prefix}model.norm.bias"] = spoilt(torch.zeros(16), NAN)
    else:
        base[NORM] = spoilt(base[NORM], NAN)
    record = bulkedge.audit(
        save(tmp_path / "base.safetensors", base), save_adapter(tmp_path / "adapter", stored)
    )
    assert lost(record)
    assert all("1 NaN" in reason for reason in lost(record).values())
    assert not record.summary.complete


def test_the_commands_name_it_quietly_and_exit_2(tmp_path):
    base = save(tmp_path / "base.safetensors", tensors())
    bad = tuned_of(tensors()) | {NORM: spoilt(torch.ones(16), NAN)}
    tuned = save(tmp_path / "tuned.safetensors", bad)
    for command in (("audit", base, tuned), ("repair", base, tuned, "-o", tmp_path / "out")):
        result = CliRunner().invoke(cli, [*map(str, command), "-q"])
        assert result.exit_code == FAILURE
        assert f"NOT judged: {NORM}: tuned holds 1 NaN and 0 Inf" in result.stdout


def test_what_is_left_out_is_not_looked_at(tmp_path):
    bad = tuned_of(tensors()) | {NORM: spoilt(torch.ones(16), NAN)}
    files = save(tmp_path / "base.safetensors", tensors()), save(tmp_path / "t.safetensors", bad)
    result = CliRunner().invoke(cli, ["audit", *map(str, files), "-q", "--exclude", NORM])
    assert result.exit_code == CLEAN
