"""Protected fine-tunes of every stored form, from files to files."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import bulkedge
from bulkedge import CheckpointError, InputError
from bulkedge.moments import Moments
from bulkedge.repairing import Protect
from bulkedge.repairing.solve import protected
from helpers import save, save_adapter, some

LAYER = partial(Protect, balance="layer")


class Net(nn.Module):
    """Two linear layers and an embedding."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(30, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, ids):
        return self.down(torch.relu(self.up(self.words(ids))))


def measured(model, seed, count=60):
    ids = torch.randint(0, 30, (count, 5), generator=torch.Generator().manual_seed(seed))
    with Moments(model) as moments, torch.no_grad():
        model(ids)
    return moments


@pytest.fixture
def base(tmp_path):
    model = Net()
    path = save(tmp_path / "base.safetensors", dict(model.state_dict()))
    return model, path


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter(folder, dtype=torch.float32, **config):
    tensors = {
        "base_model.model.up.lora_A.weight": draw(2, 16).to(dtype),
        "base_model.model.up.lora_B.weight": draw(24, 2, seed=1).to(dtype),
        "base_model.model.down.lora_A.weight": draw(2, 24, seed=2).to(dtype),
        "base_model.model.down.lora_B.weight": draw(16, 2, seed=3).to(dtype),
        "base_model.model.words.lora_embedding_A": draw(2, 30, seed=4).to(dtype),
        "base_model.model.words.lora_embedding_B": draw(16, 2, seed=5).to(dtype),
    }
    return save_adapter(folder, tensors, **config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_gets_new_factors_on_the_input_side_alone(base, tmp_path, dtype):
    model, path = base
    tuned, out = adapter(tmp_path / "a", dtype), tmp_path / "out"
    moments, task = measured(model, 1), measured(model, 2)
    record = bulkedge.repair(path, tuned, out, method=LAYER(moments, task, strength=1.0))
    before = load_file(tuned / "adapter_model.safetensors")
    after = load_file(out / "adapter_model.safetensors")
    assert (out / "adapter_config.json").read_bytes() == (
        tuned / "adapter_config.json"
    ).read_bytes()
    for name in some(before):
        assert after[name].dtype == dtype
        assert torch.equal(before[name], after[name]) is ("lora_B" in name or "embedding_B" in name)
    for layer in ("up", "down"):
        name = f"base_model.model.{layer}.lora_A.weight"
        C_b, C_t = moments[layer].moment, task[layer].moment
        expected = protected(before[name], C_b, C_t, 1.0).to(dtype)
        torch.testing.assert_close(after[name], expected)
        B = before[name.replace("lora_A", "lora_B")].double()
        old, new = B @ before[name].double(), B @ after[name].double()
        there, changed = (torch.trace(D @ C_t.double() @ D.mT) for D in (old, new - old))
        (row,) = (row for row in record.matrices if row.name == f"{layer}.weight")
        assert row.task_change == pytest.approx(float(changed / there), rel=1e-3)
    assert record.method == {
        "name": "protect", "strength": 1.0, "target_drift": None, "balance": "layer",
        "task_moments": True, "ridge": 0.03, "sides": "one", "rounds": 1,
    }  # fmt: skip
    for row in some(record.matrices):
        assert row.status == "repaired"
        assert row.drift_after < row.drift_before
        assert row.rank_after == row.rank_before == 2


def test_a_full_fine_tune_is_streamed(base, tmp_path):
    model, path = base
    weights = dict(model.state_dict())
    changed = {n: W + 0.1 * draw(*W.shape, seed=7) for n, W in weights.items() if W.ndim == 2}
    tuned = save(tmp_path / "tuned.safetensors", weights | changed)
    moments, task = measured(model, 1), measured(model, 2)
    bulkedge.repair(path, tuned, tmp_path / "out", method=LAYER(moments, task, strength=2.0))
    after = load_file(tmp_path / "out/tuned.safetensors")
    for name, layer in (("up.weight", "up"), ("down.weight", "down")):
        difference = (changed[name] - weights[name]).double()
        expected = protected(difference, moments[layer].moment, task[layer].moment, 2.0)
        torch.testing.assert_close(
            after[name], (weights[name] + expected).float(), rtol=1e-5, atol=1e-6
        )
    words = (changed["words.weight"] - weights["words.weight"]).double()
    expected = protected(words.mT, moments["words"].moment, task["words"].moment, 2.0).mT
    torch.testing.assert_close(
        after["words.weight"], (weights["words.weight"] + expected).float(), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(after["up.bias"], weights["up.bias"])


def test_no_strength_is_the_input_bit_for_bit(base, tmp_path):
    model, path = base
    tuned = adapter(tmp_path / "a")
    bulkedge.repair(path, tuned, tmp_path / "out", method=Protect(measured(model, 1), strength=0))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tuned / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_a_model_with_a_prefix_and_moments_from_a_file(base, tmp_path):
    """The base's file calls its weights otherwise than the model that was measured."""
    model, _ = base
    weights = {f"model.{name}": W for name, W in model.state_dict().items()}
    path = save(tmp_path / "prefixed.safetensors", weights)
    measured(model, 1).save(tmp_path / "base.moments")
    moments = Moments.load(tmp_path / "base.moments")
    record = bulkedge.repair(path, adapter(tmp_path / "a"), None, method=Protect(moments))
    assert {row.status for row in record.matrices} == {"repaired"}
    assert {row.name for row in some(record.matrices)} == {
        "model.up.weight", "model.down.weight", "model.words.weight"
    }  # fmt: skip


def test_moments_of_another_model_are_refused_layer_by_layer(base, tmp_path):
    model, path = base
    tuned = adapter(tmp_path / "a")
    record = bulkedge.repair(path, tuned, None, method=Protect(measured(Net(seed=1), 1)))
    for row in some(record.matrices):
        assert row.status == "refused"
        assert "the base moments are of another model" in row.note
    record = bulkedge.repair(
        path, tuned, None, method=Protect(measured(model, 1), measured(Net(seed=1), 1))
    )
    assert all("the task moments are of" in row.note for row in some(record.matrices))
    other = Protect(moments_of(nn.Sequential(nn.Linear(3, 3)), torch.eye(3)))
    with pytest.raises(InputError, match="no layer of the moments is in the checkpoint"):
        bulkedge.repair(path, tuned, None, method=other)


def moments_of(model, x):
    with Moments(model) as moments, torch.no_grad():
        model(x)
    return moments


def test_a_layer_that_did_not_run_is_refused_by_name(base, tmp_path):
    model, path = base
    with Moments(model, include="up") as only, torch.no_grad():
        model(torch.arange(30)[None])
    record = bulkedge.repair(path, adapter(tmp_path / "a"), None, method=Protect(only))
    notes = {row.name: row.note for row in some(record.matrices)}
    assert notes["up.weight"] is None
    assert "no inputs of this layer in the base moments" in notes["down.weight"]


def test_dora_and_half_precision_that_overflows_are_refused(base, tmp_path):
    model, path = base
    tuned = adapter(tmp_path / "a", use_dora=True)
    file = tuned / "adapter_model.safetensors"
    norms = {"base_model.model.up.lora_magnitude_vector": torch.ones(24)}
    tensors = {n: t for n, t in load_file(file).items() if ".up." in n}
    save(file, tensors | norms)
    record = bulkedge.repair(path, tuned, None, method=Protect(measured(model, 1)))
    (row,) = record.matrices
    assert row.note == "DoRA: its magnitudes depend on all inputs; merge it into the model first"


def test_damaged_files_of_moments(base, tmp_path):
    (tmp_path / "x.moments").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        Moments.load(tmp_path / "x.moments")


def test_experts_and_moments_of_another_width_are_refused(base, tmp_path):
    model, _ = base
    stack = draw(3, 8, 16)
    weights = dict(model.state_dict()) | {"mlp.experts.up_proj": stack}
    path = save(tmp_path / "with.safetensors", weights)
    changed = {"mlp.experts.up_proj": stack + 1, "up.weight": weights["up.weight"] + 1}
    tuned = save(tmp_path / "tuned.safetensors", weights | changed)
    moments = measured(model, 1)
    short = Moments()
    short._known = dict(moments.layers)
    short._known["up"] = replace(moments["up"], moment=torch.eye(9, dtype=torch.float64))
    record = bulkedge.repair(path, tuned, None, method=Protect(short), only=["*"])
    notes = {row.name: row.note for row in some(record.matrices)}
    assert notes.pop("up.weight") == "the base moments have another width than this layer"
    assert set(notes.values()) == {"experts: the tokens of each are not measured separately"}


@pytest.fixture
def half_trained(tmp_path):
    """A base in which only ``down`` has structure; its other layers are noise."""
    model = Net()
    U, V = (torch.linalg.qr(draw(n, 16, seed=n)).Q for n in (16, 24))
    with torch.no_grad():
        model.down.weight.copy_(U @ torch.diag(4 * 0.7 ** torch.arange(16.0)) @ V.mT)
    return model, save(tmp_path / "base.safetensors", dict(model.state_dict()))


def test_a_layer_whose_base_looks_untrained_is_left_as_it_is(half_trained, tmp_path):
    model, path = half_trained
    tuned, out = adapter(tmp_path / "a"), tmp_path / "out"
    moments, task = measured(model, 1), measured(model, 2)
    whole = bulkedge.repair(path, tuned, None, method=Protect(moments, task), only=["*"])
    assert {row.status for row in some(whole.matrices)} == {"repaired"}
    drift = {row.name: row.drift_before for row in whole.matrices}
    target = drift["down.weight"] / 3
    record = bulkedge.repair(path, tuned, out, method=Protect(moments, task, target_drift=target))
    rows = {row.name: row for row in record.matrices}
    left = [rows.pop(name) for name in ("up.weight", "words.weight")]
    assert {(row.status, row.change) for row in left} == {("left", 0)}
    assert all("its base looks untrained" in row.note for row in left)
    (row,) = rows.values()
    assert (row.name, row.status) == ("down.weight", "repaired")
    assert row.drift_after == pytest.approx(target, rel=0.01)
    before, after = (load_file(f / "adapter_model.safetensors") for f in (tuned, out))
    changed = {name for name in some(before) if not torch.equal(before[name], after[name])}
    assert changed == {"base_model.model.down.lora_A.weight"}


def test_of_factors_that_several_matrices_share_all_or_none_are_left(tmp_path):
    """One block of rows looks untrained: the factor on the input side is that of all of them."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("qkv", nn.Linear(24, 48, bias=False))
    U, V = (torch.linalg.qr(draw(24, 24, seed=n)).Q for n in (1, 2))
    with torch.no_grad():
        model.qkv.weight[:24] = U @ torch.diag(4 * 0.7 ** torch.arange(24.0)) @ V.mT
    path = save(tmp_path / "base.safetensors", dict(model.state_dict()))
    factors = {"lora_A": draw(2, 24), "lora_B": draw(48, 2, seed=1)}
    tensors = {f"base_model.model.qkv.{name}.weight": W for name, W in factors.items()}
    tuned = save_adapter(tmp_path / "a", tensors)
    with Moments(model) as moments, torch.no_grad():
        model(draw(100, 24, seed=3) * torch.linspace(0.1, 2, 24))
    recipe = {"split": {"qkv.weight": [24, 24]}}
    record = bulkedge.repair(path, tuned, None, method=Protect(moments), recipe=recipe)
    noise = {row.name for row in record.before.matrices if row.bulk.looks_untrained}
    assert noise == {"qkv.weight[24:48]"}
    assert [row.status for row in record.matrices] == ["repaired", "repaired"]


def test_what_a_dtype_leaves_out_is_in_the_record(base, tmp_path):
    model, _ = base
    weights = {n: W.bfloat16() for n, W in model.state_dict().items()}
    path = save(tmp_path / "half.safetensors", weights)
    update = {"up.weight": (weights["up.weight"].float() + 1e-2 * draw(24, 16)).bfloat16()}
    tuned = save(tmp_path / "tuned.safetensors", weights | update)
    method = LAYER(measured(model, 1), strength=1.0)
    (row,) = bulkedge.repair(path, tuned, tmp_path / "out", method=method).matrices
    W0 = weights["up.weight"].double()
    difference = update["up.weight"].double() - W0
    meant = W0 + protected(difference, measured(model, 1)["up"].moment, None, 1.0)
    stored = load_file(tmp_path / "out/tuned.safetensors")["up.weight"].double()
    assert row.loss == pytest.approx(float((stored - meant).norm() / difference.norm()), rel=1e-3)
    assert row.loss > 0.01


def test_settings_of_other_methods_are_refused(base, tmp_path):
    model, path = base
    method = Protect(measured(model, 1))
    for settings in ({"max_rank": 1}, {"select": "intruder"}, {"significance": 0.1}):
        with pytest.raises(InputError, match="expected no select, significance or max_rank"):
            bulkedge.repair(path, adapter(tmp_path / "a"), None, method=method, **settings)


def test_a_factor_that_layers_share_is_protected_for_all_or_none(tmp_path):
    parts = {f"h.{n}_proj.weight": draw(8, 16, seed=i) for i, n in enumerate("qkv")}
    base = save(tmp_path / "base.safetensors", parts)
    factors = {"h.qkv_proj.lora_A.weight": draw(2, 16), "h.qkv_proj.lora_B.weight": draw(24, 2)}
    tuned = save_adapter(tmp_path / "a", factors)
    layers = nn.ModuleDict({f"{n}_proj": nn.Linear(16, 8, bias=False) for n in "qkv"})
    holder = nn.ModuleDict({"h": layers})
    for n in "qkv":
        layers[f"{n}_proj"].weight.data = parts[f"h.{n}_proj.weight"].clone()
    with Moments(holder) as moments, torch.no_grad():
        for layer in layers.values():
            layer(draw(50, 16))
    method = Protect(moments)
    rows = bulkedge.repair(base, tuned, None, method=method).matrices
    assert {row.status for row in some(rows)} == {"repaired"}
    rows = bulkedge.repair(base, tuned, None, method=method, only=["*q_proj*"]).matrices
    for row in some(rows):
        assert "shares its factor with h.k_proj.weight, which is not chosen; choose all" in row.note


def test_swapped_moments_are_refused(base, tmp_path):
    model, path = base
    moments = {}
    for name, tuned in (("base", False), ("task", True)):
        with Moments(model) as found, torch.no_grad():
            model(torch.arange(30)[None])
        found.tuned = tuned
        found.save(tmp_path / name)
        moments[name] = Moments.load(tmp_path / name)
        assert moments[name].tuned is tuned
        assert moments[name].sketched(2).tuned is tuned
        assert moments[name].merge(moments[name]).tuned is tuned
    assert moments["base"].merge(moments["task"]).tuned is None
    Protect(moments["base"], moments["task"])
    with pytest.raises(InputError, match=r"got those of a fine-tune .* were the two files swapped"):
        Protect(moments["task"], moments["base"])
    with pytest.raises(InputError, match="task moments of the fine-tune's inputs, got those of th"):
        Protect(moments["base"], moments["base"])
    with pytest.raises(InputError, match="moments of a fine-tune's inputs; drift is on the base's"):
        bulkedge.audit(path, adapter(tmp_path / "a"), moments=tmp_path / "task")
