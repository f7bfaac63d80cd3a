"""What holders are given by mistake: each is refused, by name, and none is held by nothing."""

import pytest
import torch

from bulkedge import InputError
from bulkedge.tune import AdaptedMatrix, RankController, SpikeClip, _clip_spikes

HOLDERS = {
    "SpikeClip": SpikeClip,
    "RankController": lambda matrices, **options: RankController(matrices, start=2, **options),
}


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
