"""A changed bias is in a bound on the drift of its layer, against the outputs themselves."""

import pytest
import torch
from torch import nn

import bulkedge
from bulkedge import Record
from bulkedge.moments import Moments
from helpers import save, save_adapter, some, weights

CLEAN, FOUND, UNKNOWN = 0, 1, 2
SPLIT = {"qkv_proj.weight": [12, 12, 12]}
BLOCKS = {f"qkv_proj.weight[{i}:{i + 12}]": slice(i, i + 12) for i in (0, 12, 24)}


class Conv1D(nn.Module):
    """GPT-2's layer of this name, which stores its weight as (in, out)."""

    def __init__(self, width, out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, out))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x):
        return x @ self.weight + self.bias


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv_proj, self.norm = nn.Linear(8, 36), nn.LayerNorm(12)
        self.up, self.c_proj = nn.Linear(12, 24), Conv1D(24, 10)
        self.conv = nn.Conv2d(2, 6, 3, padding=1)

    def forward(self, x):
        q, k, v = self.qkv_proj(x).chunk(3, dim=-1)
        hidden = self.c_proj(torch.tanh(self.up(self.norm(q + k * v))))
        return self.conv(hidden.reshape(len(x), 2, 5, -1))


INPUTS = weights(40, 7, 8) + 0.5  # with a mean, which a bias may add to or take from
LAYERS = ("qkv_proj", "up", "c_proj", "conv")


@pytest.fixture(scope="module")
def model():
    return Net()


