"""What is done to a model after something was built to hold or to watch it.

A table: every holder × everything that replaces parameters or their numbers.  Either the true
update, taken densely in float64 from what the model holds afterwards, obeys, or an error names the
layer.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bulkedge import InputError
from bulkedge.moments import Moments
from bulkedge.tune import (
    DriftClip,
    IntruderPenalty,
    Monitor,
    OrthonormalFactors,
    RankController,
    SpikeClip,
)
from bulkedge.update import BaseSpectrum
from cases import orthonormal
from helpers import some

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, of odd targets

PREFIX = "base_model.model."
LIMITS = {f"{PREFIX}linear": 0.5, f"{PREFIX}kernel": 0.25}
LEVEL = 0.5


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(30, 40)
        self.kernel = nn.Conv2d(3, 20, 3)
        with torch.no_grad():
            self.linear.weight += 2 * orthonormal(40, 4).float() @ orthonormal(30, 4, 1).float().mT
            spread = 2 * orthonormal(20, 4).float() @ orthonormal(27, 4, 1).float().mT
            self.kernel.weight += spread.reshape(20, 3, 3, 3)

    def forward(self, x):
        return self.linear(x)


def lora(**options):
    return peft.LoraConfig(
        **({"r": 3, "lora_alpha": 6, "target_modules": ["linear", "kernel"]} | options)
    )


def make():
    model = peft.get_peft_model(Model(), lora())
    for _, layer in layers(model):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    return model


def layers(model):
    return [
        (name, x) for name, x in model.named_modules() if isinstance(x, peft.tuners.lora.LoraLayer)
    ]


def whole(x):
    x = x.full_tensor() if hasattr(x, "full_tensor") else x
    return x.detach().double().cpu().flatten(1)


def update(layer):
    """The update as a dense matrix, of what the model holds now."""
    A, B = (whole(x["default"].weight) for x in (layer.lora_A, layer.lora_B))
    return layer.scaling["default"] * B @ A


def optimizer_of(model):
    """One that throws every trained parameter far away at its next step."""
    trained = [x for x in model.parameters() if x.requires_grad]
    for x in trained:
        x.grad = 7 * x.detach() + 1
    return torch.optim.SGD(trained, lr=1.0)


# -- what happens to the model: each returns the model to go on with ------------------------------


def nothing(model):
    return model


def double(model):
    return model.double()


def bfloat16(model):
    return model.bfloat16()


def half_and_back(model):
    return model.half().float()


def to_device(model):
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def swapped(model):
    """Another module of the same kind in the place of each, with other numbers."""
    inner = model.base_model.model
    for name in ("linear", "kernel"):
        layer = copy.deepcopy(getattr(inner, name))
        layer.lora_A["default"].weight.data *= 3
        setattr(inner, name, layer)
    return model


def swapped_for_a_plain_one(model):
    model.base_model.model.linear = nn.Linear(30, 40)
    return model


def removed(model):
    del model.base_model.model.linear
    return model


def another_rank(model):
    other = peft.get_peft_model(Model(), lora(r=2))
    model.base_model.model.linear = other.base_model.model.linear
    return model


def assigned(model):
    state = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


def copied(model):
    return copy.deepcopy(model)


def checkpointed(model):
    """Activation checkpointing puts a wrapper around layers, which passes their names on."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    inner = model.base_model.model
    inner.kernel = checkpoint_wrapper(inner.kernel)
    return model


def frozen(which):
    def freeze(model):
        for _, layer in layers(model):
            for factor in which:
                getattr(layer, f"lora_{factor}")["default"].weight.requires_grad_(False)
        return model

    freeze.__name__ = f"frozen_{which}"
    return freeze


def deleted(model):
    model.add_adapter("other", lora())
    model.set_adapter("other")
    model.delete_adapter("default")
    return model


def switched(model):
    model.add_adapter("other", lora())
    model.set_adapter("other")
    return model


def merged(model):
    model.merge_adapter()
    return model


def disabled(model):
    model.base_model.disable_adapter_layers()
    return model


