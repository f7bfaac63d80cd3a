"""What holds of every repair of an adapter, on random ones."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

import bulkedge
from bulkedge import Clip, Project, Scale, Shrink
from bulkedge.checkpoint import open_adapter
from helpers import save, save_adapter, some, weights

METHODS = [Scale(0.0, rounds=4), Scale(0.5), Clip(), Clip(0.5), Shrink(), Project()]
DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]


def draw(seed, folder):
    """A base of three matrices, an adapter of any strength on two of them, and how to repair it."""
    rng = random.Random(seed)  # noqa: S311
    r, dtype = rng.choice([1, 2, 4]), rng.choice(DTYPES)
    base, tensors = {}, {"h.2.bias": weights(5, seed=seed)}
    for i in range(3):
        m, n = rng.randrange(24, 70), rng.randrange(24, 70)
        base[f"h.{i}.weight"] = weights(m, n, seed=seed + i)
        if i < 2:
            strength = rng.choice([1e-3, 0.3, 1.0, 3.0])
            tensors[f"h.{i}.lora_A.weight"] = weights(r, n, seed=seed + 7).to(dtype)
            tensors[f"h.{i}.lora_B.weight"] = strength * weights(m, r, seed=seed + 9).to(dtype)
    stored = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    config = {"r": r, "lora_alpha": rng.choice([1, 3, 2 * r]), "use_rslora": rng.random() < 0.3}
    adapter = save_adapter(folder / "tuned", stored, **config)
    recipe = {"top_k": rng.choice([2, 4]), "side": rng.choice(["left", "right", "both"])}
    settings = {"method": rng.choice(METHODS), "max_rank": rng.choice([None, None, 1, r, r + 1])}
    return save(folder / "base.safetensors", base), adapter, recipe, settings


def update_of(adapter, name):
    B, A, scale = open_adapter(adapter).factors[name].read()
    return scale * B @ A


@pytest.mark.parametrize("seed", range(40))
def test_a_random_adapter(seed, tmp_path):
    base, adapter, recipe, settings = draw(seed, tmp_path)
    out = tmp_path / "out"
    record = bulkedge.repair(base, adapter, out, recipe=recipe, **settings)
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, out))
    assert list(before) == list(after)
    rows = {row.name: row for row in record.matrices}
    config = json.loads((out / "adapter_config.json").read_text())
    for name, tensor in some(before.items()):
        weight = name.removeprefix("base_model.model.").rpartition(".lora_")[0] + ".weight"
        row = rows.get(weight)
        if row is None or row.status != "repaired":
            assert torch.equal(tensor, after[name])
            continue
        assert after[name].dtype == tensor.dtype
        axis = 0 if "lora_A" in name else 1
        assert after[name].shape[axis] == row.rank_after
        assert after[name].shape[1 - axis] == tensor.shape[1 - axis]
        assert row.rank_after <= (settings["max_rank"] or 10**9)
        keeps_rank = not isinstance(settings["method"], Scale)
        assert row.rank_after == row.rank_before or not keeps_rank or settings["max_rank"]
        assert config.get("rank_pattern", {}).get("^" + weight[:-7].replace(".", "\\.")) in (
            row.rank_after, None if row.rank_after == row.rank_before else row.rank_after,
        )  # fmt: skip
        old, new = update_of(adapter, weight), update_of(out, weight)
        norm = old.norm()
        assert row.update_norm == pytest.approx(float(norm), rel=1e-6)
        assert float((new - old).norm() / norm) == pytest.approx(
            row.change, abs=row.loss + 1e-6
        )  # what was stored is what was meant, but for the loss
        assert 1 - float((new.norm() / norm) ** 2) == pytest.approx(
            row.energy_removed, abs=(3 + row.change) * row.loss + 1e-6
        )
        if settings["max_rank"] is None:
            assert row.loss < 4 * torch.finfo(tensor.dtype).eps
    counted = sum(row.intruders_after for row in record.matrices)
    assert counted <= record.after.summary.new_directions
    again = bulkedge.audit(base, out, recipe=recipe)
    assert again.matrices == record.after.matrices
    if record.after.summary.new_directions == 0:
        second = bulkedge.repair(base, out, tmp_path / "again", recipe=recipe, **settings)
        assert second.matrices == []
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (out / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