@pytest.fixture(scope="module")
def rows(model):
    """What each layer multiplies its weight with, one row each."""
    found = {}

    def hook(name):
        return lambda _, args: found.update({name: args[0].detach().double()})

    handles = [getattr(model, n).register_forward_pre_hook(hook(n)) for n in LAYERS]
    with torch.no_grad():
        model(INPUTS)
    for handle in handles:
        handle.remove()
    found["conv"] = nn.functional.unfold(found["conv"], 3, padding=1).mT
    return {name: x.reshape(-1, x.shape[-1]) for name, x in found.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("biases")
    with Moments(model) as moments, torch.no_grad():
        model(INPUTS)
    moments.save(folder / "base.moments")
    save(folder / "base.safetensors", dict(model.state_dict()))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return folder


def audited(folder, changes, dtype=torch.float32, name="tuned", **recipe):
    base = {n: W.detach() for n, W in Net().state_dict().items()}
    tuned = {n: (W + changes.get(n, 0)).to(dtype) for n, W in base.items()}
    return bulkedge.audit(
        folder / "base.safetensors",
        save(folder / f"{name}.safetensors", tuned),
        recipe={"split": SPLIT, "top_k": 2} | recipe,
        moments=folder / "base.moments",
    )


def of(strength, *ends, layers=LAYERS, seed=7):
    shapes = {n: W.shape for n, W in Net().state_dict().items()}
    return {
        n: strength * weights(*shape, seed=seed + i)
        for i, (n, shape) in enumerate(shapes.items())
        if n.endswith(ends) and n.startswith(layers)
    }


def acting(name, weight):
    weight = weight.detach().double().flatten(1)
    return weight.mT if name == "c_proj" else weight


def moved(name, x, model, changes, part=slice(None)):
    """The mean square of the change of the outputs, and of the base's outputs without a bias."""
    W0 = acting(name, model.state_dict()[f"{name}.weight"])[part]
    change = changes.get(f"{name}.weight")
    dW = torch.zeros_like(W0) if change is None else acting(name, change)[part]
    db = changes[f"{name}.bias"].double()[part]
    power = float((x @ W0.mT).square().sum() / len(x))
    exact = float((x @ dW.mT + db).square().sum() / len(x))
    apart = float((x @ dW.mT).square().sum() / len(x)), float(db.square().sum())
    return exact / power, (apart[0] ** 0.5 + apart[1] ** 0.5) ** 2 / power, apart[0] / power


@pytest.mark.parametrize("ends", [("weight", "bias"), ("bias",)], ids=["both", "biases alone"])
@pytest.mark.parametrize("strength", [1e-3, 0.3])
def test_the_outputs_move_no_farther(strength, ends, folder, model, rows):
    changes = of(strength, *ends)
    changes["up.weight"] = strength * weights(24, 12)  # one matrix at least is compared
    record = audited(folder, changes)
    state = {n: W.detach() for n, W in model.state_dict().items()}
    changes = {n: (state[n] + x) - state[n] for n, x in changes.items()}  # as float32 rounds them
    whole = {f"{name}.weight": slice(None) for name in LAYERS if name != "qkv_proj"} | BLOCKS
    assert {m.name for m in record.matrices} == set(whole)
    for matrix in some(record.matrices):
        name = matrix.name.partition(".")[0]
        exact, bound, alone = moved(name, rows[name], model, changes, whole[matrix.name])
        assert exact <= matrix.drift_bound * (1 + 1e-6)
        assert matrix.drift_bound == pytest.approx(bound, rel=1e-5)
        assert matrix.drift == pytest.approx(alone, rel=1e-5)
    found = record.summary.drift
    assert (found.unknown, found.vectors) == (0, 0)
    assert found.bound == pytest.approx(
        sum(m.drift_bound for m in record.matrices) / len(record.matrices)
    )
    assert {row.name for row in record.skipped if row.changed} == {f"{n}.bias" for n in LAYERS}
    assert all(row.bounded for row in record.skipped if row.changed)
    assert Record.from_json(record.to_json()) == record


def test_the_bound_is_reached_where_all_inputs_are_alike(tmp_path):
    layer, x = nn.Linear(3, 2), torch.tensor([[1.0, 2.0, -1.0]] * 5)
    with Moments(layer) as moments, torch.no_grad():
        layer(x)
    base = {n: W.detach() for n, W in layer.state_dict().items()}
    dW = torch.tensor([[0.1, 0.0, 0.0], [0.0, 0.1, 0.0]])
    tuned = {"weight": base["weight"] + dW, "bias": base["bias"] + torch.tensor([0.3, 0.6])}
    record = bulkedge.audit(
        save(tmp_path / "b.safetensors", base), save(tmp_path / "t.safetensors", tuned),
        moments=moments,
    )  # fmt: skip
    (row,) = record.matrices
    change = layer.weight.detach() @ x[0]
    outputs = (dW @ x[0] + torch.tensor([0.3, 0.6])).square().sum() / change.square().sum()
    assert row.drift_bound == pytest.approx(float(outputs), rel=1e-5)


def test_no_bound_without_a_changed_bias(folder):
    record = audited(folder, of(0.1, "weight"))
    assert record.summary.drift.bound is None
    assert [m.drift_bound for m in record.matrices] == [None] * 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_the_file_rounds_has_not_changed(dtype, folder):
    record = audited(folder, {"up.weight": 0.1 * weights(24, 12)}, dtype)
    assert [row.name for row in record.skipped if row.changed] == []
    assert record.summary.drift_known
    nudged = torch.zeros(24)
    nudged[3] = 0.02
    record = audited(folder, {"up.weight": 0.1 * weights(24, 12), "up.bias": nudged}, dtype)
    assert [row.name for row in record.skipped if row.changed] == ["up.bias"]


@pytest.mark.parametrize(
    ("strength", "code"), [(0.0, CLEAN), (1e-3, CLEAN), (30.0, FOUND)], ids=str
)
def test_the_limit_holds_for_the_bound(strength, code, folder):
    changes = of(1e-3, "weight") | of(strength, "bias")
    record = audited(folder, changes)
    gate = bulkedge.report.Gate(fail_on=None, max_drift=0.05)
    assert gate.exit_code(record) == code
    told = [failure.message for failure in gate.failures(record)]
    assert (len(told), record.summary.drift.mean < 0.05) == (bool(code), True)
    if code:
        assert "with the most that changed biases can add" in told[0]
        assert "6 matrices exceed it" in told[0]


def test_norms_stay_outside_and_the_message_has_globs_that_accept_them(folder):
    changes = of(1e-3, "weight", "bias", layers=(*LAYERS, "norm"))
    gate = bulkedge.report.Gate(fail_on=None, max_drift=0.05)
    record = audited(folder, changes)
    assert record.summary.drift.vectors == 2
    (failure,) = gate.failures(record)
    assert failure.code == UNKNOWN
    assert "2 changed norms or other vectors are no part of it: norm.bias" in failure.message
    globs = [word.strip("'") for word in failure.message.split() if word.startswith("'")]
    assert sorted(globs) == ["norm.bias", "norm.weight"]
    accepted = audited(folder, changes, exclude=globs)
    assert gate.exit_code(accepted) == CLEAN
    assert len(accepted.matrices) == len(record.matrices)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.layer.2.output.LayerNorm.weight", "*.LayerNorm.weight"),
        ("model.layers.3._orig_mod.q_norm.weight", "*.q_norm.weight"),
        ("norms.3.weight", "norms.*.weight"),
        ("a.norms.3.weight", "*.norms.*.weight"),
        ("2.bias", "*.bias"),
        ("logit_scale", "logit_scale"),
        ("a.up.scale", "*.up.scale"),
        ("x.proj.weight", "x.proj.weight"),  # of which y has a matrix
    ],
)
def test_a_glob_for_a_vector_matches_it_and_no_matrix(name, expected, tmp_path):
    from bulkedge._globs import matches
    from bulkedge.report.drift import globs_of

    layers = {"y.proj.weight": weights(6, 4), "up.weight": weights(6, 4)}
    files = (save(tmp_path / f"{i}.safetensors", {n: (1 + i) * W for n, W in layers.items()})
             for i in (0, 1))  # fmt: skip
    record = bulkedge.audit(*files, recipe={"top_k": 1})
    assert globs_of([name, name], record) == [expected]
    assert matches([name], [expected])
    assert not any(matches([stored], [expected]) for stored in layers)


