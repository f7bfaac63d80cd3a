"""Updates held at their threshold: what is held, what is left alone, and where it is attached."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bulkedge import InputError
from bulkedge.tune import AdaptedMatrix, SpikeClip
from bulkedge.tune._core_svd import accurate_spikes, spikes
from bulkedge.update import BaseSpectrum, effective_rank
from cases import orthonormal
from helpers import some

WIDE = torch.float64


def draw(*shape, seed=0, dtype=WIDE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE).to(dtype)


def layer(gammas, m=60, n=50, scale=0.5, dtype=WIDE, name="layer", seed=0):
    """A noise base and factors, badly balanced, with these spikes."""
    gammas = torch.as_tensor(gammas, dtype=WIDE)
    r = len(gammas)
    mix = draw(r, r, seed=seed + 3) + 2 * torch.eye(r)
    B = orthonormal(m, r, seed) * gammas / scale @ mix
    A = torch.linalg.inv(mix) @ orthonormal(n, r, seed + 1).mT
    W0 = draw(m, n, seed=seed + 2) / (m**0.5 + n**0.5)
    return AdaptedMatrix(name, W0.to(dtype), A.to(dtype), B.to(dtype), lambda: scale)


def update(matrix):
    return matrix.scale * matrix.B.double() @ matrix.A.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, WIDE])
def test_it_is_the_projection_onto_the_ball(dtype):
    matrix = layer([2.0, 1.0, 0.3, 0.0], dtype=dtype)
    U, S, Vt = torch.linalg.svd(update(matrix), full_matrices=False)
    assert SpikeClip([matrix], level=0.8, thresholds={"layer": 1.0}).step() == 1
    error = {torch.bfloat16: 2e-2, torch.float32: 1e-5, WIDE: 1e-12}[dtype]
    torch.testing.assert_close(
        update(matrix), U * S.clamp_max(0.8) @ Vt, rtol=0, atol=error, check_dtype=False
    )
    strongest = float(torch.linalg.svdvals(update(matrix))[0])
    assert 0.8 * (1 - max(error / 2, 1e-11)) < strongest <= 0.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("seed", range(8))
def test_rounded_factors_are_at_the_level_and_never_above(dtype, seed):
    """A Gaussian pair, as training leaves them: many spikes end at the level together."""
    A, B = draw(8, 200, seed=seed).to(dtype), draw(300, 8, seed=seed + 50).to(dtype)
    matrix = AdaptedMatrix("layer", draw(300, 200, seed=9), A, B, lambda: 2.0)
    for theta in (7.7, 1.0, 1e-3):
        clip = SpikeClip([matrix], level=0.9, thresholds={"layer": theta})
        assert clip.step() == 1
        strongest = float(torch.linalg.svdvals(update(matrix))[0])
        assert 0.9 * theta * (1 - torch.finfo(dtype).eps) < strongest <= 0.9 * theta
        assert clip.step() == 0


def test_inside_nothing_is_touched_to_the_bit():
    matrix = layer([0.5, 0.2])
    B, A = matrix.B.clone(), matrix.A.clone()
    clip = SpikeClip([matrix], level=0.8, thresholds={"layer": 1.0})
    assert clip.step() == 0
    assert clip.strongest["layer"] == pytest.approx(0.5)
    assert torch.equal(matrix.B, B)
    assert torch.equal(matrix.A, A)


def test_factors_change_as_little_as_they_can():
    """Half of the change in either: the direction that is held keeps its balance."""
    matrix = layer([2.0, 0.3])
    B, A = matrix.B.clone(), matrix.A.clone()
    SpikeClip([matrix], level=1.0, thresholds={"layer": 1.0}).step()
    spikes = torch.linalg.svd(matrix.scale * B @ A)
    u, v = spikes.U[:, 0], spikes.Vh[0]
    torch.testing.assert_close(u @ matrix.B, 0.5**0.5 * (u @ B), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(matrix.A @ v, 0.5**0.5 * (A @ v), rtol=1e-6, atol=1e-9)
    others = torch.eye(60, dtype=WIDE) - u[:, None] * u
    torch.testing.assert_close(others @ matrix.B, others @ B)


def test_a_zero_update_and_a_negative_scale():
    zero = AdaptedMatrix("zero", draw(30, 20), draw(2, 20), torch.zeros(30, 2, dtype=WIDE))
    negative = layer([2.0], scale=-1.0, name="negative")
    clip = SpikeClip([zero, negative], level=1.0, thresholds={"zero": 1.0, "negative": 1.0})
    assert clip.step() == 1
    assert clip.strongest["zero"] == 0
    assert float(torch.linalg.svdvals(update(negative))[0]) == pytest.approx(1.0)


def test_spikes_of_many_are_those_of_each():
    matrices = [layer([3.0, 2.0, 1e-3], m, n, seed=m) for m, n in [(60, 50), (20, 90), (60, 50)]]
    matrices.append(layer([1.0], 30, 40))
    for found in some([*accurate_spikes(matrices), *spikes(matrices)]):
        for i, gamma, bound in some(zip(found.members, found.gamma, found.bounds, strict=True)):
            exact = torch.linalg.svdvals(update(matrices[i]))[: matrices[i].rank]
            torch.testing.assert_close(gamma, exact, rtol=1e-9, atol=1e-9)
            assert float(exact[0]) * (1 - 1e-15) <= bound <= float(exact[0]) * (1 + 1e-9)


def test_thresholds_are_those_of_the_fitted_bulk():
    matrix = layer([1.0])
    assert SpikeClip([matrix]).thresholds["layer"] == BaseSpectrum.of(matrix.base).fit.threshold


def test_a_base_without_a_threshold_is_refused():
    step = torch.eye(40, dtype=WIDE)
    with pytest.raises(
        InputError, match=r"expected a layer with a bulk, and so a threshold, got none of 1: layer"
    ):
        SpikeClip([AdaptedMatrix("layer", step, draw(1, 40), draw(40, 1))])
    with pytest.raises(InputError, match=r"expected level to be positive and finite, got 0\.0"):
        SpikeClip([layer([1.0])], level=0.0)
    with pytest.raises(InputError, match=r"layer: expected W0 \(m, n\), B \(m, r\)"):
        AdaptedMatrix("layer", step, draw(1, 40), draw(39, 1))


def test_attached_to_an_optimiser_it_holds_after_each_step():
    matrix = layer([0.5])
    matrix.A.requires_grad_()
    matrix.B.requires_grad_()
    optimizer = torch.optim.SGD([matrix.A, matrix.B], lr=1.0)
    clip = SpikeClip([matrix], level=1.0, thresholds={"layer": 0.1})
    handle = clip.attach(optimizer)
    assert float(torch.linalg.svdvals(update(matrix).detach())[0]) <= 0.1
    (-(matrix.B @ matrix.A).sum()).backward()
    optimizer.step()
    assert clip.strongest["layer"] > 1
    assert float(torch.linalg.svdvals(update(matrix).detach())[0]) <= 0.1
    handle.remove()
    optimizer.step()
    assert float(torch.linalg.svdvals(update(matrix).detach())[0]) > 0.1


@pytest.mark.parametrize("tied", ["A", "B"])
def test_a_factor_that_layers_share_is_left_alone(tied):
    """What lowers the one update could raise the other: what is their own changes."""
    first, second = layer([2.0, 1.0], name="first"), layer([3.0, 0.5], name="second", seed=20)
    shared = getattr(first, tied)
    pair = {"A": second.A, "B": second.B} | {tied: shared}
    second = AdaptedMatrix("second", second.base, pair["A"], pair["B"], lambda: 0.5)
    kept = shared.clone()
    clip = SpikeClip([first, second], level=0.9, thresholds={"first": 1.0, "second": 0.3})
    assert clip.step() == 2
    assert torch.equal(shared, kept)
    for matrix, theta in ((first, 1.0), (second, 0.3)):
        strongest = float(torch.linalg.svdvals(update(matrix))[0])
        assert strongest == pytest.approx(0.9 * theta, rel=1e-9)


def test_two_shared_factors_are_refused():
    A, B, C = draw(2, 50), draw(60, 2), draw(2, 50, seed=3)
    base = draw(60, 50)
    matrices = [
        AdaptedMatrix("both", base, A, B),
        AdaptedMatrix("one", base, C, B),
        AdaptedMatrix("other", base, A, draw(60, 2, seed=4)),
    ]
    known = dict.fromkeys(("both", "one", "other"), 1e-3)
    with pytest.raises(InputError, match=r"both: expected a factor that is trained and its own"):
        SpikeClip(matrices, thresholds=known).step()


def test_a_scaling_that_is_not_finite_is_refused():
    matrix = layer([1.0])
    matrix.scaling = lambda: float("nan")
    with pytest.raises(InputError, match="layer: expected a finite scaling, got nan"):
        SpikeClip([matrix], thresholds={"layer": 1.0}).step()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (torch.full((60, 50), torch.nan), "layer: expected a base with finite entries, got NaN"),
        (torch.empty(60, 50, device="meta"), "layer: expected a base in memory, got one on the"),
    ],
)
def test_a_base_without_numbers_is_refused(base, message):
    with pytest.raises(InputError, match=message):
        SpikeClip([AdaptedMatrix("layer", base, draw(1, 50), draw(60, 1))])


def test_spikes_of_what_is_not_finite_name_the_layer():
    matrix = layer([1.0])
    matrix.B[0, 0] = torch.nan
    with pytest.raises(InputError, match="layer: expected finite entries, got NaN or Inf in B"):
        matrix.spikes()


def test_effective_rank():
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([1.0, 1e-9])) == pytest.approx(1, abs=1e-6)
    assert effective_rank(torch.zeros(3)) == 0


class Count(TorchDispatchMode):
    """Counts the operations on tensors by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.name()] += 1
        return function(*args, **(kwargs or {}))