def diverged(model):
    layers(model)[0][1].lora_B["default"].weight.data[0, 0] = torch.nan
    return model


def infinite(model):
    layers(model)[0][1].lora_A["default"].weight.data[0, 0] = torch.inf
    return model


def on_meta(model):
    return model.to("meta")


FINE = [
    nothing, double, bfloat16, half_and_back, to_device, swapped, assigned, checkpointed,
]  # fmt: skip
AFTER = "(after step 1: )?"  # which a monitor adds
LOST = {
    swapped_for_a_plain_one: rf"linear: {AFTER}expected the LoRA layer .* got a Linear without",
    removed: rf"linear: {AFTER}expected the LoRA layer .* got no such module",
    another_rank: rf"linear: {AFTER}expected the LoRA layer .* got factors of shapes .*\(40, 2\)",
    deleted: rf"linear: {AFTER}expected the LoRA layer .* got no adapter 'default', .* deleted",
    switched: rf"linear: {AFTER}expected the adapter 'default' to be the active one, got other",
    merged: rf"linear: {AFTER}expected W0 \+ s·B·A, got a merged adapter: unmerge it",
    diverged: r"linear: .*expected (finite (factors|entries)|[AB] to be finite)",
    infinite: r"linear: .*expected (finite (factors|entries)|[AB] to be finite)",
    on_meta: r"linear: .*expected parameters in memory, got one on the meta device",
}
HOLDERS = {
    "SpikeClip": lambda model: SpikeClip(model, level=LEVEL, thresholds=LIMITS),
    "RankController": lambda model: RankController(model, level=LEVEL, start=3, thresholds=LIMITS),
    "OrthonormalFactors": OrthonormalFactors,
    "DriftClip": lambda model: DriftClip(model, moments_of(model), DRIFT),
}
INPUTS = {
    "linear": torch.randn(64, 30, generator=torch.Generator().manual_seed(3)),
    "kernel": torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(4)),
}
DRIFT = 0.01


def moments_of(model):
    with Moments(model) as found, torch.no_grad():
        for name, layer in layers(model):
            layer(INPUTS[name.removeprefix(PREFIX)])
    return found


def drifts(holder, layer, name):
    """``E‖ΔW x‖²`` over the output at first, from the inputs themselves."""
    x = INPUTS[name.removeprefix(PREFIX)].double()
    if x.ndim == 4:
        x = nn.functional.unfold(x, 3).mT.flatten(0, 1)
    (output,) = (own.output for own in holder._layers if own.matrix.name == name)
    return float((x @ update(layer).mT).square().sum(dim=1).mean()) / output


STEPS = [event for event in LOST if event is not on_meta]  # torch itself takes no step from there
UNTRAINED = r"expected an optimiser of what is held, got SGD, which has no trained factor of the 2"


def step(optimizer, holder):
    holder.attach(optimizer)
    optimizer.step()


def obeys(holder, model):
    """Whether all updates of a model are what a holder promises, from dense SVDs."""
    for name, layer in some(layers(model)):
        name = name.replace("._checkpoint_wrapped_module", "")
        if isinstance(holder, DriftClip):
            assert 0.98 * DRIFT <= drifts(holder, layer, name) <= DRIFT * (1 + 1e-6)
            continue
        values = torch.linalg.svdvals(update(layer))
        if not isinstance(holder, OrthonormalFactors):
            assert float(values[0]) <= LEVEL * LIMITS[name]
            assert float(values[0]) >= 0.99 * LEVEL * LIMITS[name]
            continue
        eps = torch.finfo(layer.lora_B["default"].weight.dtype).eps
        strength = torch.full((3,), layer.scaling["default"]).double()
        torch.testing.assert_close(values[:3], strength, rtol=8 * eps, atol=0)


@pytest.mark.parametrize("event", FINE)
@pytest.mark.parametrize("kind", HOLDERS)
def test_it_still_holds(kind, event):
    model = make()
    holder = HOLDERS[kind](model)
    model = event(model)
    optimizer = optimizer_of(model)
    holder.attach(optimizer)
    optimizer.step()
    obeys(holder, model)


