"""What holders are given by mistake: each is refused, by name, and none is held by nothing."""

import json

import pytest
import torch
from torch import nn

from bulkedge import CheckpointError, InputError, RecipeError
from bulkedge.tune import (
    AdaptedMatrix,
    IntruderPenalty,
    Monitor,
    OrthonormalFactors,
    RankController,
    SpikeClip,
    _clip_spikes,
    full_matrices,
    hold_update,
)
from helpers import some

HOLDERS = {
    "SpikeClip": SpikeClip,
    "RankController": lambda matrices, **options: RankController(matrices, start=2, **options),
}


WITH_THRESHOLDS = HOLDERS | {"Monitor": Monitor}
ADAPTED = WITH_THRESHOLDS | {"OrthonormalFactors": OrthonormalFactors, "Penalty": IntruderPenalty}


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def layer(name="layer", size=1.0, dtype=torch.float32, scale=1.0):
    B, A = (draw(*s, seed=s[0]).double() * size for s in ((50, 2), (2, 40)))
    return AdaptedMatrix(name, draw(50, 40), A.to(dtype), B.to(dtype), lambda: scale)


def strongest(matrix):
    B, A = (x.detach().double() for x in (matrix.B, matrix.A))
    return matrix.scale * float(torch.linalg.svdvals(B @ A)[0])


# -- spikes far beyond their limit ----------------------------------------------------------------


@pytest.fixture
def few_passes(monkeypatch):
    """Fail where the factors are measured more often than any rounding asks for."""
    calls, measure = [], _clip_spikes.spikes

    def counted(matrices):
        calls.append(len(matrices))
        assert len(calls) < 500, "it does not end"
        return measure(matrices)

    monkeypatch.setattr(_clip_spikes, "spikes", counted)
    return calls


@pytest.mark.parametrize("kind", HOLDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e10, 1e15, 1e20, 1e30])
def test_factors_that_have_diverged_are_an_error(size, dtype, kind, few_passes):
    matrix = layer(size=size, dtype=dtype)
    kept = [x.clone() for x in (matrix.B, matrix.A)]
    holder = HOLDERS[kind]([matrix], thresholds={"layer": 13.0})
    with pytest.raises(InputError, match=r"layer: expected spikes .* training has diverged"):
        holder.step()
    assert all(torch.equal(x, y) for x, y in zip((matrix.B, matrix.A), kept, strict=True))


@pytest.mark.parametrize("kind", HOLDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e2, 1e4, 3e5])
def test_what_can_be_lowered_ends_at_the_level(size, dtype, kind, few_passes):
    matrix = layer(size=size, dtype=dtype)
    HOLDERS[kind]([matrix], thresholds={"layer": 13.0}).step()
    error = max(torch.finfo(dtype).eps, 1e-6)
    assert 0.9 * 13 * (1 - error) < strongest(matrix) <= 0.9 * 13
    assert len(few_passes) < 30


@pytest.mark.parametrize("trained", ["A", "B"])
def test_also_by_one_factor_alone(trained, few_passes):
    matrix = layer(size=1e5)
    getattr(matrix, trained).requires_grad_()
    SpikeClip([matrix], thresholds={"layer": 13.0}).step()
    assert 0.9 * 13 * 0.999 < strongest(matrix) <= 0.9 * 13


def test_a_loop_that_does_not_converge_ends(monkeypatch):
    """Whatever the reason: a hold must not wait for ever."""
    monkeypatch.setattr(AdaptedMatrix, "write", lambda *_: None)
    with pytest.raises(InputError, match="layer: expected spikes that can be lowered"):
        SpikeClip([layer()], thresholds={"layer": 1.0}).step()


def test_an_update_beyond_all_numbers_is_an_error():
    matrix = layer(size=1e153, dtype=torch.float64, scale=1e8)
    with pytest.raises(InputError, match="layer: expected finite factors, got NaN or infinity"):
        SpikeClip([matrix], thresholds={"layer": 1.0}).step()


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ADAPTED)
def test_two_matrices_of_one_name_are_refused(kind):
    """They would share a threshold, of which one is wrong."""
    second = AdaptedMatrix("layer", 9 * draw(50, 40), 7 * draw(2, 40), draw(50, 2))
    with pytest.raises(InputError, match=r"each with a name of its own, got two named '?layer"):
        ADAPTED[kind]([layer(), layer("other"), second])
    ADAPTED[kind]([layer(), layer("other")])


