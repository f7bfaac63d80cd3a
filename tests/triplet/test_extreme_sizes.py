"""Entries near the ends of a dtype: every entry is right to rounding, or refuses with a remedy."""

import math
import re

import pytest
import torch

import bulkedge.spectral as spectral
from bulkedge import InputError, singular_triplet
from bulkedge._linmap import Dense, LowRank, times_power
from bulkedge.spectral import Probable, Rigorous, project_spectral_ball, spectral_norm
from bulkedge.spectral._track import fresh_start, track, working
from bulkedge.triplet import (
    BlockKrylov,
    GolubKahan,
    LinearMap,
    Minres,
    thin_svd,
    truncate,
)
from cases import gaussian, generator
from helpers import some

BIG = {torch.float64: 1022, torch.float32: 126, torch.bfloat16: 126, torch.float16: 15}
SMALL = {torch.float64: -1060, torch.float32: -140, torch.bfloat16: -128, torch.float16: -20}
POWERS = [
    pytest.param(dtype, powers[dtype] - back, id=f"{str(dtype)[6:]}-{powers[dtype] - back}")
    for powers, backs in ((BIG, (0, 4, 9)), (SMALL, (0,)))
    for dtype in BIG
    for back in backs
]
SHAPES = [(30, 20), (20, 30), (230, 210), (1, 7), (3, 3)]


def matrix(shape, dtype, power):
    """Entries up to ``2^power`` in size, and the same over ``2^power`` in float64, exactly."""
    A = gaussian(*shape) + 2
    A = times_power(A / A.abs().max() * (1 - 2.0**-6), power).to(dtype)
    assert A.isfinite().all()
    return A, times_power(A.double(), -power)


def norm_of_map(A, solver=None):
    return singular_triplet(A if isinstance(A, LinearMap) else Dense(A), solver=solver).sigma[0]


def compiled_norm(A):
    return torch.compile(spectral_norm, backend="eager")(A)


def tracked_norm(A):
    A = Dense(working(A))
    return track(A, fresh_start(A), rtol=1e-4)[0].sigma[0]


# these give ‖A‖₂
NORMS = {
    "triplet": lambda A: singular_triplet(A).sigma[0],
    "several": lambda A: singular_triplet(A, min(2, *A.shape)).sigma[0],
    "batch": lambda A: singular_triplet(torch.stack([A, A])).sigma[1, 0],
    "vmap": lambda A: torch.func.vmap(spectral_norm)(torch.stack([A, A]))[1],
    "compiled": compiled_norm,
    "map": norm_of_map,
    "sum": lambda A: singular_triplet(0.5 * Dense(A) + 0.5 * Dense(A)).sigma[0],
    "golub_kahan": lambda A: norm_of_map(A, GolubKahan()),
    "proved": lambda A: norm_of_map(A, GolubKahan(failure_probability=1e-9, oversample=8)),
    "block_krylov": lambda A: norm_of_map(A, BlockKrylov()),
    "norm": spectral_norm,
    "tracked": tracked_norm,
    "thin_svd": lambda A: thin_svd(A if A.dtype in (torch.float32, torch.float64) else A.float())[
        1
    ][0],
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def attempt(act, *given):
    """What is given back, and the message of a refusal."""
    try:
        return act(*given), ""
    except InputError as error:
        return None, str(error)


def two_to(exponent):
    """A power of two, or the largest or least one that has an inverse."""
    return 2.0 ** min(max(exponent, -1022), 1022)


def numbers_of(dtype):
    """The largest number of a result, and the spacing of the smallest ones."""
    limits = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32)
    return math.frexp(limits.max)[1], math.frexp(limits.tiny * limits.eps)[1] - 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "power"), POWERS)
@pytest.mark.parametrize("entry", NORMS)
def test_norms_are_right_or_refused(entry, dtype, power, shape):
    A, unit = matrix(shape, dtype, power)
    true = float(torch.linalg.matrix_norm(unit, 2))
    largest, spacing = numbers_of(dtype)
    exceeds = true * (1 - 1e-3) >= two_to(largest - power)
    found, refusal = attempt(NORMS[entry], A)
    assert bool(refusal) == exceeds, refusal
    if refusal:
        wide = dtype is torch.float64
        assert f"{'float64' if wide else 'float32'} can hold" in refusal
        assert "divide the matrix by a large number" in refusal
        assert ("convert it to float64" in refusal) == (not wide)
        return
    found = float(times_power(found.double(), -power))
    slack = 1e-3 if entry == "tracked" else TOLERANCE[dtype]
    assert found == pytest.approx(true, rel=slack, abs=two_to(spacing - power))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "power"), POWERS)
