"""Experts: stacked in one tensor or stored one by one, updated by PEFT's ``target_parameters``."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

import bulkedge
from bulkedge import CheckpointError, Recipe
from bulkedge.comparison import make_plan
from bulkedge.comparison.pair import load
from helpers import needs, save, save_adapter, some, weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers

CPU = torch.device("cpu")
COMMON = {
    "vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2,
}  # fmt: skip


def mixtral(**changes):
    settings = COMMON | {"num_local_experts": 3} | changes
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings))


def qwen(**changes):
    config = transformers.Qwen2MoeConfig(
        **COMMON | {"num_experts": 3, "moe_intermediate_size": 8} | changes,
        shared_expert_intermediate_size=8,
    )
    return transformers.Qwen2MoeForCausalLM(config)


def gpt_oss(**changes):
    settings = COMMON | {"num_local_experts": 3, "head_dim": 8, "pad_token_id": 0} | changes
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**settings))


def aria(**changes):
    text = COMMON | {"moe_num_experts": 3, "moe_topk": 2, "moe_num_shared_experts": 1} | changes
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
    config = transformers.AriaConfig(text_config=text | {"pad_token_id": 0}, vision_config=vision)
    return transformers.AriaForConditionalGeneration(config)


def llama4(**changes):
    config = transformers.Llama4TextConfig(
        **COMMON | {"num_local_experts": 3, "intermediate_size_mlp": 24, "head_dim": 8} | changes,
        pad_token_id=0,
    )
    return transformers.Llama4ForCausalLM(config)


def granite(**changes):
    settings = COMMON | {"num_local_experts": 3} | changes
    return transformers.GraniteMoeForCausalLM(transformers.GraniteMoeConfig(**settings))


MODELS = {"mixtral": mixtral, "qwen": qwen, "gpt_oss": gpt_oss, "llama4": llama4, "aria": aria}
# what makes every expert square, so that shapes tell nothing
SQUARE = {
    "mixtral": {"intermediate_size": 16},
    "qwen": {"moe_intermediate_size": 16},
    "gpt_oss": {"intermediate_size": 16},
    "llama4": {"intermediate_size": 16},
    "aria": {"intermediate_size": 16},
}
IN_OUT = ("gpt_oss", "llama4", "aria")
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
stacked = needs("transformers", "5.0", "most models have a module for each expert")


def saved(tmp_path, model, **config):
    """Base and adapter as they are saved, and the weights after PEFT's merge."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / "base")
        settings = {"r": 2, "lora_alpha": 6, "init_lora_weights": False, "target_modules": []}
        tuned = peft.get_peft_model(model, peft.LoraConfig(**settings | config))
        tuned.save_pretrained(tmp_path / "adapter")
        merged = tuned.merge_and_unload().state_dict()
    return tmp_path / "base", tmp_path / "adapter", merged


def part_of(tensors, named):
    """What ``name[expert, rows]`` means, by Python itself; rows are those of the output."""
    name, _, inside = named.partition("[")
    tensor = tensors[name].double()
    expert, _, rows = inside.rstrip("]").partition(", ")
    tensor = tensor[int(expert)] if expert else tensor
    return tensor[slice(*map(int, rows.split(":")))] if rows else tensor


def check(base, adapter, merged, in_out=False):
    plan = make_plan(base, adapter, Recipe())
    assert plan.skipped == ()
    keys = set(load_file(adapter / "adapter_model.safetensors"))
    assert keys == {name for c in plan.comparisons for name in c.stored_names}
    assert len({c.base.name for c in plan.comparisons}) == len(plan.comparisons)
    for comparison in some(plan.comparisons):
        stored = part_of(merged, comparison.tuned_name)
        assert comparison.transposed == (in_out and "experts" in comparison.tuned_name)
        expected = stored.mT if comparison.transposed else stored
        pair = load(comparison, CPU)
        W = pair.tuned_map(torch.float64).to_dense()
        torch.testing.assert_close(W, expected, rtol=1e-5, atol=1e-5)
        assert (W - pair.base).abs().max() > 0.1
    return plan.comparisons


@stacked
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_one_comparison_for_each_expert(kind, square, tmp_path):
    model = MODELS[kind](**SQUARE[kind] if square else {})
    comparisons = check(
        *saved(tmp_path, model, target_parameters=BOTH, target_modules=["q_proj"]),
        # of square experts the type tells, of others the width
        in_out=kind in IN_OUT,
    )
    experts = [c for c in comparisons if "experts" in c.tuned_name]
    a_layer = {"mixtral": 9, "qwen": 9, "gpt_oss": 6, "llama4": 6, "aria": 6}[kind]
    assert len(experts) == 2 * a_layer
    assert {c.factors.rank for c in comparisons} == {2}


