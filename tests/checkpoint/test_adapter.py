"""Adapters as stock PEFT writes them, with PEFT's own merge as the judge of what they mean."""

import json
import os
import re
import warnings

import pytest
import safetensors
import torch

import bulkedge
from bulkedge import AdapterError, CheckpointError, NothingAuditedError, Recipe
from bulkedge.auditing.matrix import load
from bulkedge.checkpoint import is_adapter
from bulkedge.comparison import make_plan
from helpers import save, save_adapter, some, weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers

VOCAB = 40
CPU = torch.device("cpu")


def bert():
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=12,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=8
    )
    return transformers.GPT2LMHeadModel(config)


def untied_gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=8, tie_word_embeddings=False
    )
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


CASES = {
    "plain": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "rslora": (llama, {"target_modules": ["q_proj"], "use_rslora": True, "r": 9}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 3, r".*\.v_proj": 2},
            "alpha_pattern": {"q_proj": 5, r"layers\.1\.self_attn\.(k|v)_proj": 11},
        },
    ),
    "patterns_rslora": (
        llama,
        {"target_modules": "all-linear", "rank_pattern": {"up_proj": 6}, "use_rslora": True},
    ),
    "head_and_prefix": (bert, {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    "saved_modules": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "embedding": (gpt2, {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}),
    "embedding_llama": (llama, {"target_modules": ["embed_tokens", "v_proj"]}),
    "bias": (bert, {"target_modules": ["query"], "bias": "lora_only"}),
}


def tuned_weight(pair):
    return pair.tuned_map(torch.float64).to_dense()


def trained(make, config):
    """A PEFT model with random factors, and random values in its trained full tensors."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"r": 4, "lora_alpha": 12, "init_lora_weights": False} | config
        model = peft.get_peft_model(make(), peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    return model


def saved(tmp_path, make, config, *, body_only=False, shard="50GB"):
    """Base and adapter folders, and the weights of the merged model by name."""
    model = trained(make, config)
    base = make()
    base.load_state_dict(
        {
            name.replace(".base_layer", "").replace(".original_module", ""): tensor
            for name, tensor in model.get_base_model().state_dict().items()
            if "lora_" not in name and "modules_to_save" not in name
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (base.base_model if body_only else base).save_pretrained(
            tmp_path / "base", max_shard_size=shard
        )
        model.save_pretrained(tmp_path / "adapter")
        merged = model.merge_and_unload().state_dict()
    return tmp_path / "base", tmp_path / "adapter", merged


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["whole", "body_only", "sharded"])
def test_tuned_weights_are_those_that_peft_merges(case, layout, tmp_path):
    make, config = CASES[case]
    base, adapter, merged = saved(
        tmp_path,
        make,
        config,
        body_only=layout == "body_only",
        shard="4KB" if layout == "sharded" else "50GB",
    )
    plan = make_plan(base, adapter, Recipe())
    assert (len(plan.base.files) > 1) == (layout == "sharded")
    assert plan.comparisons
    for comparison in some(plan.comparisons):
        pair = load(comparison, CPU)
        W = tuned_weight(pair)
        stored = merged[comparison.tuned_name].double()
        expected = stored.mT if comparison.transposed else stored
        torch.testing.assert_close(W, expected, rtol=1e-5, atol=1e-5)
        assert (W - pair.base).abs().max() > 0.1

    # nothing is lost: every key in the file is compared, or named with a reason
    with safetensors.safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        keys = set(file.keys())
    used = set()
    for comparison in plan.comparisons:
        factors = comparison.factors
        used |= {info.name for info in (factors.A, factors.B)} if factors else set()
        used |= {comparison.tuned.info.name} if comparison.tuned else set()
    assert keys - used == {row.name for row in plan.skipped}


def test_conv1d_is_judged_as_the_layer_acts(tmp_path):
    base, adapter, _ = saved(tmp_path, *CASES["conv1d"])
    plan = make_plan(base, adapter, Recipe())
    assert all(comparison.transposed for comparison in plan.comparisons)
    square = next(c for c in plan.comparisons if c.base.name.endswith("attn.c_proj.weight"))
    pair = load(square, CPU)
    B = pair.factors.B
    left = torch.linalg.qr(tuned_weight(pair) - pair.base).Q[:, :4]
    torch.testing.assert_close(left @ left.T @ B, B)  # left vectors lie on the output side


@pytest.mark.parametrize("targets", [r".*attn\.c_proj|lm_head", r".*c_attn|lm_head", r".*c_fc"])
@pytest.mark.parametrize("flag", [True, False])
def test_the_flag_of_the_last_layer_is_not_that_of_all(targets, flag, tmp_path):
    """PEFT stores fan_in_fan_out once, as the layer it wrapped last had it."""
    config = {"target_modules": targets}
    base, adapter, merged = saved(tmp_path, untied_gpt2, config)
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {"fan_in_fan_out": flag}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    for named in (base, base / "model.safetensors"):
        for comparison in some(make_plan(named, adapter, Recipe()).comparisons):
            stored = merged[comparison.tuned_name].double()
            expected = stored.mT if comparison.transposed else stored
            W = tuned_weight(load(comparison, CPU))
            torch.testing.assert_close(W, expected, rtol=1e-5, atol=1e-5)
            assert comparison.transposed == ("lm_head" not in comparison.tuned_name)


def test_without_a_model_type_the_flag_decides_on_a_square_weight(tmp_path):
    base, adapter, _ = saved(tmp_path, *CASES["conv1d"])
    (base / "config.json").unlink()
    plan = make_plan(base, adapter, Recipe())
    assert all(comparison.transposed for comparison in plan.comparisons)


def test_full_gpt2_checkpoints_are_judged_the_same_way(tmp_path):
    base, adapter, merged = saved(tmp_path, *CASES["conv1d"])
    model = gpt2()
    model.load_state_dict(merged)
    model.save_pretrained(tmp_path / "merged")
    plans = [make_plan(base, tuned, Recipe()) for tuned in (adapter, tmp_path / "merged")]
    by_name = {c.base.name: c.transposed for c in plans[1].comparisons}
    assert all(by_name[c.base.name] == c.transposed for c in plans[0].comparisons)
    assert not by_name["transformer.wte.weight"]


# ---- adapters written by hand: what PEFT would not write, and what others do

BASE = {"layers.0.q.weight": weights(6, 6), "layers.1.q.weight": weights(6, 6, seed=1)}
A, B = weights(2, 6), weights(6, 2)


def keys(module="layers.0.q", prefix="base_model.model.", infix=""):
    return {
        f"{prefix}{module}.lora_A{infix}.weight": A,
        f"{prefix}{module}.lora_B{infix}.weight": B,
    }


@pytest.fixture
def base(tmp_path):
    return save(tmp_path / "base.safetensors", BASE)


def update(comparison):
    return load(comparison, CPU).factors.to_dense()


@pytest.mark.parametrize(
    "tensors",
    [
        keys(infix=".default"),
        keys(prefix="base_model.model.module."),
        keys(prefix="base_model.model._orig_mod."),
        keys(prefix=""),
        keys("layers.0._fsdp_wrapped_module.q"),
        keys("model.layers.0.q"),
    ],
    ids=["default", "ddp", "compiled", "bare", "fsdp", "prefix"],
)
def test_noise_in_the_keys(tensors, base, tmp_path):
    plan = make_plan(base, save_adapter(tmp_path / "a", tensors), Recipe())
    (comparison,) = plan.comparisons
    assert comparison.base.name == "layers.0.q.weight"
    torch.testing.assert_close(update(comparison), 2.0 * B.double() @ A.double())


def test_factors_of_another_rank_than_the_config_says(base, tmp_path):
    folder = save_adapter(tmp_path / "a", keys(), r=64, lora_alpha=8)
    with pytest.raises(
        NothingAuditedError, match=r"rank 2 where .* says 64: their scale is in dou"
    ):
        make_plan(base, folder, Recipe())


def test_the_weights_file_stands_for_its_folder(base, tmp_path):
    folder = save_adapter(tmp_path / "a", keys())
    assert is_adapter(folder / "adapter_model.safetensors")
    assert len(make_plan(base, folder / "adapter_model.safetensors", Recipe()).comparisons) == 1


def test_a_replaced_base_layer_carries_the_update_on_top(base, tmp_path):
    new = weights(6, 6, seed=9)
    tensors = keys() | {"base_model.model.layers.0.q.base_layer.weight": new}
    (comparison,) = make_plan(base, save_adapter(tmp_path / "a", tensors), Recipe()).comparisons
    torch.testing.assert_close(
        tuned_weight(load(comparison, CPU)),
        new.double() + 2 * B.double() @ A.double(),
        rtol=1e-6,
        atol=1e-6,
    )


def test_a_stored_copy_of_the_base_is_no_update(base, tmp_path):
    copy = {"base_model.model.layers.0.q.base_layer.weight": BASE["layers.0.q.weight"]}
    new = {"base_model.model.layers.0.q.base_layer.weight": weights(6, 6, seed=9)}
    rows = [
        bulkedge.audit(base, save_adapter(tmp_path / name, keys() | tensors)).matrices[0]
        for name, tensors in {"copy": copy, "new": new}.items()
    ]
    assert [(row.update, row.rank) for row in rows] == [("lora", 2), ("dense", None)]
    assert rows[0].spectral_norm_update == pytest.approx(
        float(torch.linalg.matrix_norm(2 * B @ A, 2)), rel=1e-5
    )


def test_only_the_first_strangers_get_their_nearest(base, tmp_path):
    tensors = keys()
    for i in range(2, 12):
        tensors |= keys(f"layers.{i}.q")
    plan = make_plan(base, save_adapter(tmp_path / "a", tensors), Recipe())
    assert sum("nearest: 'layers." in row.reason for row in plan.skipped) == 10  # A and B of 5
    assert len(plan.skipped) == 20
    assert all(row.lost for row in plan.skipped)
    accepted = make_plan(base, tmp_path / "a", Recipe(include=("layers.0.*",)))
    assert not any(row.lost for row in accepted.skipped)


UNHANDLED = {
    "bias": ({"base_model.model.layers.0.q.lora_B.bias": weights(6)}, "1-D tensor"),
    "lonely": ({"base_model.model.layers.1.q.lora_A.weight": A}, "expected one pair of factors"),
    "misfit": (
        {
            "base_model.model.layers.1.q.lora_A.weight": A,
            "base_model.model.layers.1.q.lora_B.weight": weights(6, 3),
        },
        "do not fit together",
    ),
    "grouped_conv": (
        {
            "base_model.model.layers.1.q.lora_A.weight": weights(4, 6, 3, 3),
            "base_model.model.layers.1.q.lora_B.weight": weights(6, 2, 1, 1),
        },
        "do not fit together",
    ),
    "dora_or_not": (
        keys("layers.1.q") | {"base_model.model.layers.1.q.lora_magnitude_vector": weights(6)},
        "disagree on a magnitude: DoRA or not is in doubt",
    ),
    "zero3": (
        {
            "base_model.model.layers.1.q.lora_A.weight": torch.zeros(0),
            "base_model.model.layers.1.q.lora_B.weight": torch.zeros(0),
        },
        "zero_to_fp32",
    ),
    "integer": (
        {
            "base_model.model.layers.1.q.lora_A.weight": torch.zeros(2, 6, dtype=torch.int8),
            "base_model.model.layers.1.q.lora_B.weight": B,
        },
        "I8 tensor: not a floating-point weight",
    ),
    "tokens": (
        {"base_model.model.embed.token_adapter.trainable_tokens_delta": weights(2, 6)},
        "does not name as many different tokens",
    ),
    "elsewhere": (keys("layers.7.q"), r"no counterpart in the base \(nearest: 'layers"),
}


@pytest.mark.parametrize("case", UNHANDLED)
def test_what_is_not_handled_is_named_with_the_reason(case, base, tmp_path):
    tensors, reason = UNHANDLED[case]
    plan = make_plan(base, save_adapter(tmp_path / "a", keys() | tensors), Recipe())
    assert [c.base.name for c in plan.comparisons] == ["layers.0.q.weight"]
    assert {row.name for row in plan.skipped} == set(tensors)
    assert all(row.lost == (case != "bias") for row in plan.skipped)
    assert all(re.search(reason, row.reason) for row in plan.skipped)


BAD_CONFIGS = {
    "other_method": ({"peft_type": "C3A"}, "a 'C3A' adapter; it is not handled"),
    "no_type": ({"peft_type": None}, "peft_type: Input should be a valid string"),
    "rank": ({"r": "8"}, "r: Input should be a valid integer.*; save it again with PEFT"),
    "alpha": ({"lora_alpha": "NaN"}, "lora_alpha"),
    "text for rslora": ({"use_rslora": "false"}, "use_rslora: Input should be a valid boolean"),
    "text for dora": ({"use_dora": "false"}, "use_dora: Input should be a valid boolean"),
    "infinite": ({"lora_alpha": float("inf")}, "lora_alpha: Input should be a finite number"),
    "pattern": ({"alpha_pattern": {"(": 1}}, "pattern '.' cannot be matched"),
    "hanging": ({"alpha_pattern": {"(a|a|aa)+x": 1}}, "cannot be matched .*timed out"),
    "loftq": ({"init_lora_weights": "loftq"}, "changes the base weights too"),
    "kasa": (
        {"kasa_config": {"beta": 1}},
        "kasa_config is set: KaSA, .*; its update is not a matrix added to the base",
    ),
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
    "qalora": ({"use_qalora": True}, "use_qalora is set"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is set"),
    "alora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
    "arrow": ({"arrow_config": {"top_k": 1}}, "arrow_config is set"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_adapter_config(case, base, tmp_path, monkeypatch):
    config, message = BAD_CONFIGS[case]
    monkeypatch.setattr("bulkedge.checkpoint.patterns.MATCH_SECONDS", 0.05)
    folder = save_adapter(tmp_path / "a", keys("a" * 300), **config)
    with pytest.raises(AdapterError, match=message):
        make_plan(base, folder, Recipe())


def test_an_adapter_for_another_base(base, tmp_path):
    tensors = {
        "base_model.model.layers.0.q.lora_A.weight": weights(2, 9),
        "base_model.model.layers.0.q.lora_B.weight": weights(9, 2),
    }
    with pytest.raises(AdapterError, match=r"updates a weight of shape \(9, 9\), but 'layers.0.q"):
        make_plan(base, save_adapter(tmp_path / "a", tensors), Recipe())


def test_an_adapter_whose_keys_match_nothing(base, tmp_path):
    folder = save_adapter(tmp_path / "a", keys("transformer.h.0.attn"))
    with pytest.raises(AdapterError, match="none of its tensors has a counterpart"):
        make_plan(base, folder, Recipe())


def test_an_empty_adapter(base, tmp_path):
    with pytest.raises(NothingAuditedError, match="the tuned side is empty"):
        make_plan(base, save_adapter(tmp_path / "a", {}), Recipe())


def test_pickled_and_missing_weights(base, tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(AdapterError, match="no such file; save it again"):
        make_plan(base, folder, Recipe())
    (folder / "adapter_model.bin").touch()
    with pytest.raises(
        AdapterError,
        match=r"found 'adapter_model\.bin': it is a pickle.*'adapter_model\.safetensors'",
    ):
        make_plan(base, folder, Recipe())


def test_factors_without_their_config(base, tmp_path):
    path = save(tmp_path / "adapter_model.safetensors", keys())
    with pytest.raises(AdapterError, match=r"no adapter_config\.json beside them"):
        make_plan(base, path, Recipe())


def test_two_names_for_one_part(base, tmp_path):
    tensors = keys() | keys(infix=".default")
    with pytest.raises(AdapterError, match="are the same part 'lora_A'"):
        make_plan(base, save_adapter(tmp_path / "a", tensors), Recipe())


def test_two_layers_of_wrapping_for_one_weight(base, tmp_path):
    tensors = keys() | keys("layers.0.q.base_layer")
    with pytest.raises(AdapterError, match=r"are the same part 'layers\.0\.q\.weight'"):
        make_plan(base, save_adapter(tmp_path / "a", tensors), Recipe())


def test_trained_tensors_alone_tell_the_prefix(base, tmp_path):
    tensors = {f"base_model.model.bert.{name}": W + 1 for name, W in BASE.items()}
    plan = make_plan(base, save_adapter(tmp_path / "a", tensors), Recipe())
    assert [c.base.name for c in plan.comparisons] == list(BASE)


def pipe(path):
    os.mkfifo(path)


def dangling(path):
    path.symlink_to("nowhere")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [pipe, dangling, os.mkdir])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_what_is_no_file_is_not_taken_for_missing(name, make, base, tmp_path):
    """Else the full model beside the adapter would be audited in its place."""
    folder = save_adapter(tmp_path / "a", keys())
    save(folder / "model.safetensors", BASE)
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(CheckpointError, match=rf"a/{name}: cannot be read"):
        make_plan(base, folder, Recipe())


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_links_that_leave_the_adapter_are_refused(name, base, tmp_path):
    folder = save_adapter(tmp_path / "a", keys())
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="is a link that leaves"):
        make_plan(base, folder, Recipe())