@pytest.mark.parametrize("certificate", [Rigorous(), Probable()], ids=["rigorous", "probable"])
def test_certificates_hold(certificate, dtype, power, shape):
    A, unit = matrix(shape, dtype, power)
    true = float(torch.linalg.matrix_norm(unit, 2))
    found = certificate.bound(Dense(A))
    low, high = (math.frexp(x) for x in (found.lower, found.upper))
    low, high = (math.ldexp(x, e - power) for x, e in (low, high))
    assert low <= true * (1 + 1e-12)
    assert high >= true * (1 - 1e-12) or math.isinf(found.upper)
    if math.isfinite(found.upper):
        slack = two_to(-1073 - power)  # the spacing of float64
        assert high <= low * 1.011 + slack
    else:
        assert true * 2.0 ** (power - 1000) > 2.0**23


def down(power):
    """A bound of ``2^power``, or the nearest that is a float."""
    return math.ldexp(1.0, max(power, -1070))


# these give a matrix, whose reference the second function makes from one of norm about one
RESULTS = {
    "truncate": (lambda A, p: truncate(A, 1), lambda U, S, V: (U[:, :1] * S[:1]) @ V[:, :1].mT, 1),
    "normalize": (lambda A, p: spectral.normalize(A), lambda U, S, V: (U * S) @ V.mT / S[0], 0),
    "cap": (
        lambda A, p: spectral.cap(A, down(p)),
        lambda U, S, V: (U * S) @ V.mT / S[0].clamp_min(1),
        1,
    ),
    "rescale": (
        lambda A, p: project_spectral_ball(A, down(p), "rescale"),
        lambda U, S, V: (U * S) @ V.mT / S[0].clamp_min(1),
        1,
    ),
    "clip": (
        lambda A, p: project_spectral_ball(A, down(p)),
        lambda U, S, V: (U * S.clamp_max(1)) @ V.mT,
        1,
    ),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "power"), POWERS)
@pytest.mark.parametrize("entry", RESULTS)
def test_matrices_are_right_or_refused(entry, dtype, power, shape):
    A, unit = matrix(shape, dtype, power)
    act, reference, scales = RESULTS[entry]
    if entry == "clip" and dtype is torch.float16:
        pytest.skip("clip works in the dtype of W, where rounding is 2^-11")
    U, S, V = thin_svd(unit)
    largest, _ = numbers_of(dtype)
    exceeds = float(S[0]) * (1 - 1e-3) >= two_to(largest - power)
    expected = reference(U, S, V)
    rounded = times_power(expected, power * scales).to(dtype)
    found, refusal = attempt(act, A, power)
    if refusal:
        assert exceeds or not rounded.isfinite().all() or (entry == "normalize" and power < 0)
        assert "can hold" in refusal or "subnormal" in refusal
        assert any(word in refusal for word in ("convert", "divide", "multiply"))
        return
    limits = torch.finfo(dtype)
    assert found.dtype is dtype
    assert found.isfinite().all()
    error = (times_power(found.double(), -power * scales) - expected).abs().max()
    spacing = two_to(math.frexp(limits.tiny * limits.eps)[1] - 1 - power * scales)
    relative = 4 * limits.eps if dtype in (torch.float16, torch.bfloat16) else 10 * TOLERANCE[dtype]
    # a sum of products of subnormal numbers rounds each of them
    assert float(error) <= relative * float(expected.abs().max()) + 16 * spacing * scales


def slope_of_norm(A):
    spectral_norm(A).backward()
    return A.grad


def slope_of_vectors(A):
    found = singular_triplet(A)
    (found.u[0, 0] * found.v[0, 0]).backward()
    return A.grad


def slope_by_map(A):
    found = singular_triplet(Dense(A), adjoint=Minres())
    (found.u[0, 0] * found.v[0, 0]).backward()
    return A.grad


def slope_by_vmap(A):
    def loss(X):
        found = singular_triplet(X)
        return found.u[0, 0] * found.v[0, 0]

    return torch.func.vmap(torch.func.grad(loss))(torch.stack([A, A]).detach())[1]


# gradients, and the power of the size of A that they are proportional to
SLOPES = {
    "norm": (slope_of_norm, 0),
    "vectors": (slope_of_vectors, -1),
    "by_map": (slope_by_map, -1),
    "by_vmap": (slope_by_vmap, -1),
}


@pytest.mark.parametrize("shape", SHAPES[:3] + SHAPES[-1:], ids=str)
@pytest.mark.parametrize(("dtype", "power"), POWERS)
@pytest.mark.parametrize("entry", SLOPES)
def test_gradients_are_right_or_refused(entry, dtype, power, shape):
    A, unit = matrix(shape, dtype, power)
    act, degree = SLOPES[entry]
    expected = act(unit.clone().requires_grad_())
    largest, _ = numbers_of(dtype)
    exceeds = float(torch.linalg.matrix_norm(unit, 2)) * (1 - 1e-3) >= two_to(largest - power)
    limits = torch.finfo(dtype)
    ends = [math.frexp(x)[1] - 1 - power * degree for x in (limits.tiny * limits.eps, limits.max)]
    fits = float(expected.abs().max()) < two_to(ends[1] - 2)
    found, refusal = attempt(act, A.clone().requires_grad_())
    if refusal:
        assert exceeds or not fits, refusal
        assert "can hold" in refusal or "multiply the matrix" in refusal
        return
    if fits:
        wide = times_power(found.double(), -power * degree)
        narrow = dtype in (torch.float16, torch.bfloat16)
        relative = limits.eps if narrow else 100 * TOLERANCE[dtype]
        slack = relative * float(expected.abs().max()) + two_to(ends[0])
        assert float((wide - expected).abs().max()) <= slack