def test_the_bias_of_an_adapter_is_bounded_like_another(folder, model):
    stem = "base_model.model.up"
    tensors = {f"{stem}.lora_A.weight": weights(2, 12), f"{stem}.lora_B.weight": weights(24, 2)}
    tensors[f"{stem}.bias"] = model.state_dict()["up.bias"] + 0.5
    adapter = save_adapter(folder / "lora", tensors, bias="all")
    record = bulkedge.audit(
        folder / "base.safetensors", adapter, moments=folder / "base.moments", recipe={"top_k": 2}
    )
    (row,) = record.matrices
    change, bias = row.output_change**0.5, 0.5 * 24**0.5
    assert row.drift_bound == pytest.approx((change + bias) ** 2 / row.output_power, rel=1e-5)
    assert record.summary.drift_known


def test_a_bias_of_another_size_differs_and_is_no_part_of_it(tmp_path):
    layer = nn.Linear(3, 2)
    with Moments(layer) as moments, torch.no_grad():
        layer(weights(5, 3))
    base = {n: W.detach() for n, W in layer.state_dict().items()}
    tuned = {"weight": base["weight"] + 0.1, "bias": torch.zeros(4) + 1}
    record = bulkedge.audit(
        save(tmp_path / "b.safetensors", base), save(tmp_path / "t.safetensors", tuned),
        moments=moments,
    )  # fmt: skip
    assert [(r.name, r.bounded) for r in record.skipped if r.changed] == [("bias", False)]
    assert not record.summary.drift_known


def test_a_bound_below_the_drift_is_no_record(folder):
    content = audited(folder, of(0.1, "weight", "bias")).to_json()
    record = Record.from_json(content)
    bad = record.matrices[0].model_dump() | {"drift_bound": 0.5 * record.matrices[0].drift}
    with pytest.raises(ValueError, match="expected a bound of at least"):
        type(record.matrices[0]).model_validate(bad)
