"""Protected fine-tunes of every stored form, against the dense computation and stock PEFT."""

import copy
import io
import json
import warnings
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

import bulkedge
from bulkedge import InputError
from bulkedge.moments import Moments, to_dense
from bulkedge.repairing import Protect, Rescale
from bulkedge.repairing.solve import RIDGE
from bulkedge.report import print_repair
from helpers import save, save_adapter, some

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers

RECIPE = {"top_k": 1}
pytestmark = pytest.mark.filterwarnings("ignore")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments_of(model, *inputs):
    with Moments(model) as found, torch.no_grad():
        for x in inputs:
            model(x)
    return found


def dense(update, base, task, strength=1.0):
    """``ΔW C_t (C_t + λ C_b)⁻¹`` by a plain inverse, straight from the formula."""
    both = []
    for moment in (base, task):
        C = to_dense(moment).double()
        both.append(C * len(C) / C.trace() + RIDGE * torch.eye(len(C), dtype=C.dtype))
    C_b, C_t = both
    return update.double() @ C_t @ torch.linalg.inv(C_t + strength * C_b)


def exchange(W0, base, task):
    """The price of relative drift in relative loss on the task, from their definition."""
    outputs = [
        torch.trace(W0 @ C @ W0.mT) * len(C) / C.trace()
        for C in (to_dense(base).double(), to_dense(task).double())
    ]
    return float(outputs[1] / outputs[0])


def llama(**changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False,
    } | changes  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=16, tie_word_embeddings=False
    )
    return transformers.GPT2LMHeadModel(config).eval()


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, (3, 2)))

    def forward(self, x):
        return self.body(x)


def ids(seed):
    return torch.randint(0, 30, (24, 8), generator=torch.Generator().manual_seed(seed))


def images(seed):
    return draw(6, 3, 7, 7, seed=seed)


FORMS = {
    "linear": (llama, ids, ["q_proj", "k_proj", "up_proj", "down_proj"]),
    "embedding": (llama, ids, ["embed_tokens", "q_proj"]),
    "Conv1D": (gpt2, ids, ["c_attn", "c_fc"]),
    "Conv2d": (Convolutions, images, ["body.0", "body.2"]),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_stock_peft_merges_and_serves_what_the_dense_computation_gives(form, tmp_path):
    make, inputs, targets = FORMS[form]
    plain = make()
    save(tmp_path / "base/model.safetensors", plain.state_dict())
    tuned = peft.get_peft_model(
        make(), peft.LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=targets)
    )
    tuned.save_pretrained(tmp_path / "tuned")
    base, task = moments_of(plain, inputs(1)), moments_of(tuned.eval(), inputs(2))
    record = bulkedge.repair(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "out",
        method=Protect(base, task, 1.0, balance="drift"), recipe=RECIPE,
    )  # fmt: skip
    assert {row.status for row in some(record.matrices)} == {"repaired"}
    before, after = (
        peft.PeftModel.from_pretrained(make(), tmp_path / name).double().merge_and_unload()
        for name in ("tuned", "out")
    )
    state, W0 = before.state_dict(), make().double().state_dict()
    for row in some(record.matrices):
        layer = row.name.removesuffix(".weight")
        update = (state[row.name] - W0[row.name]).flatten(1)
        turned = form == "Conv1D" or base[layer].moment.ndim == 1
        start = W0[row.name].flatten(1)
        rate = exchange(start.mT if turned else start, base[layer].moment, task[layer].moment)
        assert row.strength == pytest.approx(rate, rel=1e-5)
        new = dense(update.mT if turned else update, base[layer].moment, task[layer].moment, rate)
        expected = W0[row.name] + (new.mT if turned else new).reshape(W0[row.name].shape)
        found = after.state_dict()[row.name]
        assert (found - expected).norm() <= 1e-6 * (expected - W0[row.name]).norm()
        state[row.name] = expected
        assert row.drift_after < row.drift_before
    before.load_state_dict(state)
    served = peft.PeftModel.from_pretrained(make(), tmp_path / "out").double().eval()
    x = inputs(3) if form != "Conv2d" else inputs(3).double()
    with torch.no_grad():
        wanted, found = (model(x) for model in (before, served))
    wanted, found = (y if isinstance(y, torch.Tensor) else y.logits for y in (wanted, found))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


