"""Experts' factors of which B is stored expert by expert, as Unsloth did, or rank by rank."""

import json

import pytest
import torch
from safetensors.torch import load_file

import bulkedge
from bulkedge import Recipe, Scale
from bulkedge.checkpoint.experts import GROUPED, RANK_MAJOR
from bulkedge.comparison import make_plan
from bulkedge.comparison.pair import load
from helpers import save, save_adapter, some, weights

E, R, M, N = 3, 2, 24, 20
RECIPE = {"top_k": 3, "method": "dense"}
KEY = "m.experts.gate_up_proj"
UNSLOTH = {"auto_mapping": {"parent_library": "peft", "unsloth_fixed": True}}


def nested(layout, **more):
    entry = {"lora_B_layout": layout, "num_experts": E}
    return {"unsloth_fused_expert_lora": {"parameters": {"gate_up_proj": entry}} | more}


def stack():
    return torch.stack([weights(M, N, seed=e) for e in range(E)])


def adapter(folder, strength=1.0, rank=R, **config):
    """An adapter of a stack of experts, stored (experts, out, in)."""
    A = weights(E * rank, N, seed=11)
    B = strength * weights(M, E * rank, seed=12)
    tensors = {"m.experts.lora_A.weight": A, "m.experts.lora_B.weight": B}
    settings = {"target_parameters": ["experts.gate_up_proj"], "peft_version": "0.19.1", "r": rank}
    return save_adapter(folder, tensors, **settings | {"lora_alpha": 2 * rank} | config)


