"""A vector that has lost all its numbers is no update that training writes: a doubt."""

import pytest
import torch

import bulkedge
from bulkedge.report import Gate
from bulkedge.report.doubts import doubts
from helpers import save, save_adapter, weights

FOUND = 1
BASE = {
    "layers.0.q.weight": weights(12, 10),
    "layers.0.q.bias": weights(12, seed=1),
    "layers.0.norm.weight": torch.ones(10, dtype=torch.bfloat16),
    "layers.0.norm.bias": torch.zeros(10),
}
ALL = {"layers.0.q.bias", "layers.0.norm.weight"}


def audited(tmp_path, changed, base=BASE, prefix="", **recipe):
    tuned = BASE | {"layers.0.q.weight": 1.01 * BASE["layers.0.q.weight"]} | changed
    tuned = {prefix + name: tensor for name, tensor in tuned.items()}
    return bulkedge.audit(
        save(tmp_path / "base.safetensors", base),
        save(tmp_path / "tuned.safetensors", tuned),
        recipe={"top_k": 2} | recipe,
    )


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("names", [[name] for name in sorted(ALL)] + [sorted(ALL)], ids=len)
def test_a_vector_of_zeros_is_doubted(names, prefix, tmp_path):
    changed = {name: torch.zeros_like(BASE[name]) for name in names}
    record = audited(tmp_path, changed, prefix=prefix)
    assert {r.name for r in record.skipped if r.zeroed} == {prefix + name for name in names}
    told = doubts(record)["vectors"]
    assert any(told.startswith(f"{prefix}{name} of the fine-tune is all zeros") for name in names)
    assert ("1 other likewise" in told) is (len(names) == 2)
    assert Gate(fail_on=None, fail_on_doubt=True).exit_code(record) == FOUND
    assert bulkedge.Record.from_json(record.to_json()) == record


def test_zeros_that_the_base_has_are_not(tmp_path):
    assert doubts(audited(tmp_path, {})) == {}
    nothing = {name: torch.zeros_like(BASE[name]) for name in ALL}
    assert doubts(audited(tmp_path, nothing, base=BASE | nothing)) == {}


def test_a_vector_that_an_adapter_replaces_may_be_all_zeros_too(tmp_path):
    base = save(tmp_path / "base.safetensors", BASE)
    stem = "base_model.model.layers.0."
    tensors = {
        f"{stem}q.lora_A.weight": 0.01 * weights(2, 10),
        f"{stem}q.lora_B.weight": 0.01 * weights(12, 2),
        f"{stem}norm.weight": torch.zeros(10),
    }
    adapter = save_adapter(tmp_path / "a", tensors, modules_to_save=["norm"])
    record = bulkedge.audit(base, adapter, recipe={"top_k": 2})
    assert "norm.weight of the fine-tune is all zeros" in doubts(record)["vectors"]