def test_stacked_experts_of_an_adapter_are_refused_by_name(tmp_path):
    model = nn.Sequential(OrderedDict(up=nn.Linear(6, 8, bias=False)))
    weights = {"up.weight": model.up.weight.detach(), "mlp.experts.down_proj": draw(3, 8, 6)}
    base = save(tmp_path / "base.safetensors", weights)
    tensors = {
        "base_model.model.mlp.experts.lora_A.weight": draw(6, 6),
        "base_model.model.mlp.experts.lora_B.weight": draw(8, 6, seed=1),
        "base_model.model.up.lora_A.weight": draw(2, 6),
        "base_model.model.up.lora_B.weight": draw(8, 2, seed=1),
    }
    config = {"target_parameters": ["experts.down_proj"], "peft_version": "0.21.2"}
    tuned = save_adapter(tmp_path / "a", tensors, **config)
    method = Protect(moments_of(model, draw(50, 6)))
    record = bulkedge.repair(base, tuned, None, method=method, recipe=RECIPE)
    notes = [row.note for row in record.matrices if "experts" in row.name]
    assert len(notes) == 3
    assert set(notes) == {"experts: the tokens of each are not measured separately"}
    assert [row.status for row in record.matrices if row.name == "up.weight"] == ["repaired"]


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix = nn.Embedding(30, 16), nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 30, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, x):
        return self.lm_head(torch.relu(self.mix(self.embed(x))))


def stored(model):
    return {name: W for name, W in model.state_dict().items() if name != "lm_head.weight"}


def test_a_tensor_that_two_layers_share_is_refused(tmp_path):
    model = Tied()
    base = save(tmp_path / "base.safetensors", stored(model))
    changed = {name: W + 0.1 * draw(*W.shape, seed=5) for name, W in stored(model).items()}
    tuned = save(tmp_path / "tuned.safetensors", changed)
    method = Protect(moments_of(model, ids(1)))
    record = bulkedge.repair(base, tuned, tmp_path / "out", method=method, recipe=RECIPE)
    rows = {row.name: row for row in record.matrices}
    assert rows["mix.weight"].status == "repaired"
    assert rows["embed.weight"].note == (
        "embed and lm_head share this tensor and have different inputs; it is left as it is"
    )
    out = load_file(tmp_path / "out/tuned.safetensors")
    assert torch.equal(out["embed.weight"], changed["embed.weight"])


def test_an_adapter_of_a_tied_embedding_acts_on_the_embedding_alone(tmp_path):
    model = Tied()
    base = save(tmp_path / "base.safetensors", stored(model))
    factors = {
        "base_model.model.embed.lora_embedding_A": draw(2, 30),
        "base_model.model.embed.lora_embedding_B": draw(16, 2, seed=1),
    }
    tuned = save_adapter(tmp_path / "a", factors)
    method = Protect(moments_of(model, ids(1)))
    (row,) = bulkedge.repair(base, tuned, None, method=method, recipe=RECIPE).matrices
    assert row.status == "repaired"


def test_an_adapter_of_a_tied_output_layer_has_factors_and_an_alpha_of_its_own(tmp_path):
    plain = llama(tie_word_embeddings=True)
    plain.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        r=2, lora_alpha=6, init_lora_weights=False, target_modules=["lm_head", "q_proj"]
    )
    tuned = peft.get_peft_model(llama(tie_word_embeddings=True), settings)
    tuned.save_pretrained(tmp_path / "tuned")
    base, task = moments_of(plain, ids(1)), moments_of(tuned.eval(), ids(2))
    made = {}
    for name, method in (("p", Protect(base, task, balance="layer")), ("r", Rescale(uniform=0.5))):
        record = bulkedge.repair(
            tmp_path / "base", tmp_path / "tuned", tmp_path / name, method=method, recipe=RECIPE
        )
        assert {row.status for row in some(record.matrices)} == {"repaired"}
        model = peft.PeftModel.from_pretrained(
            llama(tie_word_embeddings=True), tmp_path / name
        ).base_model.model.lm_head
        made[name] = model.get_delta_weight("default").double()
    update = tuned.base_model.model.lm_head.get_delta_weight("default").double()
    expected = dense(update, base["lm_head"].moment, task["lm_head"].moment)
    assert (made["p"] - expected).norm() <= 1e-5 * expected.norm()
    torch.testing.assert_close(made["r"], 0.5 * update)


