"""Module names against checkpoint names, as transformers and PEFT write the two."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from bulkedge import CheckpointError, Recipe
from bulkedge.comparison import make_plan
from bulkedge.comparison.pair import load
from helpers import needs, save, save_adapter, some, weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers

CPU = torch.device("cpu")
renamed = needs(
    "transformers", "5.0", "these models have the names of their files, or no such layer"
)
TEXT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4, "projection_dim": 8,
}  # fmt: skip


def llava():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
    )
    return transformers.LlavaForConditionalGeneration(config)


def gemma3():
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(
            **{k: v for k, v in VISION.items() if k != "projection_dim"}
        ),
        text_config=transformers.Gemma3TextConfig(**TEXT, head_dim=8),
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen2_vl():
    config = transformers.Qwen2VLConfig(
        text_config=TEXT
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2,
            "patch_size": 4,
        },
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


def tied_llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, tie_word_embeddings=True))


def t5():
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config)


def vit():
    config = {k: v for k, v in VISION.items() if k != "projection_dim"}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**config))


def gpt_neox():
    config = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**config))


def phimoe():
    config = transformers.PhimoeConfig(**TEXT, num_local_experts=3, num_experts_per_tok=2)
    return transformers.PhimoeForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


def saved(tmp_path, model, **config):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "base")
        settings = {"r": 2, "lora_alpha": 6, "init_lora_weights": False} | config
        tuned = peft.get_peft_model(model, peft.LoraConfig(**settings))
        tuned.save_pretrained(tmp_path / "adapter")
        before = {
            name.replace(".base_layer", ""): W.clone()
            for name, W in tuned.get_base_model().state_dict().items()
        }
        merged = tuned.merge_and_unload().state_dict()
    return tmp_path / "base", tmp_path / "adapter", before, merged


def check(base, adapter, before, merged):
    plan = make_plan(base, adapter, Recipe())
    assert plan.skipped == ()
    keys = set(load_file(adapter / "adapter_model.safetensors"))
    assert keys == {name for c in plan.comparisons for name in c.stored_names}
    for comparison in some(plan.comparisons):
        flip = (lambda W: W.mT) if comparison.transposed else (lambda W: W)
        pair = load(comparison, CPU)
        name = comparison.tuned_name
        assert torch.equal(pair.base, flip(before[name].flatten(1)))
        W = pair.tuned_map(torch.float64).to_dense()
        torch.testing.assert_close(W, flip(merged[name].double().flatten(1)), rtol=1e-5, atol=1e-5)
    return plan.comparisons


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (llava, ["q_proj", "fc1", "linear_1", "down_proj", "lm_head"]),
        (gemma3, ["q_proj", "fc1", "down_proj"]),
        (qwen2_vl, ["q_proj", "qkv", "fc1", "down_proj"]),
        pytest.param(
            vit,
            ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "projection", "classifier"],
            marks=renamed,
        ),
        pytest.param(gpt_neox, ["query_key_value", "dense_h_to_4h", "lm_head"], marks=renamed),
        pytest.param(phimoe, ["q_proj", "router"], marks=renamed),
    ],
    ids=["llava", "gemma3", "qwen2_vl", "vit", "gpt_neox", "phimoe"],
)
def test_other_names_in_the_file_than_in_the_model(make, targets, tmp_path):
    comparisons = check(*saved(tmp_path, make(), target_modules=targets))
    found = {c.tuned_name.split(".")[-2] for c in comparisons}
    assert found == set(targets)
    assert len({c.base.name for c in comparisons}) == len(comparisons)


@pytest.mark.parametrize("make", [tied_llama, gpt2, t5])
def test_an_output_layer_that_shares_the_embedding(make, tmp_path):
    config = {"target_modules": ["lm_head", "q_proj", "c_attn", "q"]}
    base, adapter, before, merged = saved(tmp_path, make(), **config)
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    comparisons = check(base, adapter, before, merged)
    (shared,) = [c for c in comparisons if c.base.alias]
    assert shared.base.name.endswith(
        ("embed_tokens.weight[as lm_head]", "wte.weight[as lm_head]", "shared.weight[as lm_head]")
    )
    assert not shared.transposed


def test_both_names_of_one_tensor(tmp_path):
    """Without tying, PEFT trains two updates: the layers come apart."""
    config = {"target_modules": ["lm_head", "embed_tokens"]}
    base, adapter, _, _ = saved(tmp_path, tied_llama(), **config)
    plan = make_plan(base, adapter, Recipe())
    assert [c.base.name for c in plan.comparisons] == [
        "model.embed_tokens.weight",
        "model.embed_tokens.weight[as lm_head]",
    ]


def test_an_update_that_is_tied_is_judged_once(tmp_path):
    config = {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True}
    base, adapter, before, _ = saved(tmp_path, tied_llama(), **config)
    plan = make_plan(base, adapter, Recipe())
    (comparison,) = plan.comparisons
    assert comparison.base.name == "model.embed_tokens.weight"
    assert torch.equal(load(comparison, CPU).base, before["model.embed_tokens.weight"])
    reasons = {row.name.split(".")[2]: (row.reason, row.lost) for row in plan.skipped}
    assert reasons["lm_head"] == ("the same update as the embedding's", False)


@pytest.mark.parametrize(
    "config",
    [{"tie_word_embeddings": False}, {"architectures": ["LlamaModel"]}, {}],
    ids=["untied", "body", "unknown"],
)
def test_an_output_layer_of_its_own_is_no_embedding(config, tmp_path):
    tensors = {"embed_tokens.weight": weights(9, 4), "q.weight": weights(4, 4)}
    base = save(tmp_path / "base/model.safetensors", tensors)
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    keys = {}
    for module, rows in {"lm_head": 9, "q": 4}.items():
        keys[f"{module}.lora_A.weight"] = weights(2, 4)
        keys[f"{module}.lora_B.weight"] = weights(rows, 2)
    plan = make_plan(base.parent, save_adapter(tmp_path / "a", keys), Recipe())
    assert [c.base.name for c in plan.comparisons] == ["q.weight"]
    assert all("no counterpart" in row.reason and row.lost for row in plan.skipped)


def test_a_trained_output_layer_is_compared_with_the_embedding_it_shared(tmp_path):
    base, adapter, before, _ = saved(
        tmp_path, tied_llama(), target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    (head,) = [c for c in make_plan(base, adapter, Recipe()).comparisons if c.tuned]
    assert head.base.name == "model.embed_tokens.weight[as lm_head]"
    assert torch.equal(load(head, CPU).base, before["model.embed_tokens.weight"])


def test_ambiguous_names_are_an_error_with_the_candidates(tmp_path):
    base = {
        "model.layers.0.q.weight": weights(4, 4),
        "transformer.layers.0.q.weight": weights(4, 4),
        "model.layers.0.k.weight": weights(4, 4),
        "model.layers.1.k.weight": weights(4, 4),
    }
    base = save(tmp_path / "base.safetensors", base)
    keys = {}
    for module in ("layers.0.k", "layers.1.k", "language_model.layers.0.q"):
        keys[f"{module}.lora_A.weight"] = weights(2, 4)
        keys[f"{module}.lora_B.weight"] = weights(4, 2)
    adapter = save_adapter(tmp_path / "a", keys)
    message = (
        r"base\.safetensors: 'language_model\.layers\.0\.q\.weight' of the tuned side may belong "
        r"to any of 'model\.layers\.0\.q\.weight', 'transformer\.layers\.0\.q\.weight'; rename it"
    )
    with pytest.raises(CheckpointError, match=message):
        make_plan(base, adapter, Recipe())
    plan = make_plan(base, adapter, Recipe(exclude=("language_model.*",)))
    assert [c.tuned_name for c in plan.comparisons] == ["layers.0.k.weight", "layers.1.k.weight"]
    assert {(row.reason, row.lost) for row in plan.skipped} == {("excluded by the recipe", False)}


def test_shapes_decide_between_candidates(tmp_path):
    tensors = {"model.h.0.q.weight": weights(4, 4), "transformer.h.0.q.weight": weights(6, 6)}
    tensors |= {"model.h.0.k.weight": weights(4, 4)}
    base = save(tmp_path / "base.safetensors", tensors)
    keys = {}
    for module, n in {"language_model.h.0.q": 6, "h.0.k": 4}.items():
        keys[f"{module}.lora_A.weight"] = weights(2, n)
        keys[f"{module}.lora_B.weight"] = weights(n, 2)
    plan = make_plan(base, save_adapter(tmp_path / "a", keys), Recipe())
    assert [c.base.name for c in plan.comparisons] == [
        "model.h.0.k.weight",
        "transformer.h.0.q.weight",
    ]


def test_no_other_layer_is_taken_for_likeness(tmp_path):
    """A vision tower's layers are not the text model's of the same shape."""
    base = save(
        tmp_path / "base.safetensors",
        {f"model.layers.{i}.{n}.weight": weights(4, 4) for i in range(2) for n in "qk"},
    )
    keys = {}
    for module in ("model.layers.0.q", "model.vision_tower.encoder.layers.0.k", "classifier.q"):
        keys[f"{module}.lora_A.weight"] = weights(2, 4)
        keys[f"{module}.lora_B.weight"] = weights(4, 2)
    plan = make_plan(base, save_adapter(tmp_path / "a", keys), Recipe())
    assert [c.base.name for c in plan.comparisons] == ["model.layers.0.q.weight"]
    assert len(plan.skipped) == 4
    assert all("no counterpart in the base (nearest: 'model" in r.reason for r in plan.skipped)
