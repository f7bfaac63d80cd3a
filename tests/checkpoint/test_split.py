"""Fused weights judged block by block: each block is the matrix of its rows."""

import warnings

import pytest
import torch

import bulkedge
from bulkedge import Recipe, RecipeError
from bulkedge.comparison import make_plan
from bulkedge.comparison.pair import load
from bulkedge.records import make_recipe
from helpers import save, save_adapter, some, weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers

CPU = torch.device("cpu")


def phi3():
    config = transformers.Phi3Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


CASES = {
    "phi3": (phi3, {"*qkv_proj.weight": (16, 8, 8), "*gate_up_proj.weight": (24, 24)}),
    "gpt2": (gpt2, {"*c_attn.weight": (16, 16, 16)}),
}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", CASES)
def test_every_block_is_that_of_the_merged_weight(kind, dora, tmp_path):
    make, split = CASES[kind]
    torch.manual_seed(0)
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "base")
        config = peft.LoraConfig(
            r=2, init_lora_weights=False, use_dora=dora,
            target_modules=["qkv_proj", "gate_up_proj", "c_attn", "c_proj", "down_proj"],
        )  # fmt: skip
        tuned = peft.get_peft_model(model, config)
        tuned.save_pretrained(tmp_path / "adapter")
        merged_model = tuned.merge_and_unload()
        merged_model.save_pretrained(tmp_path / "merged")
    merged = merged_model.state_dict()
    for side in ("adapter", "merged"):
        recipe = Recipe(split=split, include=tuple(split))
        plan = make_plan(tmp_path / "base", tmp_path / side, recipe)
        rows = {}
        for comparison in some(plan.comparisons):
            name = comparison.base.info.name
            stored = merged[name].double()
            whole = stored.mT if comparison.transposed else stored
            start, stop = comparison.base.rows
            assert comparison.base.name == f"{name}[{start}:{stop}]"
            pair = load(comparison, CPU)
            W = pair.tuned_map(torch.float64).to_dense()
            torch.testing.assert_close(W, whole[start:stop], rtol=1e-5, atol=1e-5)
            assert (W - pair.base).abs().max() > 0.05
            rows.setdefault(name, []).append(stop - start)
        for sizes in some(rows.values()):
            assert tuple(sizes) in split.values()
        assert len(rows) == (4 if kind == "phi3" else 2)


def test_blocks_are_rows_of_the_record(tmp_path):
    W0, W = weights(12, 8), weights(12, 8, seed=1)
    base = save(tmp_path / "base.safetensors", {"qkv.weight": W0})
    tuned = save(tmp_path / "tuned.safetensors", {"qkv.weight": W})
    record = bulkedge.audit(base, tuned, recipe={"split": {"qkv*": [6, 4, 2]}, "top_k": 2})
    assert [(m.name, m.tuned_name, m.shape) for m in record.matrices] == [
        ("qkv.weight[0:6]", "qkv.weight[0:6]", (6, 8)),
        ("qkv.weight[6:10]", "qkv.weight[6:10]", (4, 8)),
        ("qkv.weight[10:12]", "qkv.weight[10:12]", (2, 8)),
    ]
    assert record.matrices[1].spectral_norm_base == pytest.approx(
        float(torch.linalg.matrix_norm(W0[6:10].double(), 2))
    )
    again = bulkedge.audit(base, tuned, recipe=record.recipe)
    assert again.matrices == record.matrices


def test_experts_are_split_too(tmp_path):
    W0 = weights(2, 10, 4)
    base = save(tmp_path / "base.safetensors", {"experts.gate_up_proj": W0})
    tuned = save(tmp_path / "tuned.safetensors", {"experts.gate_up_proj": W0 + 1})
    plan = make_plan(base, tuned, Recipe(split={"*gate_up_proj": (5, 5)}))
    assert [c.base.name for c in plan.comparisons] == [
        f"experts.gate_up_proj[{e}, {rows}]" for e in (0, 1) for rows in ("0:5", "5:10")
    ]
    pair = load(plan.comparisons[3], CPU)
    assert torch.equal(pair.base, W0[1, 5:])
    assert torch.equal(pair.replaced, W0[1, 5:] + 1)


@pytest.mark.parametrize("sizes", [(6, 4), (6, 4, 4), ()])
def test_blocks_must_add_up(sizes, tmp_path):
    base = save(tmp_path / "base.safetensors", {"qkv.weight": weights(12, 8)})
    message = rf"blocks \[.*\] of 'qkv\.weight' in .* have {sum(sizes)} rows together, it has 12"
    keys = {"qkv.lora_A.weight": weights(2, 8), "qkv.lora_B.weight": weights(12, 2)}
    for tuned in (base, save_adapter(tmp_path / "a", keys)):
        with pytest.raises(RecipeError, match=message):
            make_plan(base, tuned, Recipe(split={"qkv*": sizes}))


def test_a_split_that_matches_nothing(tmp_path):
    base = save(tmp_path / "base.safetensors", {"qkv.weight": weights(12, 8)})
    with pytest.raises(RecipeError, match=r"'\*qvk\*' matches no tensor of either side"):
        make_plan(base, base, Recipe(split={"*qvk*": (6, 6)}))


def test_a_block_has_rows():
    with pytest.raises(RecipeError, match=r"split\.x\.1: at least 1, got 0"):
        make_recipe({"split": {"x": [4, 0]}})