@pytest.mark.parametrize("event", LOST)
@pytest.mark.parametrize("kind", HOLDERS)
def test_or_it_says_what_it_has_lost(kind, event):
    model = make()
    holder = HOLDERS[kind](model)
    model = event(model)
    with pytest.raises(InputError, match=LOST[event]):
        holder.step()


@pytest.mark.parametrize("event", [copied, *LOST])
@pytest.mark.parametrize("kind", HOLDERS)
def test_no_optimiser_that_is_made_afterwards_passes_in_silence(kind, event):
    model = make()
    holder = HOLDERS[kind](model)
    optimizer = optimizer_of(event(model))
    with pytest.raises(InputError, match=LOST.get(event, UNTRAINED)):
        step(optimizer, holder)


@pytest.mark.parametrize("event", [assigned, frozen("BA"), disabled, *STEPS])
@pytest.mark.parametrize("kind", HOLDERS)
def test_nor_one_that_was_made_before(kind, event):
    model = make()
    holder = HOLDERS[kind](model)
    optimizer = optimizer_of(model)
    holder.attach(optimizer)
    event(model)
    with pytest.raises(InputError, match=LOST.get(event, UNTRAINED)):
        optimizer.step()


@pytest.mark.parametrize("which", "BA")
def test_what_is_frozen_is_not_changed(which):
    model = frozen(which)(make())
    before = [getattr(x, f"lora_{which}")["default"].weight.clone() for _, x in layers(model)]
    holder = HOLDERS["SpikeClip"](model)
    optimizer = optimizer_of(model)
    holder.attach(optimizer)
    optimizer.step()
    obeys(holder, model)
    for (_, layer), kept in some(zip(layers(model), before, strict=True)):
        assert torch.equal(getattr(layer, f"lora_{which}")["default"].weight, kept)