def test_of_two_of_one_name_patterns_may_choose_neither():
    assert len(SpikeClip([layer(), layer(), layer("other")], include="other").matrices) == 1


# -- thresholds and levels ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0, "x", None, True, [1.0]])
@pytest.mark.parametrize("kind", WITH_THRESHOLDS)
def test_a_threshold_that_holds_nothing_is_refused(kind, value):
    message = r"expected the threshold of layer to be positive and finite, got .*; give thresholds="
    with pytest.raises(InputError, match=message):
        WITH_THRESHOLDS[kind]([layer()], thresholds={"layer": value})


@pytest.mark.parametrize("given", [[1, 2], 3.0, {("layer", 1.0)}])
@pytest.mark.parametrize("kind", WITH_THRESHOLDS)
def test_thresholds_are_a_mapping(kind, given):
    with pytest.raises(InputError, match=r"expected thresholds by name, got \w+; give thresholds="):
        WITH_THRESHOLDS[kind]([layer()], thresholds=given)


def test_a_file_of_thresholds_is_one_of_a_budget(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing: cannot be read .*; give the file of"):
        SpikeClip([layer()], thresholds=tmp_path / "missing")


@pytest.mark.parametrize("kind", WITH_THRESHOLDS)
def test_a_threshold_of_no_layer_is_an_error_as_an_idle_glob_is(kind):
    known = {"layer": 1.0, "leyar": 2.0}
    message = r"'leyar' in thresholds= is no matrix that is held .* look like 'layer'; correct"
    with pytest.raises(RecipeError, match=message):
        WITH_THRESHOLDS[kind]([layer()], thresholds=known)


def test_thresholds_may_be_those_of_another_holder():
    known = SpikeClip([layer()]).thresholds
    for value in (known, {"layer": torch.tensor(known["layer"], dtype=torch.float64)}):
        assert SpikeClip([layer()], thresholds=value).thresholds == known


@pytest.mark.parametrize("level", [1e300, 10.5])
def test_a_level_that_holds_nothing_is_refused(level):
    message = r"expected level ≤ 10, got .*; give \w+ a number"
    for kind in HOLDERS.values():
        with pytest.raises(InputError, match=message):
            kind([layer()], level=level)
    with pytest.raises(InputError, match=message):
        hold_update(nn.Linear(40, 50), level=level)


# -- optimisers -----------------------------------------------------------------------------------

ATTACHED = HOLDERS | {"OrthonormalFactors": OrthonormalFactors}


def trained(name):
    matrix = layer(name)
    for x in matrix.parameters:
        x.requires_grad_()
    return matrix


def of(*matrices):
    return [x for matrix in matrices for x in matrix.parameters]


@pytest.mark.parametrize("kind", ATTACHED)
def test_an_optimiser_of_some_layers_is_refused(kind):
    """The other optimiser steps, and what it trains is not held."""
    first, second, third = (trained(name) for name in ("first", "second", "third"))
    holder = ATTACHED[kind]([first, second, third])
    message = r"got SGD, which does not train second, third: .* for each optimiser with include="
    with pytest.raises(InputError, match=message):
        holder.attach(torch.optim.SGD(of(first), lr=1.0))
    holder.attach(torch.optim.SGD(of(first, second, third), lr=1.0))


def test_also_when_it_loses_them_later():
    first, second = trained("first"), trained("second")
    optimizer = torch.optim.SGD(of(first, second), lr=1.0)
    SpikeClip([first, second]).attach(optimizer)
    optimizer.param_groups[0]["params"] = of(first)
    with pytest.raises(InputError, match="which does not train second"):
        optimizer.step()


@pytest.mark.parametrize("kind", ATTACHED)
def test_a_holder_for_each_optimiser(kind):
    matrices = [trained("first"), trained("second")]
    for matrix in some(matrices):
        holder = ATTACHED[kind](matrices, include=matrix.name)
        handle = holder.attach(torch.optim.SGD(of(matrix), lr=1.0))
        assert holder.matrices == [matrix]
        handle.remove()


SETUPS = {
    "LoRA+": lambda a, b: [{"params": [a.A, b.A]}, {"params": [a.B, b.B], "lr": 16.0}],
    "a group a layer": lambda a, b: [{"params": of(a)}, {"params": of(b)}],
    "A alone": lambda a, b: [a.A, b.A],
    "B alone": lambda a, b: [a.B, b.B],
    "more than that": lambda a, b: [*of(a, b), torch.zeros(3, requires_grad=True)],
}


@pytest.mark.parametrize("setup", SETUPS)
def test_parameter_groups_are_one_optimiser(setup):
    a, b = trained("a"), trained("b")
    optimizer = torch.optim.SGD(SETUPS[setup](a, b), lr=1.0)
    SpikeClip([a, b], thresholds={"a": 0.1, "b": 0.1}).attach(optimizer)
    sum((x.B @ x.A).sum() for x in (a, b)).backward()
    optimizer.step()
    assert max(map(strongest, (a, b))) <= 0.09


def test_frozen_layers_need_no_optimiser():
    a, frozen = trained("a"), layer("frozen", size=1e-3)
    clip = SpikeClip([a, frozen])
    clip.attach(torch.optim.SGD(of(a), lr=1.0))
    assert clip.strongest["frozen"] < 0.9


def test_views_of_one_parameter_are_trained_by_its_optimiser():
    """Experts in one stack: all but the first begin inside it."""
    A, B = (nn.Parameter(draw(3, *shape)) for shape in ((2, 40), (50, 2)))
    experts = [AdaptedMatrix(f"expert.{i}", draw(50, 40), A[i], B[i]) for i in range(3)]
    clip = SpikeClip(experts)
    clip.attach(torch.optim.SGD([A, B], lr=1.0))
    other = trained("other")
    with pytest.raises(InputError, match=r"which does not train expert\.0, expert\.1, expert\.2:"):
        SpikeClip([*experts, other]).attach(torch.optim.SGD(of(other), lr=1.0))


# -- saved states ---------------------------------------------------------------------------------


def controller():
    control = RankController([layer(), layer("other")], start=2)
    control.step()
    return control


def monitor():
    watching = Monitor([layer(), layer("other")], every=1, per_call=1, top_k=2)
    watching.step()
    return watching


def penalty():
    return IntruderPenalty([layer()])


BAD_NUMBERS = [float("nan"), float("inf"), -1.0, "x", None, [1]]
NOT_WHOLE = [-5, 1.5, "x", None, True]
BAD_STATES = [
    *((controller, ("thresholds", "layer"), x, "the threshold of layer") for x in BAD_NUMBERS),
    *((controller, ("layers", "layer", "rank"), x, "the state of layer") for x in (0, 3, 99)),
    *((controller, ("layers", "layer", "rank"), x, "the state of layer") for x in NOT_WHOLE),
    *((controller, ("layers", "layer", "strongest"), x, "of layer") for x in BAD_NUMBERS),
    *((controller, ("layers", "layer", "effective_rank"), x, "of layer") for x in BAD_NUMBERS),
    *((controller, ("steps",), x, "the state of RankController") for x in NOT_WHOLE),
    *((monitor, ("thresholds", "layer"), x, "the threshold of layer") for x in BAD_NUMBERS),
    *((monitor, ("layers", "layer", "worst"), x, "the state of layer") for x in BAD_NUMBERS),
    *((monitor, ("layers", "layer", "intruders"), x, "the state of layer") for x in NOT_WHOLE),
    *(
        (monitor, (what,), x, "the state of Monitor")
        for what in ("steps", "next")
        for x in NOT_WHOLE
    ),
    *((penalty, ("calls",), x, "the state of IntruderPenalty") for x in NOT_WHOLE),
]


def changed(state, path, change):
    """A copy of a state with another entry."""
    state = json.loads(json.dumps(state))
    inner = state
    for name in path[:-1]:
        inner = inner[name]
    change(inner, path[-1])
    return state


def require_refused(make, state, message):
    """Refused, and nothing of it taken."""
    thing = make()
    before = json.dumps(thing.state_dict())
    with pytest.raises(InputError, match=message):
        thing.load_state_dict(state)
    assert json.dumps(thing.state_dict()) == before


@pytest.mark.parametrize(("make", "path", "value", "message"), BAD_STATES)
def test_a_state_with_a_value_that_cannot_be_is_refused(make, path, value, message):
    state = changed(make().state_dict(), path, lambda inner, name: inner.update({name: value}))
    require_refused(make, state, message)


WHOLE_STATE = [("steps",), ("thresholds",), ("layers",)]
LAYERS = [("thresholds", "layer"), ("layers", "layer")]
LAYER_ENTRIES = [("layers", "layer", "effective_rank"), ("layers", "layer", "strongest")]


@pytest.mark.parametrize(
    "path", [("steps",), ("thresholds",), ("layers",), *LAYERS, *LAYER_ENTRIES]
)
@pytest.mark.parametrize("make", [controller, monitor])
def test_a_state_that_lacks_something_is_refused(make, path):
    state = changed(make().state_dict(), path, lambda inner, name: inner.pop(name))
    if (make, path) == (monitor, ("layers", "layer")):  # it was not checked yet
        monitor().load_state_dict(state)
        return
    require_refused(make, state, f"the same layers.* layer|the state of .*{path[-1]}")


@pytest.mark.parametrize("path", [("new",), ("thresholds", "new"), ("layers", "layer", "new")])
@pytest.mark.parametrize("make", [controller, monitor])
def test_a_state_with_something_more_is_refused(make, path):
    state = changed(make().state_dict(), path, lambda inner, name: inner.update({name: 1.0}))
    require_refused(make, state, "the same layers.* new|the state of .* got .*'new'")


def test_figures_of_a_layer_that_is_not_watched_are_refused():
    state = monitor().state_dict()
    state["layers"]["third"] = state["layers"]["layer"]
    require_refused(monitor, state, "the same layers; only one side has third")


@pytest.mark.parametrize("state", [{}, [], None, "x", 3])
@pytest.mark.parametrize("make", [controller, monitor, penalty])
def test_what_is_no_state_is_refused(make, state):
    require_refused(make, state, r"expected the state of \w+ to have the entries \[.*\], got ")


@pytest.mark.parametrize("make", [controller, monitor, penalty])
def test_a_state_of_its_own_is_taken(make):
    thing = make()
    thing.load_state_dict(json.loads(json.dumps(make().state_dict())))
    assert thing.state_dict() == make().state_dict()


# -- what is no model, no pattern, no generator and no name ---------------------------------------


@pytest.mark.parametrize("given", ["x", 3, None, [1], ["layer"], [layer(), None], {"layer": 1}])
@pytest.mark.parametrize("kind", ADAPTED)
def test_what_is_no_model_is_refused(kind, given):
    message = r"expected a model that PEFT has wrapped, or a list of matrices .*, got a \w+"
    with pytest.raises(InputError, match=message):
        ADAPTED[kind](given)


def test_a_full_weight_has_no_factors_that_could_be_held():
    (matrix,) = full_matrices(nn.Linear(40, 50))
    Monitor([matrix])
    with pytest.raises(InputError, match=r"got a list with a NamedWeight"):
        OrthonormalFactors([matrix])


@pytest.mark.parametrize("given", ["x", None, [nn.Linear(40, 50)]])
def test_full_matrices_are_those_of_a_module(given):
    with pytest.raises(InputError, match="expected model to be a module, got"):
        full_matrices(given)


@pytest.mark.parametrize("include", [None, 3, [None], ["*", 3]])
@pytest.mark.parametrize("kind", ADAPTED)
def test_patterns_are_texts(kind, include):
    with pytest.raises(RecipeError, match=r"expected a glob such as 'layers\.\*', or several, got"):
        ADAPTED[kind]([layer()], include=include)


def test_a_callback_refuses_the_same():
    Callback = pytest.importorskip("bulkedge.tune.trainer").IntruderMonitor
    with pytest.raises(RecipeError, match="expected a glob such as"):
        Callback(include=3)
    with pytest.raises(InputError, match="expected thresholds by name, got list"):
        Callback(thresholds=[1, 2])


@pytest.mark.parametrize("generator", [5, "x", torch.Generator])
def test_a_generator_is_one_of_torch(generator):
    with pytest.raises(InputError, match=r"expected generator to be a torch\.Generator, got "):
        OrthonormalFactors([layer()], generator=generator)


@pytest.mark.parametrize("name", [5, None, b"weight"])
def test_the_name_of_a_parameter_is_a_text(name):
    with pytest.raises(InputError, match="expected name to be a text, got "):
        hold_update(nn.Linear(40, 50), name)
