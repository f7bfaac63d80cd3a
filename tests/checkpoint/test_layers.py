"""Kinds of layers and of updates beyond the linear one, with PEFT's own merge as the judge."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bulkedge
from bulkedge import AdapterError, Recipe
from bulkedge.comparison import make_plan
from bulkedge.comparison.pair import load
from helpers import save, save_adapter, some, weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers

CPU = torch.device("cpu")


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(3, 6, 5)
        self.body = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Conv2d(8, 4, (3, 2)))
        self.point = nn.Conv2d(4, 6, 1)
        self.volume = nn.Conv3d(2, 3, 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 12)})
            for _ in range(2)
        )


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=8, tie_word_embeddings=False
    )
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def saved(tmp_path, make, **config):
    """Base and adapter as they are saved, and the weights after PEFT's merge."""
    torch.manual_seed(0)
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(model, transformers.PreTrainedModel):
            model.save_pretrained(tmp_path / "base")
        else:
            save(tmp_path / "base/model.safetensors", model.state_dict())
        settings = {"r": 3, "lora_alpha": 12, "init_lora_weights": False} | config
        tuned = peft.get_peft_model(model, peft.LoraConfig(**settings))
        for name, parameter in tuned.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        tuned.save_pretrained(tmp_path / "adapter")
        merged = tuned.merge_and_unload().state_dict()
    return tmp_path / "base", tmp_path / "adapter", merged


def check_all(base, adapter, merged):
    """Every key is compared, and every tuned matrix is the one that PEFT merges."""
    plan = make_plan(base, adapter, Recipe())
    assert plan.skipped == ()
    keys = set(load_file(adapter / "adapter_model.safetensors"))
    assert keys == {name for c in plan.comparisons for name in c.stored_names}
    for comparison in some(plan.comparisons):
        stored = merged[comparison.base.info.name].double().flatten(1)
        expected = stored.mT if comparison.transposed else stored
        pair = load(comparison, CPU)
        W, W0 = pair.tuned_map(torch.float64).to_dense(), pair.base.double()
        torch.testing.assert_close(W, expected, rtol=1e-5, atol=1e-5)
        update = pair.update_map(torch.float64).to_dense()
        torch.testing.assert_close(update, W - W0, rtol=1e-9, atol=1e-9)
        assert update.abs().max() > 0.1
        low_rank = pair.low_rank
        assert (low_rank is None) == (comparison.factors.magnitude is not None)
    return plan.comparisons


KERNELS = ["stem", "body.0", "body.1", "point", "volume"]


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions(dora, tmp_path):
    comparisons = check_all(*saved(tmp_path, Convolutions, target_modules=KERNELS, use_dora=dora))
    shapes = {c.base.name: c.base.shape for c in comparisons}
    assert shapes == {
        "stem.weight": (6, 15),
        "body.0.weight": (8, 54),
        "body.1.weight": (4, 48),
        "point.weight": (6, 4),
        "volume.weight": (3, 16),
    }
    record = bulkedge.audit(tmp_path / "base", tmp_path / "adapter", recipe={"top_k": 2})
    assert {m.name: m.shape for m in record.matrices} == shapes
    assert {m.status for m in record.matrices} == {"audited"}
    assert all(("DoRA" in (m.note or "")) == dora for m in record.matrices)


def test_full_kernels(tmp_path):
    model, tuned = Convolutions().state_dict(), Convolutions().state_dict()
    base = save(tmp_path / "base.safetensors", model)
    plan = make_plan(base, save(tmp_path / "tuned.safetensors", tuned), Recipe())
    assert len(plan.comparisons) == 5
    for comparison in some(plan.comparisons):
        pair = load(comparison, CPU)
        name = comparison.base.name
        assert torch.equal(pair.base, model[name].flatten(1))
        assert torch.equal(pair.replaced, tuned[name].flatten(1))


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (llama, ["q_proj", "down_proj", "embed_tokens"]),
        (gpt2, ["c_attn", "c_proj", "wte", "lm_head"]),
    ],
    ids=["llama", "gpt2"],
)
def test_dora(make, targets, tmp_path):
    check_all(*saved(tmp_path, make, target_modules=targets, use_dora=True))


