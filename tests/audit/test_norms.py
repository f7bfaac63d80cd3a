"""A norm that has changed by more than its size is a doubt, left out or not."""

import pytest
import torch

import bulkedge
from bulkedge.report import Gate, render
from bulkedge.report.doubts import doubts
from helpers import save, save_adapter, some, weights

CLEAN, FOUND = 0, 1
NORM = "layers.0.norm."
BASE = {
    "layers.0.q.weight": weights(12, 10),
    "layers.0.q.bias": 1e-6 * weights(12),
    f"{NORM}weight": 1 + 0.1 * weights(10, seed=1),
    f"{NORM}bias": 1e-4 * weights(10, seed=2),
    "scale": torch.ones(3),
}


def audited(tmp_path, changed, **recipe):
    tuned = BASE | {"layers.0.q.weight": 1.01 * BASE["layers.0.q.weight"]} | changed
    return bulkedge.audit(
        save(tmp_path / "base.safetensors", BASE), save(tmp_path / "tuned.safetensors", tuned),
        recipe={"top_k": 2} | recipe,
    )  # fmt: skip


CHANGES = {
    "8 times": ("weight", lambda w: 8 * w, 7.0),
    "negative": ("weight", lambda w: -w, 2.0),
    "a shift": ("bias", lambda b: b + 3, None),
    "a little": ("weight", lambda w: 1.5 * w, 0.5),
    "a small bias, doubled": ("bias", lambda b: 2 * b, None),
    "rounded": ("weight", lambda w: w.bfloat16(), None),
}


@pytest.mark.parametrize("exclude", [[], ["*norm*"]], ids=["compared", "left out"])
@pytest.mark.parametrize(("end", "change", "expected"), CHANGES.values(), ids=CHANGES)
def test_the_change_is_relative_to_the_weight(end, change, expected, exclude, tmp_path):
    name = NORM + end
    record = audited(tmp_path, {name: change(BASE[name])}, exclude=exclude)
    size = float((change(BASE[name]).double() - BASE[name].double()).norm())
    size /= float(BASE[f"{NORM}weight"].double().norm())
    (row,) = [row for row in record.skipped if row.name == name]
    assert row.relative_change == pytest.approx(size, rel=1e-6)
    assert expected is None or size == pytest.approx(expected, rel=1e-6)
    assert set(doubts(record)) == ({"norms"} if size > 1 else set())
    assert Gate(fail_on=None, fail_on_doubt=True).exit_code(record) == (FOUND if size > 1 else 0)
    assert bulkedge.Record.from_json(record.to_json()) == record
    if size > 1:
        told = doubts(record)["norms"]
        assert told.startswith(f"{name} has changed by {size:.3g} times the size of the base's")
        for kind in some(("junit", "sarif", "markdown", "html")):
            shown = render(record, kind).replace("\\_", "_").replace("&#x27;", "'")
            assert told.partition("'")[0] in shown


def test_biases_of_layers_and_other_vectors_have_no_such_size(tmp_path):
    changed = {"layers.0.q.bias": torch.ones(12), "scale": 9 * torch.ones(3)}
    record = audited(tmp_path, changed)
    assert {row.name for row in record.skipped if row.relative_change is not None} == {
        f"{NORM}weight", f"{NORM}bias",
    }  # fmt: skip
    assert doubts(record) == {}


def test_a_norm_that_an_adapter_replaces(tmp_path):
    stem = "base_model.model.layers.0."
    tensors = {
        f"{stem}q.lora_A.weight": 0.01 * weights(2, 10),
        f"{stem}q.lora_B.weight": 0.01 * weights(12, 2),
        f"{stem}norm.weight": 8 * BASE[f"{NORM}weight"],
    }
    adapter = save_adapter(tmp_path / "a", tensors, modules_to_save=["norm"])
    record = bulkedge.audit(save(tmp_path / "base.safetensors", BASE), adapter)
    assert "7 times the size" in doubts(record)["norms"]
