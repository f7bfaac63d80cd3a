"""What holders are given by mistake: each is refused, by name, and none is held by nothing."""

import pytest
import torch
from torch import nn

from bulkedge import InputError, RecipeError
from bulkedge.tune import (
    AdaptedMatrix,
    IntruderPenalty,
    Monitor,
    OrthonormalFactors,
    RankController,
    SpikeClip,
    _clip_spikes,
    hold_update,
)

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
    calls, measure = [], _clip_spikes.core_svds

    def counted(matrices):
        calls.append(len(matrices))
        assert len(calls) < 500, "it does not end"
        return measure(matrices)

    monkeypatch.setattr(_clip_spikes, "core_svds", counted)
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
    assert len(SpikeClip([layer(), layer(), layer("other")], modules="other").matrices) == 1


# -- thresholds and levels ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0, "x", None, True, [1.0]])
@pytest.mark.parametrize("kind", WITH_THRESHOLDS)
def test_a_threshold_that_holds_nothing_is_refused(kind, value):
    message = r"expected the threshold of layer to be positive and finite, got .*; give thresholds="
    with pytest.raises(InputError, match=message):
        WITH_THRESHOLDS[kind]([layer()], thresholds={"layer": value})


@pytest.mark.parametrize("given", [[1, 2], 3.0, "layer", {("layer", 1.0)}])
@pytest.mark.parametrize("kind", WITH_THRESHOLDS)
def test_thresholds_are_a_mapping(kind, given):
    with pytest.raises(InputError, match=r"expected thresholds by name, got \w+; give thresholds="):
        WITH_THRESHOLDS[kind]([layer()], thresholds=given)


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