@stacked
@pytest.mark.parametrize("names", [["experts.down_proj"], ["gate_up_proj"]])
@pytest.mark.parametrize("kind", MODELS)
def test_one_parameter_alone(kind, names, tmp_path):
    model = MODELS[kind]()
    comparisons = check(*saved(tmp_path, model, target_parameters=names), in_out=kind in IN_OUT)
    assert all(names[0].rpartition(".")[2] in c.tuned_name for c in comparisons)


@stacked
@pytest.mark.parametrize("intermediate", [24, 16])
def test_experts_that_are_not_called_so(intermediate, tmp_path):
    """Granite stores its experts, and their router, under names of their own."""
    model = granite(intermediate_size=intermediate)
    comparisons = check(*saved(tmp_path, model, target_parameters=[*BOTH, "router.weight"]))
    layers = {c.base.info.name.partition("block_sparse_moe.")[2] for c in comparisons}
    assert layers == {"input_linear.weight", "output_linear.weight", "router.layer.weight"}
    assert len(comparisons) == 2 * (3 + 3 + 1)


def test_full_experts_that_are_not_called_so(tmp_path):
    name = "model.layers.0.block_sparse_moe.input_linear.weight"
    base = save(tmp_path / "base.safetensors", {name: weights(3, 8, 6)})
    tuned = save(tmp_path / "tuned.safetensors", {name: weights(3, 8, 6, seed=1)})
    plan = make_plan(base, tuned, Recipe())
    assert [c.base.shape for c in plan.comparisons] == [(8, 6)] * 3


@stacked
def test_patterns_name_the_parameter(tmp_path):
    config = {
        "target_parameters": BOTH,
        "rank_pattern": {"experts.down_proj": 3},
        "alpha_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 5},
        "use_rslora": True,
    }
    comparisons = check(*saved(tmp_path, mixtral(), **config))
    scales = {(c.factors.rank, round(c.factors.scale, 4)) for c in comparisons}
    assert scales == {(3, 3.4641), (2, 3.5355), (2, 4.2426)}


def test_a_parameter_that_is_a_layers_weight(tmp_path):
    check(*saved(tmp_path, mixtral(), target_parameters=["q_proj.weight", "gate.weight"]))


def test_the_whole_audit_of_experts(tmp_path):
    base, adapter, _ = saved(tmp_path, gpt_oss(), target_parameters=BOTH)
    record = bulkedge.audit(base, adapter, recipe={"top_k": 2, "include": ["*layers.1.*down*"]})
    assert [m.name for m in record.matrices] == [
        f"model.layers.1.mlp.experts.down_proj[{e}]" for e in range(3)
    ]
    assert {(m.shape, m.transposed, m.rank) for m in record.matrices} == {((24, 16), True, 2)}


# ---- before 0.19.1 PEFT took every stack for (experts, in, out)


def old_adapter(tmp_path, p, q, version):
    """An adapter of three experts stored (p, q), and what the PEFT of that time added."""
    A, B = weights(3 * 2, p, seed=1), weights(q, 2 * 3, seed=2)
    settings = {"target_parameters": ["experts.down_proj"], "peft_version": version}
    tensors = {"l.0.experts.lora_A.weight": A, "l.0.experts.lora_B.weight": B}
    adapter = save_adapter(tmp_path / "a", tensors, **settings)
    by_expert = torch.einsum("ore,eri->eio", B.reshape(q, 2, 3), A.reshape(3, 2, p))
    return adapter, 2 * by_expert.double()


@pytest.mark.parametrize("version", ["0.18.1", "0.19.0", None])
@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (8, 8)], ids=str)
@pytest.mark.parametrize("width", [None, 8])
def test_the_convention_before_0_19_1(version, shape, width, tmp_path):
    W0 = weights(3, *shape)
    base = save(tmp_path / "base/model.safetensors", {"l.0.experts.down_proj": W0})
    if width:
        (tmp_path / "base/config.json").write_text(json.dumps({"hidden_size": width}))
    adapter, update = old_adapter(tmp_path, *shape, version)
    for e, comparison in some(enumerate(make_plan(base, adapter, Recipe()).comparisons)):
        # down_proj comes out in the model's width
        assert comparison.transposed == (width is not None and shape == (6, 8))
        W = load(comparison, CPU).tuned_map(torch.float64).to_dense()
        expected = (W0.double() + update)[e]
        expected = expected.mT if comparison.transposed else expected
        torch.testing.assert_close(W, expected, rtol=1e-6, atol=1e-6)