def update(folder, layout, rank=R, alpha=None):
    """What it adds to each expert: column j of B belongs to expert j // r, or to j % E."""
    found = load_file(folder / "adapter_model.safetensors")
    A, B = (found[f"m.experts.lora_{side}.weight"].double() for side in "AB")
    parts = []
    for e in range(E):
        columns = [j for j in range(E * rank) if (j // rank if layout == GROUPED else j % E) == e]
        parts.append(B[:, columns] @ A[e * rank : (e + 1) * rank])
    return (2 if alpha is None else alpha / rank) * torch.stack(parts)


MARKERS = {
    "flat": ({"lora_B_layout": GROUPED}, GROUPED),
    "flat by Unsloth": (UNSLOTH | {"lora_B_layout": GROUPED}, GROUPED),
    "nested": (nested(GROUPED), GROUPED),
    "both": (nested(GROUPED, lora_A_layout=GROUPED) | {"lora_B_layout": GROUPED}, GROUPED),
    "flat as in PEFT": (UNSLOTH | {"lora_B_layout": RANK_MAJOR}, RANK_MAJOR),
    "nested as in PEFT": (nested(RANK_MAJOR), RANK_MAJOR),
    "none": ({}, RANK_MAJOR),
    "none, another library": ({"auto_mapping": {"parent_library": "x"}}, RANK_MAJOR),
    "nulls": ({"lora_B_layout": None, "unsloth_fused_expert_lora": None}, RANK_MAJOR),
}


@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("case", MARKERS)
def test_each_expert_has_its_own_columns(case, in_out, tmp_path):
    config, layout = MARKERS[case]
    W0 = stack()
    stored = W0.mT.contiguous() if in_out else W0
    base = save(tmp_path / "base/model.safetensors", {KEY: stored})
    tuned = adapter(tmp_path / "a", **config)
    expected = W0.double() + update(tuned, layout)
    plan = make_plan(base, tuned, Recipe())
    assert plan.skipped == ()
    for e, comparison in some(enumerate(plan.comparisons)):
        W = load(comparison, torch.device("cpu")).tuned_map(torch.float64).to_dense()
        W = W if W.shape == (M, N) else W.mT
        torch.testing.assert_close(W, expected[e], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", [GROUPED, RANK_MAJOR])
def test_the_audit_and_the_repair_of_the_merged_checkpoint(layout, tmp_path):
    """The same directions as in the merged checkpoint, before the repair and after it."""
    W0 = stack()
    base = save(tmp_path / "base.safetensors", {KEY: W0})
    tuned = adapter(tmp_path / "a", 0.4, lora_B_layout=layout)
    merged = save(tmp_path / "m.safetensors", {KEY: W0.double() + update(tuned, layout)})
    record = bulkedge.audit(base, tuned, recipe=RECIPE)
    whole = bulkedge.audit(base, merged, recipe=RECIPE)
    assert [m.new_directions for m in record.matrices] == [m.new_directions for m in whole.matrices]
    other = RANK_MAJOR if layout == GROUPED else GROUPED
    save(tmp_path / "o.safetensors", {KEY: W0.double() + update(tuned, other)})
    wrong = bulkedge.audit(base, tmp_path / "o.safetensors", recipe=RECIPE)
    sigmas = [[d.sigma for m in r.matrices for d in m.directions] for r in (record, whole, wrong)]
    torch.testing.assert_close(*map(torch.tensor, sigmas[:2]), rtol=1e-5, atol=1e-5)
    assert max(abs(a - b) for a, b in zip(sigmas[0], sigmas[2], strict=True)) > 0.1
    assert whole.summary.new_directions > 0

    done = bulkedge.repair(base, tuned, tmp_path / "out", method=Scale(0.0), recipe=RECIPE)
    assert done.after.summary.new_directions == 0
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["lora_B_layout"] == layout
    rank = next(iter(config["rank_pattern"].values()), R) if config.get("rank_pattern") else R
    alpha = next(iter(config["alpha_pattern"].values())) if config.get("alpha_pattern") else 2 * R
    repaired = W0.double() + update(tmp_path / "out", layout, rank, alpha)
    save(tmp_path / "repaired.safetensors", {KEY: repaired})
    again = bulkedge.audit(base, tmp_path / "repaired.safetensors", recipe=RECIPE)
    assert again.summary.new_directions == 0
    assert rank > R  # the columns were packed anew


DOUBTS = {
    "by Unsloth": (UNSLOTH, "ambiguous"),
    "its base is Unsloth's": ({"base_model_name_or_path": "unsloth/gpt-oss-20b"}, "ambiguous"),
    "of a cache": ({"base_model_name_or_path": "/c/models--unsloth--x/snapshots"}, "ambiguous"),
    "another parameter's": (
        {"unsloth_fused_expert_lora": {"parameters": {"down_proj": {"lora_B_layout": GROUPED}}}},
        "ambiguous",
    ),
    "a marker without content": ({"unsloth_fused_expert_lora": [1]}, "ambiguous"),
    "mixed": (nested("mixed"), "gate_up_proj as 'mixed'"),
    "unknown": ({"lora_B_layout": "x\x1b"}, r"gate_up_proj as 'x\x1b'"),
    "a number": ({"lora_B_layout": 3}, "gate_up_proj as 'int'"),
    "deep": ({"lora_B_layout": json.loads("[" * 900 + "]" * 900)}, "gate_up_proj as 'list'"),
    "contradiction": (
        nested(GROUPED) | {"lora_B_layout": RANK_MAJOR},
        "gate_up_proj as 'grouped_by_expert', 'rank_major'",
    ),
}


@pytest.mark.parametrize("case", DOUBTS)
def test_a_layout_in_doubt_is_lost(case, tmp_path):
    config, expected = DOUBTS[case]
    base = {KEY: stack(), "q.weight": weights(4, 4)}
    tuned = adapter(tmp_path / "a", **config)
    file = tuned / "adapter_model.safetensors"
    more = {"q.lora_A.weight": weights(R, 4), "q.lora_B.weight": weights(4, R)}
    save(file, load_file(file) | more)
    record = bulkedge.audit(save(tmp_path / "base.safetensors", base), tuned, recipe={"top_k": 2})
    assert [m.name for m in record.matrices] == ["q.weight"]
    assert {row.name for row in record.skipped if row.lost} == {
        "m.experts.lora_A.weight",
        "m.experts.lora_B.weight",
    }
    (reason,) = {row.reason for row in record.skipped if row.lost}
    assert expected in reason
    assert '"lora_B_layout": "grouped_by_expert"' in reason
    assert not record.summary.complete


@pytest.mark.parametrize("config", [UNSLOTH, UNSLOTH | {"lora_B_layout": GROUPED}])
def test_of_rank_one_both_layouts_are_one_and_a_repair_says_which_it_wrote(config, tmp_path):
    W0 = stack()
    base = save(tmp_path / "base.safetensors", {KEY: W0})
    tuned = adapter(tmp_path / "a", 0.5, 1, **config)
    done = bulkedge.repair(base, tuned, tmp_path / "out", method=Scale(0.0), recipe=RECIPE)
    assert done.before.summary.new_directions > done.after.summary.new_directions == 0
    assert done.after.summary.lost == 0
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert written["lora_B_layout"] == config.get("lora_B_layout", RANK_MAJOR)
    (rank,), (alpha,) = written["rank_pattern"].values(), written["alpha_pattern"].values()
    assert rank > 1
    repaired = W0.double() + update(tmp_path / "out", written["lora_B_layout"], rank, alpha)
    save(tmp_path / "repaired.safetensors", {KEY: repaired})
    again = bulkedge.audit(base, tmp_path / "repaired.safetensors", recipe=RECIPE)
    assert again.summary.new_directions == 0