def test_dora_on_a_replaced_base(tmp_path):
    """PEFT stores the whole embedding, new tokens and all, beside its factors."""
    base, adapter, _ = saved(tmp_path, llama, target_modules=["q_proj"], use_dora=True)
    file = adapter / "adapter_model.safetensors"
    stored = load_file(file)
    new = weights(16, 16)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(stored | {f"{prefix}.base_layer.weight": new}, file)
    comparison = make_plan(base, adapter, Recipe()).comparisons[0]
    pair = load(comparison, CPU)
    A, B = (stored[f"{prefix}.lora_{x}.weight"].double() for x in "AB")
    W = new.double() + 4 * B @ A
    W *= (stored[f"{prefix}.lora_magnitude_vector"].double() / W.norm(dim=1))[:, None]
    torch.testing.assert_close(pair.tuned_map(torch.float64).to_dense(), W)
    expected = W - pair.base.double()
    torch.testing.assert_close(pair.update_map(torch.float64).to_dense(), expected)


def test_a_row_of_zeros_under_dora_is_not_finite(tmp_path):
    W0 = weights(6, 6)
    W0[2] = 0
    base = save(tmp_path / "base.safetensors", {"q.weight": W0})
    tensors = {
        "q.lora_A.weight": weights(2, 6),
        "q.lora_B.weight": torch.zeros(6, 2),
        "q.lora_magnitude_vector": W0.norm(dim=1),
    }
    record = bulkedge.audit(base, save_adapter(tmp_path / "a", tensors, use_dora=True))
    (row,) = record.matrices
    assert row.status == "not_finite"
    assert "magnitude over norm holds 1 NaN" in row.note


def test_a_magnitude_that_does_not_fit(tmp_path):
    base = save(tmp_path / "base.safetensors", {"q.weight": weights(6, 6), "p.weight": weights(6)})
    tensors = {
        "q.lora_A.weight": weights(2, 6),
        "q.lora_B.weight": weights(6, 2),
        "q.lora_magnitude_vector": weights(5),
    }
    adapter = save_adapter(tmp_path / "a", tensors, use_dora=True)
    with pytest.raises(bulkedge.NothingAuditedError, match=r"shape \(5,\) for 6 outputs"):
        make_plan(base, adapter, Recipe())


def test_multihead_attention(tmp_path):
    """PEFT adds the update of out_proj twice; the factors are what they are."""
    base, adapter, merged = saved(tmp_path, Attention, target_modules=["mha", "up"])
    W0 = load_file(base / "model.safetensors")
    for i in range(2):
        name = f"layers.{i}.mha.out_proj.weight"
        merged[name] = (merged[name] + W0[name]) / 2
    comparisons = check_all(base, adapter, merged)
    notes = {c.base.name: c.note for c in comparisons}
    assert len(notes) == 6
    for name, note in some(notes.items()):
        assert ("twice" in (note or "")) == name.endswith("out_proj.weight")
    assert "layers.1.mha.in_proj_weight" in notes


def test_a_kernel_of_another_size(tmp_path):
    base = save(tmp_path / "base.safetensors", {"conv.weight": weights(6, 4, 3, 3)})
    tensors = {"conv.lora_A.weight": weights(2, 4, 5, 5), "conv.lora_B.weight": weights(6, 2, 1, 1)}
    adapter = save_adapter(tmp_path / "a", tensors)
    with pytest.raises(AdapterError, match=r"shape \(6, 100\), but 'conv.weight' in .* \(6, 36\)"):
        make_plan(base, adapter, Recipe())


def test_a_bias_of_the_factors_is_no_loss(tmp_path):
    config = {"target_modules": ["q_proj"], "lora_bias": True}

    def biased():
        model = llama()
        model.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.zeros(16))
        return model

    base, adapter, merged = saved(tmp_path, biased, **config, layers_to_transform=[0])
    plan = make_plan(base, adapter, Recipe())
    assert [c.base.name for c in plan.comparisons] == ["model.layers.0.self_attn.q_proj.weight"]
    assert [(row.reason, row.lost) for row in plan.skipped] == [("1-D tensor: not a matrix", False)]
    W = load(plan.comparisons[0], CPU).tuned_map(torch.float64).to_dense()
    expected = merged[plan.comparisons[0].base.name].double()
    torch.testing.assert_close(W, expected, rtol=1e-5, atol=1e-5)
    assert json.loads((adapter / "adapter_config.json").read_text())["lora_bias"]