def test_two_tensors_of_equal_numbers_are_two(tmp_path):
    """Two layers that began as one, each stored for itself, with inputs of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(up=nn.Linear(8, 8), act=nn.ReLU(), down=nn.Linear(8, 8)))
    model.down.load_state_dict(model.up.state_dict())
    state = model.state_dict()
    base = save(tmp_path / "base.safetensors", state)
    changed = {name: W + 0.1 * draw(*W.shape, seed=5) for name, W in state.items()}
    tuned = save(tmp_path / "tuned.safetensors", changed)
    method = Protect(moments_of(model, draw(40, 8)))
    record = bulkedge.repair(base, tuned, None, method=method, recipe=RECIPE)
    assert [row.status for row in record.matrices] == ["repaired"] * 2


def test_a_strength_that_overflows_is_told(tmp_path):
    base, moments = layer(tmp_path, draw(10, 8), draw(60, 8))
    tuned = factors(tmp_path, draw(2, 8), draw(10, 2, seed=1))
    weak = Moments()  # in the other units the strength is a million times as large
    weak._known = {"up": replace(moments["up"], moment=1e-6 * moments["up"].moment)}
    for forms, found in (((moments,), "1e+308"), ((moments.sketched(3), weak), "inf")):
        method = Protect(*forms, strength=1e308)
        (row,) = bulkedge.repair(base, tuned, None, method=method, recipe=RECIPE).matrices
        assert f"expected a strength of at most 1e+100 in a layer, got {found}" in row.note


def test_a_sharded_checkpoint_is_written_shard_by_shard(tmp_path):
    names = ("up.weight", "down.weight")
    torch.manual_seed(0)
    layers = OrderedDict(up=nn.Linear(12, 20), act=nn.ReLU(), down=nn.Linear(20, 12))
    model = nn.Sequential(layers)
    base = save(tmp_path / "base.safetensors", model.state_dict())
    weights = {n: W + 0.05 * draw(*W.shape, seed=3) for n, W in model.state_dict().items()}
    files = {"up.weight": "a.safetensors", "down.weight": "b.safetensors"}
    for name, file in files.items():
        bias = name.replace("weight", "bias")
        save(tmp_path / "tuned" / file, {name: weights[name], bias: weights[bias]})
        files = files | {bias: file}
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (tmp_path / "tuned/model.safetensors.index.json").write_text(json.dumps(index))
    base_moments = moments_of(model, draw(60, 12))
    changed = copy.deepcopy(model)
    changed.load_state_dict(weights)
    task = moments_of(changed, draw(60, 12, seed=1))
    method = Protect(base_moments, task, 2.0)  # one λ for moments as they are, not scaled
    bulkedge.repair(base, tmp_path / "tuned", tmp_path / "out", method=method, recipe=RECIPE)
    for name in names:
        W0, W = (state[name].double() for state in (model.state_dict(), weights))
        layers = [m[name.removesuffix(".weight")] for m in (base_moments, task)]
        C_b, C_t = (x.moment + RIDGE * torch.eye(len(x.moment)) * x.moment.trace() / len(x.moment)
                    for x in layers)  # fmt: skip
        expected = W0 + (W - W0) @ C_t @ torch.linalg.inv(C_t + 2.0 * C_b)
        found = load_file(tmp_path / "out" / files[name])[name]
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)


def layer(tmp_path, weight, seen):
    """A base of one layer, and moments of what it was run on."""
    model = nn.Sequential(OrderedDict(up=nn.Linear(*weight.shape[::-1], bias=False)))
    model.up.weight.data = weight.float()
    return save(tmp_path / "base.safetensors", {"up.weight": weight}), moments_of(model, seen)


def factors(tmp_path, A, B, **config):
    return save_adapter(tmp_path / "a", {"up.lora_A.weight": A, "up.lora_B.weight": B}, **config)


@pytest.mark.parametrize("full", [False, True])
def test_numbers_beyond_half_precision_are_refused(full, tmp_path):
    """What is removed along one direction can be added to an entry: 60,000 becomes 80,000."""
    v = torch.tensor([[-1.0, 1, 1, 0, 0, 0, 0, 0]])
    base, moments = layer(tmp_path, draw(4, 8).half(), draw(60, 1) * v)
    if full:
        tuned = save(tmp_path / "a/t.safetensors", {"up.weight": 6e4 * torch.ones(4, 8).half()})
    else:
        tuned = factors(tmp_path, 6e4 * torch.ones(2, 8).half(), 1e-4 * draw(4, 2).half())
    method = Protect(moments, strength=10.0, ridge=1e-3)
    record = bulkedge.repair(base, tuned, tmp_path / "out", method=method, recipe=RECIPE)
    assert "protected numbers exceed the range of its dtype" in record.matrices[0].note
    assert not (tmp_path / "out").exists()


def test_an_update_of_zeros_is_left(tmp_path):
    base, moments = layer(tmp_path, draw(10, 8), draw(60, 8))
    tuned = factors(tmp_path, draw(2, 8), torch.zeros(10, 2))
    record = bulkedge.repair(base, tuned, tmp_path / "out", method=Protect(moments), recipe=RECIPE)
    assert [row.status for row in record.matrices] in ([], ["left"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_drift_can_be_aimed_for(dtype, tmp_path):
    """As the record measures it after rounding, to one part in a hundred."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(up=nn.Linear(16, 24), act=nn.ReLU(), down=nn.Linear(24, 16)))
    base = save(tmp_path / "base.safetensors", model.state_dict())
    tensors = {
        "up.lora_A.weight": draw(2, 16), "up.lora_B.weight": draw(24, 2, seed=1),
        "down.lora_A.weight": draw(2, 24, seed=2), "down.lora_B.weight": draw(16, 2, seed=3),
    }  # fmt: skip
    tuned = save_adapter(tmp_path / "a", {n: t.to(dtype) for n, t in tensors.items()})
    moments = moments_of(model, draw(40, 16)), moments_of(model, draw(40, 16, seed=1))
    start = mean_drift(base, tuned, Protect(*moments), "drift_before")
    for share, of_base in ((0.9, moments[0]), (0.02, moments[0]), (0.1, moments[0].sketched(5))):
        method = Protect(of_base, moments[1], target_drift=share * start)
        found = mean_drift(base, tuned, method, "drift_after")
        assert found == pytest.approx(share * start, rel=1e-2)
    for target in (1.01 * start, 1e-30):
        method = Protect(*moments, target_drift=target)
        with pytest.raises(InputError, match="expected a target drift between"):
            bulkedge.repair(base, tuned, tmp_path / "out", method=method, recipe=RECIPE)
        assert not (tmp_path / "out").exists()