def test_a_frozen_factor_alone_keeps_the_directions():
    """One factor does what both would do: singular values are cut, vectors stay."""
    model = frozen("A")(make())
    wanted = []
    for name, layer in layers(model):
        U, S, Vt = torch.linalg.svd(update(layer), full_matrices=False)
        wanted.append(U * S.clamp_max(LEVEL * LIMITS[name]) @ Vt)
    HOLDERS["SpikeClip"](model).step()
    for (_, layer), expected in some(zip(layers(model), wanted, strict=True)):
        torch.testing.assert_close(update(layer), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("which", "BA")
def test_orthonormal_factors_and_a_frozen_one(which):
    model = frozen(which)(make())
    with pytest.raises(InputError, match=f"linear: expected {which} to be trained, or orthonormal"):
        OrthonormalFactors(model)
    model = make()
    holder = OrthonormalFactors(model)  # from here on it is orthonormal
    before = [getattr(x, f"lora_{which}")["default"].weight.clone() for _, x in layers(model)]
    optimizer = optimizer_of(frozen(which)(model))
    holder.attach(optimizer)
    optimizer.step()
    obeys(holder, model)
    for (_, layer), kept in some(zip(layers(model), before, strict=True)):
        assert torch.equal(getattr(layer, f"lora_{which}")["default"].weight, kept)


@pytest.mark.parametrize("which", "BA")
def test_ranks_take_both_factors(which):
    model = make()
    control = HOLDERS["RankController"](model)
    frozen(which)(model)
    with pytest.raises(InputError, match=f"linear: expected two factors .* got {which} frozen"):
        control.step()


def test_two_frozen_factors_are_left_alone_or_refused():
    model = frozen("BA")(make())
    with pytest.raises(InputError, match=r"linear: expected a factor that is trained and its own"):
        HOLDERS["SpikeClip"](model).step()
    for _, layer in layers(model):
        layer.lora_B["default"].weight.data *= 1e-3
    clip = HOLDERS["SpikeClip"](model)
    assert clip.step() == 0
    assert 0 < max(clip.strongest.values()) < LEVEL


# -- what only reads ------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [*FINE, frozen("A"), frozen("B"), frozen("BA"), disabled])
def test_a_monitor_sees_the_update_that_is_there(event):
    model = make()
    monitor = Monitor(model, every=1, per_call=2, thresholds=LIMITS)
    monitor.step()
    model = event(model)
    for _, layer in layers(model):
        layer.lora_B["default"].weight.data *= 3
    monitor.step()
    for name, layer in some(layers(model)):
        name = name.replace("._checkpoint_wrapped_module", "")
        seen = monitor.figures[name].strongest * LIMITS[name]
        exact = float(torch.linalg.svdvals(update(layer))[0])
        assert seen == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("event", LOST)
def test_or_says_what_it_does_not_see(event):
    model = make()
    monitor = Monitor(model, every=1, per_call=2, thresholds=LIMITS)
    model = event(model)
    with pytest.raises(InputError, match=LOST[event]):
        monitor.step()


def dense_penalty(layer, edge, k):
    """The penalty of one layer by SVDs, from the formula."""
    W0 = whole(layer.get_base_layer().weight)
    W = W0 + update(layer)
    U0, _, V0t = torch.linalg.svd(W0, full_matrices=False)
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    inside = (U0[:, : 2 * k].mT @ U[:, :k]).square().sum(dim=0)
    inside = inside + (V0t[: 2 * k] @ Vt[:k].mT).square().sum(dim=0)
    floor = max(edge, float(S[k])) + 0.02 * float(S[0])
    return float(((S[:k] - floor).clamp_min(0) / edge * (1 - inside / 2)).sum())


@pytest.mark.parametrize("event", [*FINE, frozen("A"), frozen("B")])
def test_a_penalty_is_of_the_update_that_is_there(event):
    model = make()
    edges = {
        name: BaseSpectrum.of(whole(x.get_base_layer().weight)).fit.edge
        for name, x in layers(model)
    }
    penalty = IntruderPenalty(model, k=3, per_call=None)
    penalty().backward()
    model = event(model)
    for _, layer in layers(model):
        layer.lora_B["default"].weight.data *= 3
    model.zero_grad()
    penalty().backward()
    values = penalty.values()
    for name, layer in some(layers(model)):
        name = name.replace("._checkpoint_wrapped_module", "")
        assert values[name] == pytest.approx(dense_penalty(layer, edges[name], 3), rel=3e-2)
        for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            assert (factor.grad is not None and bool(factor.grad.any())) == factor.requires_grad


@pytest.mark.parametrize("event", [*LOST, frozen("BA")])
def test_or_says_what_it_cannot_penalise(event):
    model = make()
    penalty = IntruderPenalty(model, k=3, per_call=None)
    model = event(model)
    with pytest.raises(
        InputError, match=LOST.get(event, r"linear: .*two that are frozen, on which")
    ):
        penalty()


# -- spread over processes ------------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path):
    """A group of one process: parameters are replaced by parts as in any other group."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("kind", [*HOLDERS, "Monitor"])
@pytest.mark.parametrize("forward", [False, True])
def test_fully_sharded(kind, forward, mesh):
    """Also where a forward pass left gathered copies, into which nothing must be written."""
    from torch.distributed.fsdp import fully_shard

    model = make()
    holder = (
        Monitor(model, every=1, per_call=2, thresholds=LIMITS)
        if kind == "Monitor"
        else HOLDERS[kind](model)
    )
    fully_shard(model, mesh=mesh)
    optimizer = optimizer_of(model)
    if forward:
        model(torch.ones(2, 30))
    if kind != "Monitor":
        holder.attach(optimizer)
        optimizer.step()
        model.reshard()
        obeys(holder, model)
        return
    holder.step()
    model.reshard()
    for name, layer in some(layers(model)):
        exact = float(torch.linalg.svdvals(update(layer))[0])
        assert holder.figures[name].strongest * LIMITS[name] == pytest.approx(exact, rel=1e-5)