def test_peft_0_19_0_took_a_stack_that_a_model_calls_transposed_for_out_in(tmp_path):
    """Of square experts no shape says it."""
    W0 = weights(3, 8, 8)
    base = save(tmp_path / "base/model.safetensors", {"l.0.experts.down_proj": W0})
    (tmp_path / "base/config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    adapter, update = old_adapter(tmp_path, 8, 8, "0.19.0")
    for e, comparison in some(enumerate(make_plan(base, adapter, Recipe()).comparisons)):
        W = load(comparison, CPU).tuned_map(torch.float64).to_dense()
        expected = W0[e].double() + update[e].mT  # of gpt_oss PEFT added B·A as it is stored
        expected = expected.mT if comparison.transposed else expected
        torch.testing.assert_close(W, expected, rtol=1e-6, atol=1e-6)


# ---- adapters and checkpoints of one expert at a time


def rounded(tmp_path, experts_stacked):
    """A base in the other layout than the tuned side: {name: tensor} of both."""
    one_by_one = {}
    stacked = {"m.0.mlp.experts.gate_up_proj": [], "m.0.mlp.experts.down_proj": []}
    for e in range(3):
        w1, w2, w3 = weights(8, 6, seed=e), weights(6, 8, seed=e + 9), weights(8, 6, seed=e + 20)
        prefix = f"m.0.block_sparse_moe.experts.{e}"
        one_by_one |= {f"{prefix}.{i}.weight": w for i, w in (("w1", w1), ("w2", w2), ("w3", w3))}
        stacked["m.0.mlp.experts.gate_up_proj"].append(torch.cat([w1, w3]))
        stacked["m.0.mlp.experts.down_proj"].append(w2)
    stacked = {name: torch.stack(experts) for name, experts in stacked.items()}
    both = [one_by_one, stacked]
    return both[experts_stacked], both[not experts_stacked]


@pytest.mark.parametrize("experts_stacked", [False, True])
def test_a_full_fine_tune_in_the_other_layout(experts_stacked, tmp_path):
    base, same = rounded(tmp_path, experts_stacked)
    changed = {name: W + 1 for name, W in same.items()}
    other = save(tmp_path / "tuned.safetensors", changed | {"m.0.q.weight": weights(4, 4)})
    base = save(tmp_path / "base.safetensors", base | {"m.0.q.weight": weights(4, 4, seed=1)})
    plan = make_plan(base, other, Recipe())
    assert plan.skipped == ()
    assert len(plan.comparisons) == 3 * 3 + 1
    for comparison in some(plan.comparisons):
        pair = load(comparison, CPU)
        if "experts" in comparison.base.name:
            torch.testing.assert_close(pair.replaced, pair.base + 1)


def test_an_adapter_of_one_expert_at_a_time_for_a_stacked_base(tmp_path):
    _, stacked = rounded(tmp_path, False)
    base = save(tmp_path / "base.safetensors", stacked)
    A, B = weights(2, 6), weights(8, 2)
    prefix = "m.0.block_sparse_moe.experts.2.w3"
    tensors = {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}
    (comparison,) = make_plan(base, save_adapter(tmp_path / "a", tensors), Recipe()).comparisons
    assert comparison.base.name == "m.0.mlp.experts.gate_up_proj[2, 8:16]"
    pair = load(comparison, CPU)
    assert torch.equal(pair.base, stacked["m.0.mlp.experts.gate_up_proj"][2, 8:])
    torch.testing.assert_close(pair.low_rank.to_dense(), 2 * (B @ A).double())


def test_an_expert_that_the_base_lacks(tmp_path):
    _, stacked = rounded(tmp_path, False)
    base = save(tmp_path / "base.safetensors", stacked)
    tensors = {}
    for e in (1, 7):
        prefix = f"m.0.mlp.experts.{e}.down_proj"
        tensors[f"{prefix}.lora_A.weight"] = weights(2, 8)
        tensors[f"{prefix}.lora_B.weight"] = weights(6, 2)
    plan = make_plan(base, save_adapter(tmp_path / "a", tensors), Recipe())
    assert [c.base.name for c in plan.comparisons] == ["m.0.mlp.experts.down_proj[1]"]
    assert [row.lost for row in plan.skipped] == [True, True]


# ---- what cannot be told is lost, with the reason


def refused(tmp_path, base, tensors, **config):
    base = save(tmp_path / "base.safetensors", base | {"q.weight": weights(4, 4)})
    q = {"q.lora_A.weight": weights(2, 4), "q.lora_B.weight": weights(4, 2)}
    plan = make_plan(base, save_adapter(tmp_path / "a", tensors | q, **config), Recipe())
    assert [c.base.name for c in plan.comparisons] == ["q.weight"]
    assert {row.name for row in plan.skipped} == set(tensors)
    assert all(row.lost for row in plan.skipped)
    (reason,) = {row.reason for row in plan.skipped}
    return reason


def stack_keys(module, p, q, r=2, experts=3):
    return {
        f"{module}.lora_A.weight": weights(experts * r, p),
        f"{module}.lora_B.weight": weights(q, r * experts),
    }


def test_which_parameter_is_in_doubt(tmp_path):
    base = {"experts.left": weights(3, 4, 4), "experts.right": weights(3, 4, 4)}
    tensors = stack_keys("experts", 4, 4) | stack_keys("experts.base_layer", 4, 4)
    config = {"target_parameters": ["experts.left", "experts.right"]}
    reason = refused(tmp_path, base, tensors, **config)
    assert "do not show which parameter they update: left (3, 4, 4), right (3, 4, 4)" in reason
    lonely = stack_keys("experts", 4, 4)
    assert "1 pairs of factors for 2 parameters" in refused(tmp_path, base, lonely, **config)


def test_no_parameter_of_that_name(tmp_path):
    tensors = stack_keys("experts", 4, 4) | stack_keys("experts.base_layer", 4, 4)
    config = {"target_parameters": ["experts.left", "experts.right"]}
    reason = refused(tmp_path, {}, tensors, **config)
    assert reason == "no counterpart in the base (nearest: none is similar)"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (stack_keys("experts", 5, 4), "do not show which parameter"),
        (stack_keys("experts", 4, 4, experts=4), "do not show which parameter"),
        (stack_keys("experts", 4, 4, r=3), "rank 3 an expert, another one is configured"),
        ({k: v.to(torch.int8) for k, v in stack_keys("experts", 4, 4).items()}, "I8 tensor"),
        ({"experts.lora_A.weight": weights(6, 4)}, "do not show which parameter"),
    ],
)
def test_factors_that_do_not_fit(tensors, message, tmp_path):
    base = {"experts.down_proj": weights(3, 4, 4)}
    found = refused(tmp_path, base, tensors, target_parameters=["experts.down_proj"])
    assert message in found