def test_a_layer_that_is_refused_does_not_stop_the_search_for_a_drift(tmp_path):
    model = nn.Sequential(OrderedDict(up=nn.Linear(8, 8, bias=False), down=nn.Linear(8, 8)))
    base = save(tmp_path / "base.safetensors", model.state_dict())
    tensors = {
        "up.lora_A.weight": draw(2, 8), "up.lora_B.weight": draw(8, 2, seed=1),
        "down.lora_A.weight": draw(2, 8), "down.lora_B.weight": draw(8, 2, seed=1),
    }  # fmt: skip
    tuned = save_adapter(tmp_path / "a", tensors)
    found = moments_of(model, draw(40, 8))
    moments = Moments()
    moments._known = {"up": found["up"], "down": replace(found["down"], moment=torch.zeros(8, 8))}
    method = Protect(moments, target_drift=0.01)
    record = bulkedge.repair(base, tuned, None, method=method, recipe=RECIPE)
    rows = {row.name: row for row in record.matrices}
    assert rows["up.weight"].drift_after == pytest.approx(0.01, rel=1e-2)
    assert "expected inputs that are not all zero" in rows["down.weight"].note


def mean_drift(base, tuned, method, which):
    """Over the layers of the record."""
    rows = some(bulkedge.repair(base, tuned, None, method=method, recipe=RECIPE).matrices)
    return sum(getattr(row, which) for row in rows) / len(rows)


def test_moments_of_fewer_inputs_than_ranks_are_refused(tmp_path):
    base, moments = layer(tmp_path, draw(10, 8), draw(3, 8))
    tuned = factors(tmp_path, draw(4, 8), draw(10, 4, seed=1), r=4)
    (row,) = bulkedge.repair(base, tuned, None, method=Protect(moments), recipe=RECIPE).matrices
    assert row.note == (
        "the base moments have 3 inputs, fewer than the rank 4 that the update may have; "
        "measure more texts"
    )


def test_moments_of_fewer_inputs_than_their_width_are_told(tmp_path):
    base, moments = layer(tmp_path, draw(10, 8), draw(5, 8))
    tuned = factors(tmp_path, draw(4, 8), draw(10, 4, seed=1), r=4)
    record = bulkedge.repair(base, tuned, None, method=Protect(moments), recipe=RECIPE)
    (row,) = record.matrices
    assert row.status == "repaired"
    assert "5 inputs for a width of 8: the ridge decides in the remaining" in row.note
    told = io.StringIO()
    print_repair(record, Console(file=told))
    assert f"in doubt: up.weight: {row.note}" in told.getvalue()