class Broken(LinearMap):
    """A map whose transposed products are not finite."""

    def __init__(self, matrix):
        self.matrix = matrix
        self.shape, self.dtype, self.device = tuple(matrix.shape), matrix.dtype, matrix.device

    def matmat(self, X):
        return self.matrix @ X

    def rmatmat(self, Y):
        return self.matrix.mT @ Y * math.nan

    def to_dense(self):
        return self.matrix * math.nan

    @property
    def tensors(self):
        return (self.matrix,)

    def with_tensors(self, *tensors):
        return Broken(*tensors)


SOLVERS = ["DenseSVD", "BlockKrylov", "GolubKahan", "Lanczos", "Refined", "Auto", "Power", "Newton"]
SOLVERS += ["GradientAscent", "RayleighQuotient", "Riemannian"]


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_map_whose_products_are_not_finite_is_refused(solver, shape):
    import bulkedge.triplet as triplet

    method = getattr(triplet, solver)()
    with pytest.raises(
        InputError, match=r"finite products, got NaN or Inf from Broken|NaN or Inf in the matrix"
    ):
        singular_triplet(Broken(gaussian(*shape)), 2, solver=method)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", BIG, ids=str)
def test_entries_that_are_not_finite_are_refused_everywhere(dtype, value):
    entries = NORMS | {name: lambda A, f=f: f[0](A, 0) for name, f in RESULTS.items()}
    entries |= {"rigorous": lambda A: Rigorous().bound(Dense(A))}
    entries |= {"probable": lambda A: Probable().bound(Dense(A))}
    for shape in some([(30, 20), (230, 210), (1, 7)]):
        A = gaussian(*shape).to(dtype)
        A[0, -1] = value
        for name, entry in some(entries.items()):
            _, refusal = attempt(entry, A)
            assert "NaN or Inf" in refusal, name
            assert not re.search("convert|divide", refusal), name  # neither would mend it


@pytest.mark.parametrize("power", [-149, -140, -133, -127, -1074, -1060, -1040, -1023])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (300, 210), (1, 3), (3, 3)], ids=str)
def test_residuals_of_subnormal_numbers_are_not_stated_too_small(shape, k, power):
    """Of what is returned: σ itself loses digits there."""
    k, dtype = min(k, *shape), torch.float32 if power > -150 else torch.float64
    for seed in range(3):
        normal = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
        A = times_power(normal, power).to(dtype)
        wide = times_power(A.double(), -power)
        if not bool(wide.any()):
            continue
        found = singular_triplet(A, k)
        sigma, residuals = (times_power(x.double(), -power) for x in (found.sigma, found.residuals))
        u, v = found.u.double(), found.v.double()
        left = torch.linalg.vector_norm(wide @ v - u * sigma, dim=0)
        right = torch.linalg.vector_norm(wide.mT @ u - v * sigma, dim=0)
        vectors = 4 * torch.finfo(dtype).eps * sigma[0]  # as returned, rounded to the dtype
        assert bool((residuals + vectors >= torch.hypot(left, right)).all())
        assert bool((found.vector_errors >= (residuals / sigma[0]).clamp(max=1)).all())
        assert bool((found.vector_errors > 0).all())


def test_a_product_of_factors_beyond_the_dtype_is_measured_by_its_products():
    B, A = gaussian(40, 2) * 2.0**100, gaussian(2, 30) * 2.0**-100
    true = torch.linalg.matrix_norm(B @ A, 2)
    low = LowRank(B.float(), A.float(), scale=2.0**-20)
    assert float(spectral_norm(low)) == pytest.approx(float(true) * 2.0**-20, rel=1e-5)
    huge = LowRank(B.float(), A.float() * 2.0**127, scale=1.0)
    with pytest.raises(
        InputError, match="float32 can hold, got larger ones; convert it to float64"
    ):
        spectral_norm(huge)


def test_a_product_of_factors_beyond_float64_is_refused_where_rounding_cannot_be_bounded():
    B, A = gaussian(40, 2) * 2.0**1000, gaussian(2, 30) * 2.0**30
    with pytest.raises(
        InputError, match=r"got NaN or Inf from 1\.0 \* LowRank\(.*divide the matrix"
    ):
        spectral_norm(LowRank(B, A * 2.0**970, scale=1.0))
    scaled = 2.0**-100 * LowRank(B, A, scale=1.0)
    true = float(torch.linalg.matrix_norm(gaussian(40, 2) @ gaussian(2, 30), 2))
    assert float(spectral_norm(scaled)) == pytest.approx(true * 2.0**930, rel=1e-10)
    with pytest.raises(InputError, match=r"expected factors of .* whose norms float64 can hold"):
        norm_of_map(scaled, GolubKahan())