def test_the_decompositions_of_a_step_hang_on_ranks_not_on_layers():
    """All are measured together, and once more after they were rounded: mostly they obey then."""
    shapes = [(60, 50)] * 4 + [(40, 50)] * 2
    matrices = [
        layer([3.0, 0.5], m, n, dtype=torch.float32, name=f"layer{i}", seed=5 * i)
        for i, (m, n) in enumerate(shapes)
    ]
    clip = SpikeClip(matrices, level=1.0, thresholds={x.name: 1.0 for x in matrices})
    with Count() as seen:
        assert clip.step() == 6
    assert seen.calls["aten::_linalg_eigh"] == 2
    with Count() as seen:
        assert clip.step() == 0
    assert seen.calls["aten::_linalg_eigh"] == 1
    assert seen.calls["aten::_linalg_svd"] == 0
    assert all(float(x.strengths[0]) == pytest.approx(1.0, rel=1e-6) for x in matrices)


@pytest.mark.parametrize("dtype", [torch.float32, WIDE])
def test_a_bound_is_no_less_than_any_spike_of_factors_that_cancel(dtype):
    """``B`` is nearly orthogonal to ``Aᵀ``: squares know little of such an update, and say so."""
    for power in range(4):
        B, A = draw(60, 4), draw(4, 50, seed=1)
        B[:, 1:] = B[:, :1] + 10.0**-power * B[:, 1:]
        A[0] = -A[1:].sum(dim=0) + 10.0**-power * A[0]
        matrix = AdaptedMatrix("layer", draw(60, 50, seed=2), A.to(dtype), B.to(dtype))
        strongest = float(torch.linalg.svdvals(update(matrix))[0])
        (found,) = spikes([matrix])
        assert found.bounds[0] >= strongest * (1 - 1e-14)
        clip = SpikeClip([matrix], level=1.0, thresholds={"layer": strongest / 2})
        assert clip.step() == 1
        assert float(torch.linalg.svdvals(update(matrix))[0]) <= strongest / 2 * (1 + 1e-9)


def test_a_second_spike_far_below_the_first_is_lowered_too():
    """Squares do not see it beside the first: such an update is measured by an SVD."""
    matrix = layer([1e5, 3.0, 0.5])
    assert SpikeClip([matrix], level=1.0, thresholds={"layer": 1.0}).step() == 1
    left = torch.linalg.svdvals(update(matrix))[:3]
    assert float(left[0]) <= 1 + 1e-9