def test_three_dimensions_that_are_no_experts(tmp_path):
    both = {"pos_embed": weights(1, 5, 4), "q.weight": weights(4, 4)}
    both["mixer.weight"] = weights(2, 3, 256)  # longer than any kernel
    base = save(tmp_path / "base.safetensors", both)
    plan = make_plan(base, save(tmp_path / "equal.safetensors", both), Recipe())
    assert {(row.name, row.reason, row.lost) for row in plan.skipped} == {
        (name, "equal on both sides: a parameter that is no layer", False)
        for name in ("pos_embed", "mixer.weight")
    }
    changed = {name: tensor + (tensor.ndim == 3) for name, tensor in both.items()}
    both["table"] = both.pop("pos_embed")
    base = save(tmp_path / "base.safetensors", both)
    changed["table"] = changed.pop("pos_embed")
    plan = make_plan(base, save(tmp_path / "tuned.safetensors", changed), Recipe())
    assert {(row.name, row.reason, row.lost) for row in plan.skipped} == {
        (name, "3-D tensor: neither a kernel nor a stack of experts by name", True)
        for name in ("table", "mixer.weight")
    }


def test_biases_of_experts_are_no_weights(tmp_path):
    both = {"experts.down_proj_bias": weights(3, 4), "q.weight": weights(4, 4)}
    base = save(tmp_path / "base.safetensors", both)
    plan = make_plan(base, save(tmp_path / "tuned.safetensors", both), Recipe())
    assert [(r.reason, r.lost) for r in plan.skipped] == [("a bias or scales: not a weight", False)]


@pytest.mark.parametrize("shape", [(2, 4, 6), (4, 4, 6), (3, 24)], ids=str)
def test_other_numbers_of_experts(shape, tmp_path):
    base = save(tmp_path / "base.safetensors", {"experts.down_proj": weights(3, 4, 6)})
    tuned = save(tmp_path / "tuned.safetensors", {"experts.down_proj": weights(*shape)})
    message = rf"has shape \({', '.join(map(str, shape))}\), expected \(3, 4, 6\) of 'experts.down"
    with pytest.raises(CheckpointError, match=message):
        make_plan(base, tuned, Recipe())
