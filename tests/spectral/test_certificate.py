"""Every bound against a norm that is known, and each part of the proofs against arithmetic."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from bulkedge import InputError, spectral_norm
from bulkedge._linmap import Dense, LowRank
from bulkedge.spectral.certificate import Probable, Rigorous, rigorous
from bulkedge.spectral.certificate.probable import _beyond, _component_quantile, _upper_end
from bulkedge.spectral.certificate.rigorous import (
    _above,
    _defect_above,
    _lower_gram,
    _norm_above,
    _norm_below,
    _proven_square,
    _rayleigh_below,
    _root_above,
)
from bulkedge.triplet.solver._start import gaussian as gaussian_draw
from bulkedge.triplet.solver._start import seeded_by
from cases import MATRICES, SHAPES, gaussian, generator, orthonormal, with_spectrum
from helpers import some

CERTIFICATES = {"rigorous": Rigorous(), "probable": Probable()}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def hadamard(n):
    """Symmetric, orthogonal, entries ±1/√n: exact for n a power of four."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), H)
    return H / math.sqrt(n)


def integers(m, n, seed=0):
    return torch.randint(-9, 10, (m, n), generator=generator(seed)).double()


# norms that float64 holds exactly, of matrices that it holds exactly
KNOWN = {
    "hadamard": (hadamard(64), 1.0),
    "two_blocks": (torch.block_diag(4 * hadamard(16), 0.5 * hadamard(4)), 4.0),
    "tall_isometry": (hadamard(64)[:, :40] / 8, 0.125),
    "diagonal": (torch.diag(torch.tensor([0.75, -3.0, 2.5], dtype=torch.float64)), 3.0),
    "pythagorean": (torch.tensor([[3.0, 4.0]], dtype=torch.float64), 5.0),
    "ones": (torch.ones(16, 4, dtype=torch.float64), 8.0),
    "several_blocks": (hadamard(1024)[:, :600], 1.0),
    "scalar": (torch.tensor([[-7.0]], dtype=torch.float64), 7.0),
}


@pytest.mark.parametrize("certificate", CERTIFICATES)
@pytest.mark.parametrize("name", KNOWN)
def test_interval_holds_a_norm_that_is_known_exactly(name, certificate):
    matrix, norm = KNOWN[name]
    found = CERTIFICATES[certificate].bound(Dense(matrix))
    assert found.lower <= norm <= found.upper <= norm * 1.01
    assert found.lower >= norm * 0.99


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MATRICES)
def test_intervals_hold_the_norm(name, shape, dtype):
    matrix = MATRICES[name](*shape).to(dtype)
    norm = float(torch.linalg.svdvals(matrix.double())[0])
    slack = 1e-14 * max(shape)  # the oracle's own rounding
    for bound, width in ((Rigorous(), 2e-7), (Probable(), 0.0101)):
        found = bound.bound(Dense(matrix))
        assert found.lower <= norm * (1 + slack)
        assert norm * (1 - slack) <= found.upper <= norm * (1 + width)
        assert found.upper <= found.lower * (1 + width)


@pytest.mark.parametrize("bound", CERTIFICATES.values(), ids=CERTIFICATES)
def test_norms_of_vectors_in_rational_arithmetic(bound):
    for seed in range(30):
        row = torch.randn(1, 50, generator=generator(seed), dtype=torch.float64)
        square = sum(Fraction(x) ** 2 for x in row[0].tolist())
        for A in (row, row.mT):
            found = bound.bound(Dense(A))
            assert Fraction(found.lower) ** 2 <= square <= Fraction(found.upper) ** 2


@pytest.mark.parametrize("bound", CERTIFICATES.values(), ids=CERTIFICATES)
def test_subnormal_norm_is_rounded_outwards(bound):
    step = 2.0**-1074
    found = bound.bound(Dense(torch.full((1, 2), step, dtype=torch.float64)))
    assert found.lower <= step  # the norm is √2 steps
    assert found.upper == 2 * step


@pytest.mark.parametrize("shape", [(10**6, 1), (1, 300_000), (2, 10**5)], ids=str)
def test_rounding_that_always_errs_to_one_side_is_allowed_for(shape):
    """All terms of these products are equal, and so are their roundings."""
    exactly = 0.1 * math.sqrt(math.prod(shape))
    found = spectral_norm(torch.full(shape, 0.1, dtype=torch.float64), certified=Probable())
    assert found.lower <= exactly * (1 - 1e-15)
    assert found.upper >= exactly * (1 + 1e-15)


def test_rounding_of_a_map_that_cancels_is_allowed_for():
    g = torch.Generator().manual_seed(0)
    W, B = (x * torch.randn(300, 200, generator=g, dtype=torch.float64) for x in (1.0, 1e8))
    found = Probable(rtol=1e-12, max_passes=400).bound(Dense(B) + Dense(W) - Dense(B))
    exactly = float(torch.linalg.matrix_norm(W, 2))
    assert found.lower <= exactly <= found.upper < 1.001 * exactly


def test_zero_is_bounded_by_zero():
    for bound in CERTIFICATES.values():
        found = bound.bound(Dense(torch.zeros(5, 3)))
        assert (found.lower, found.upper) == (0.0, 0.0)


@pytest.mark.parametrize("shape", [(200, 200), (300, 200), (60, 500)])
def test_rigorous_is_tight(shape):
    A = gaussian(*shape)
    norm = float(torch.linalg.svdvals(A)[0])
    assert Rigorous().bound(Dense(A)).upper / norm - 1 < 1e-8
    # the proof itself needs far less than the margin it starts from
    v = torch.linalg.svd(A)[2][0]
    assert Rigorous(rtol=1e-13).bound(Dense(A), v).upper / norm - 1 < 1e-10


def test_probable_is_tight_and_costs_few_passes():
    A = gaussian(300, 200)
    norm = float(torch.linalg.svdvals(A)[0])
    found = Probable(rtol=1e-3).bound(Dense(A))
    assert norm <= found.upper < norm * 1.001
    assert found.lower > norm * 0.9999
    assert found.passes < 120
    assert found.failure == 1e-9


@pytest.mark.parametrize("bound", CERTIFICATES.values(), ids=CERTIFICATES)
@pytest.mark.parametrize(
    ("exponent", "dtype"),
    [(e, torch.float64) for e in (-1070, -1022, -500, 500, 1000)]
    + [(-145, torch.float32), (-126, torch.float32), (100, torch.float32)],
)
def test_scale_is_no_matter(bound, exponent, dtype):
    matrix, norm = KNOWN["two_blocks"]
    scaled = (matrix * 2.0 ** (exponent // 2)) * 2.0 ** (exponent - exponent // 2)
    found = bound.bound(Dense(scaled.to(dtype)))
    smallest = 2.0**-1074  # one step of the subnormal numbers
    norm = norm * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)
    assert found.lower <= norm <= found.upper <= norm * 1.01 + smallest
    assert found.lower >= norm * 0.99 - smallest


@pytest.mark.parametrize("bound", CERTIFICATES.values(), ids=CERTIFICATES)
def test_norm_beyond_the_largest_float(bound):
    A = torch.full((8, 8), 1.5e308, dtype=torch.float64)
    found = bound.bound(Dense(A))
    assert found.upper == math.inf
    assert found.lower > 1.79e308


def test_maps_are_bounded_as_their_dense_matrices():
    W0, B, A = gaussian(30, 20), gaussian(30, 2), gaussian(2, 20)
    tuned = Dense(W0) + LowRank(B, A, 0.5)
    norm = float(torch.linalg.matrix_norm(W0 + 0.5 * B @ A, 2))
    for linmap in (tuned, tuned.T, tuned.with_tensors(W0.float(), B.float(), A.float())):
        for bound in CERTIFICATES.values():
            found = bound.bound(linmap)
            assert found.lower <= norm * (1 + 1e-6)
            assert norm * (1 - 1e-6) <= found.upper <= norm * 1.02


def test_no_graph_is_kept():
    A = gaussian(20, 10).requires_grad_()
    for bound in CERTIFICATES.values():
        assert isinstance(bound.bound(Dense(A)).upper, float)


# --- the guess of the rigorous certificate ----------------------------------------------------


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_any_guess_gives_a_valid_bound_and_a_good_one_saves_passes(shape):
    A = with_spectrum(*shape, torch.linspace(2, 1, 40))  # ‖A‖₂ = 2, smallest 1
    V = torch.linalg.svd(A, full_matrices=False)[2]
    guesses = {
        "leading": V[0],
        "half": V[-1],  # its σ is half the norm
        "random": gaussian(shape[1], 1),
        "zero": torch.zeros(shape[1]),
        "tiny": 1e-300 * V[0],
        "huge": 1e308 * V[0].requires_grad_(),
    }
    found = {name: Rigorous().bound(Dense(A), guess) for name, guess in guesses.items()}
    for each in some(found.values()):
        assert each.lower <= 2 * (1 + 1e-14)
        assert 2 * (1 - 1e-14) <= each.upper < 2 * (1 + 1e-7)
    assert found["leading"].passes == found["huge"].passes == found["tiny"].passes <= 3
    assert found["half"].passes > 20


def test_search_that_finds_only_half_the_norm_still_ends_with_a_proof(monkeypatch):
    A = with_spectrum(60, 40, torch.linspace(2, 1, 40))
    worst = torch.linalg.svd(A)[2][39]
    monkeypatch.setattr(rigorous, "leading_vector", lambda *_: (worst, 1))
    found = Rigorous().bound(Dense(A))
    assert found.lower == pytest.approx(1)
    assert found.upper >= 2
    # nothing at all found: what remains is the Frobenius norm
    monkeypatch.setattr(rigorous, "leading_vector", lambda *_: (0 * worst, 1))
    found = Rigorous().bound(Dense(A))
    assert found.lower == 0
    frobenius = float(torch.linalg.vector_norm(A))
    assert frobenius * (1 - 1e-12) <= found.upper <= frobenius * (1 + 1e-12)


# --- the proof, piece by piece ------------------------------------------------------------------


def exact(matrix):
    return [[Fraction(x) for x in row] for row in matrix.tolist()]


def exact_defect(W, R, s):
    """s·I − WᵀW − RRᵀ in rational arithmetic, rounded to floats at the end."""
    W, R = exact(W.mT), exact(R)
    p = len(W)
    return torch.tensor(
        [
            [
                float(
                    (i == j) * Fraction(s)
                    - sum((x * y for x, y in zip(W[i], W[j], strict=True)), Fraction(0))
                    - sum((x * y for x, y in zip(R[i], R[j], strict=True)), Fraction(0))
                )
                for j in range(p)
            ]
            for i in range(p)
        ],
        dtype=torch.float64,
    )


def proven(W, s):
    return _proven_square(_lower_gram(W), s, _norm_above(W), terms=W.shape[0])


def test_whole_proof_needs_its_margin():
    """The same matrix from outside: some b below the norm has a factor, but is not the bound."""
    W = torch.full((4096, 1), 2.0**-27, dtype=torch.float64)
    W[0] = 1.0
    true = 1 + Fraction(4095, 2**54)
    below = 0
    for rtol in some(torch.linspace(4.4e-13, 4.7e-13, 200).tolist()):
        found = Rigorous(rtol).bound(Dense(W), torch.ones(1))
        assert Fraction(found.lower) ** 2 <= true <= Fraction(found.upper) ** 2
        at_first = found.upper < found.lower * (1 + 4 * rtol)  # proved with b = lower·(1 + rtol)
        below += at_first and Fraction(found.lower * (1 + rtol)) ** 2 < true
    assert below  # else this matrix tests nothing


@pytest.mark.parametrize("block", [4, 256])
@pytest.mark.parametrize("seed", range(4))
def test_bound_of_the_defect_holds_in_rational_arithmetic(seed, block, monkeypatch):
    monkeypatch.setattr(rigorous, "_BLOCK", block)
    W = torch.randn(12, 10, generator=generator(seed), dtype=torch.float64)
    s = float(torch.linalg.matrix_norm(W, 2)) ** 2 * (1 + 1e-9)
    R = torch.linalg.cholesky(s * torch.eye(10, dtype=torch.float64) - W.mT @ W)
    defect = float(torch.linalg.matrix_norm(exact_defect(W, R, s), 2))
    assert 0 < defect < proven(W, s) - Fraction(s)


@pytest.mark.parametrize("block", [4, 256])
def test_bound_holds_whatever_the_factorisation_returns(block, monkeypatch):
    monkeypatch.setattr(rigorous, "_BLOCK", block)
    W = torch.linalg.qr(gaussian(12, 10)).Q
    good = torch.linalg.cholesky_ex
    factors = {
        "zero": lambda M: 0 * M,
        "wrong_entry": lambda M: good(M).L + torch.eye(10).roll(3, 0).tril() * 0.5,
        "noise": lambda M: gaussian(10, 10).tril(),
        "blind": lambda M: torch.eye(10, dtype=torch.float64) * 0.6,
    }
    for make in factors.values():
        monkeypatch.setattr(
            torch.linalg,
            "cholesky_ex",
            lambda M, make=make: (make(M.tril() + M.tril(-1).mT), torch.tensor(0)),
        )
        for s in (0.25, 0.9, 1.5):
            assert proven(W, s) >= 1 - 1e-12, s


def test_rounding_of_the_gram_matrix_is_accounted_for():
    """Squares of 2⁻²⁷ vanish beside a 1: the computed ‖A‖² is below the true one."""
    q = 4096
    W = torch.full((q, 1), 2.0**-27, dtype=torch.float64)
    W[0] = 1.0
    true = 1 + Fraction(q - 1, 2**54)
    G = _lower_gram(W)
    assert Fraction(float(G)) < true  # else this matrix tests nothing
    s = math.nextafter(float(G), math.inf)
    assert Fraction(s) < true
    assert _proven_square(G, s, _norm_above(W), terms=q) >= true
    found = Rigorous().bound(Dense(W))
    assert Fraction(found.lower) ** 2 <= true <= Fraction(found.upper) ** 2


@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize("shape", [(1, 1), (50, 30)])
def test_margin_is_that_of_the_derivation(shape, scale):
    (q, p), s, u = shape, 200.0, 2.0**-53
    W = gaussian(q, p) * scale
    M = s * torch.eye(p, dtype=torch.float64) - W.mT @ W
    R = torch.linalg.cholesky(M)
    F2, R2 = float((W * W).sum()), float((R * R).sum())
    defect = float(torch.linalg.vector_norm(M - R @ R.mT))
    margin = defect + u * ((p + 2) * R2 + (q + 2) * F2 + s + 2 * F2)
    assert float(proven(W, s) - Fraction(s)) == pytest.approx(margin, rel=1e-9, abs=0)


@pytest.mark.parametrize("name", ["hadamard", "two_blocks", "tall_isometry", "several_blocks"])
def test_no_proof_below_the_norm(name):
    W, norm = KNOWN[name]
    assert proven(W, (norm * (1 - 1e-12)) ** 2) is None
    for step in (1 + 1e-9, 1 + 1e-11, 1.5):
        assert proven(W, (norm * step) ** 2) >= Fraction(norm) ** 2


@pytest.mark.parametrize("block", [4, 256])
def test_norm_of_the_defect_counts_both_halves(block, monkeypatch):
    monkeypatch.setattr(rigorous, "_BLOCK", block)
    M, R = integers(9, 9, 1), integers(9, 9, 2).tril()
    square = int(((M + M.mT - R @ R.mT) ** 2).sum())
    # inside a diagonal block the whole of it is seen, beyond it the lower half stands for both
    assert square < _defect_above((M + M.mT), R) ** 2 < square * (1 + 1e-9)


def test_scalar_roundings_go_outwards():
    for seed in range(200):
        a, b = torch.rand(2, generator=generator(seed), dtype=torch.float64).tolist()
        x = Fraction(a) / Fraction(b + 1e-3)
        assert Fraction(_above(x)) >= x
        assert Fraction(_root_above(x)) ** 2 >= x
        assert _root_above(x) <= math.sqrt(x) * (1 + 1e-15)
    X = integers(30, 20)
    assert _norm_below(X) ** 2 < int((X * X).sum()) < _norm_above(X) ** 2
    for seed in range(20):
        X = torch.randn(2000, generator=generator(seed), dtype=torch.float64)
        square = sum(Fraction(x) ** 2 for x in X.tolist())
        assert Fraction(_norm_below(X)) ** 2 < square < Fraction(_norm_above(X)) ** 2


def test_lower_end_is_proved_too():
    W, x = integers(30, 20), integers(20, 1, 3)[:, 0]  # then ‖Wx‖²/‖x‖² is a rational number
    square = Fraction(int(((W @ x) ** 2).sum()), int((x * x).sum()))
    found = _rayleigh_below(W, x, _norm_above(W))
    assert Fraction(found) ** 2 <= square
    assert found > math.sqrt(square) * (1 - 1e-12)
    # all digits cancel: 0.1 + 0.2 − 0.3 is 2.8e-17 for these floats, and comes out twice as large
    for row in some(itertools.permutations([0.1, 0.2, -0.3])):
        W = torch.tensor([row], dtype=torch.float64)
        found = _rayleigh_below(W, torch.ones(3, dtype=torch.float64), _norm_above(W))
        assert Fraction(found) ** 2 * 3 <= sum(map(Fraction, row)) ** 2


# --- the odds of the probable certificate -------------------------------------------------------


def failures(sigma, trials=400, **settings):
    """How often the upper end and the naive one miss, over random starts."""
    A = Dense(torch.diag(sigma.double()))
    norm = float(sigma.max())
    found = [Probable(**settings).bound(A, generator=generator(s)) for s in range(trials)]
    assert all(each.lower <= norm for each in found)
    missed = sum(each.upper < norm for each in found) / trials
    naive = sum(each.lower * 1.001 < norm for each in found) / trials
    return missed, naive


def isolated(p, gap):
    return torch.cat([torch.tensor([1.0 + gap]), torch.ones(p - 1)])


@pytest.mark.parametrize("failure", [0.1, 0.3])
@pytest.mark.parametrize(
    ("sigma", "passes"),
    [
        # one product on rank 1, two on two distinct values: then the bound fails if and only if
        # the start is as unlucky as ``failure`` allows, and the rate is known from both sides
        (torch.cat([torch.ones(1), torch.zeros(49)]), 1),
        (isolated(50, 0.5), 2),
        (isolated(50, 99.0), 2),
        (isolated(200, 0.2), 2),
        (isolated(2, 3.0), 1),
    ],
)
def test_failure_rate_is_the_one_that_was_asked_for(sigma, passes, failure):
    missed, naive = failures(sigma, failure=failure, max_passes=passes, rtol=1e-12)
    deviation = math.sqrt(failure * (1 - failure) / 400)
    assert missed <= failure + 3.5 * deviation
    if len(sigma) > 2:
        assert missed >= failure - 3.5 * deviation
        assert naive > 0.8


def extremal(eps, multiplicity, p):
    """The spectrum on which the spectrum-free bound is nearly attained after three products."""
    cluster = math.sqrt(0.75 * (1 - eps))
    values = [1.0] + [cluster] * multiplicity
    return torch.tensor(values + [0.0] * (p - len(values)), dtype=torch.float64)


def test_failure_rate_on_the_worst_spectrum():
    missed, naive = failures(extremal(0.6, 12, 20), failure=0.3, max_passes=3, rtol=1e-12)
    assert missed <= 0.3 + 3.5 * math.sqrt(0.21 / 400)
    assert naive > 0.5


def test_more_passes_and_a_larger_failure_narrow_the_interval():
    A = Dense(gaussian(100, 80))
    by_passes = [Probable(rtol=1e-12, max_passes=n).bound(A) for n in (1, 5, 20, 60)]
    by_odds = [Probable(f, rtol=1e-12, max_passes=20).bound(A) for f in (1e-9, 1e-3, 0.3)]
    for row in (by_passes, by_odds):
        ends = [each.upper for each in row]
        assert ends == sorted(ends, reverse=True)
        assert len(set(ends)) == len(ends)


def test_default_is_enough_for_one_per_cent_on_any_spectrum():
    p, limit = 100_000, Probable()
    reach = math.acosh(1 / (_component_quantile(p, limit.failure) - 16 * 2.0**-52))
    assert math.cosh(reach / (limit.max_passes - 1)) < 1 + limit.rtol


def test_equal_generators_give_equal_intervals():
    A = Dense(gaussian(50, 30))
    assert Probable().bound(A) == Probable().bound(A)
    first, second, other = (Probable().bound(A, generator=generator(s)) for s in (1, 1, 2))
    assert first == second != other
    v = torch.ones(30)
    assert Probable().bound(A, v) == Probable().bound(A)  # a guess would void the odds


@pytest.mark.parametrize("p", [1, 2, 3, 10, 100])
def test_component_of_a_random_unit_vector(p):
    x = torch.randn(100_000, p, generator=generator(p), dtype=torch.float64)
    component = (x[:, 0] / torch.linalg.vector_norm(x, dim=1)).abs()
    for failure in (0.01, 0.1, 0.3):
        rate = float((component < _component_quantile(p, failure)).double().mean())
        deviation = math.sqrt(failure / 100_000)
        assert rate <= failure + 4 * deviation
        if p > 1:  # the price of the simple formula, worst at p = 3
            assert rate >= 0.88 * failure - 4 * deviation


@pytest.mark.parametrize("p", [2, 3, 30, 3000])
@pytest.mark.parametrize("failure", [1e-9, 1e-3, 0.3])
def test_never_looser_than_the_printed_theorem(p, failure):
    """1.648 √p exp(−√ε (2k−1)) of Kuczyński and Woźniakowski, at the ε of our bound."""
    reach = math.acosh(1 / _component_quantile(p, failure))
    before = math.inf
    for k in (1, 2, 5, 20, 100):
        factor = math.cosh(reach / (2 * k - 1))
        eps = 1 - 1 / factor**2
        assert 1.648 * math.sqrt(p) * math.exp(-math.sqrt(eps) * (2 * k - 1)) >= failure
        assert factor < before
        before = factor


def test_printed_theorem_by_hand():
    # p = 100, k = 10, ε = ½: 16.48·exp(−19/√2) = 2.4e-5; the sharper event is rarer
    printed = 1.648 * 10 * math.exp(-19 * math.sqrt(0.5))
    assert printed == pytest.approx(2.42e-5, rel=0.01)
    delta = 1 / math.cosh(19 * math.atanh(math.sqrt(0.5)))
    assert delta * math.sqrt(2 * 99 / math.pi) < 0.1 * printed


def test_polynomials_beyond_the_largest_ritz_value():
    norms = [1.0, 0.5, 0.5, 0.5]
    top = float(torch.linalg.eigvalsh(torch.diag(torch.tensor(norms).double(), -1))[-1])
    assert not _beyond(norms, norms, 0.99 * top, 1e-3)
    assert not _beyond(norms, norms, 0.1, 0.7)  # large, but of the wrong sign
    assert _beyond(norms, norms, 10 * top, 1e-3)
    ends = [_upper_end(norms, top, delta) for delta in (1e-9, 1e-6, 1e-3, 0.5)]
    assert ends == sorted(ends, reverse=True)
    assert all(end >= top for end in ends)
    # at the end that is returned the sums of squares have just reached 1/δ²
    assert _beyond(norms, norms, ends[1], 1e-6)
    assert not _beyond(norms, norms, top + 0.98 * (ends[1] - top), 1e-6)


def test_breakdown_claims_no_more_than_float64_can_know():
    """An invariant space is exact in exact arithmetic; rounding could hide a component."""
    found = Probable().bound(Dense(orthonormal(60, 60)))
    assert found.passes < 6
    assert 1e-10 < found.upper - 1 < 1e-4


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", CERTIFICATES.values(), ids=CERTIFICATES)
@pytest.mark.parametrize("shape", [(5, 4), (4, 5), (1, 3)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_entries_that_are_not_finite_are_refused(bound, shape, bad):
    A = gaussian(*shape)
    A[0, 1] = bad
    with pytest.raises(InputError, match="finite entries"):
        bound.bound(Dense(A))


@pytest.mark.parametrize("bound", CERTIFICATES.values(), ids=CERTIFICATES)
def test_arguments_that_do_not_fit_are_refused(bound):
    with pytest.raises(InputError, match=r"expected a matrix with entries, got shape \(3, 0\)"):
        bound.bound(Dense(torch.ones(3, 0)))
    for v in (torch.ones(3), torch.full((2,), math.nan)):
        with pytest.raises(InputError, match=r"expected v finite and of shape \(2,\)"):
            bound.bound(Dense(torch.ones(3, 2)), v)


def test_settings_out_of_range_are_refused():
    for failure in (0.0, 1.0, -1.0):
        with pytest.raises(
            InputError, match=f"expected failure between 0 and 1, the ends excluded, got {failure}"
        ):
            Probable(failure)
    with pytest.raises(InputError, match="expected max_passes ≥ 1, got 0"):
        Probable(max_passes=0)
    for rtol in (0.0, 1.0):
        with pytest.raises(
            InputError, match=f"expected rtol between 0 and 1, the ends excluded, got {rtol}"
        ):
            Rigorous(rtol)
    with pytest.raises(InputError, match="that rounding hides"):
        Probable(failure=1e-15).bound(Dense(torch.eye(9)))


def hidden_from(start, m, n):
    """A matrix of norm 1.45 whose leading right vector is orthogonal to a start, else of norm 1."""
    v = orthonormal(n, 1, 8)
    v = v - start @ (start.mT @ v) / start.square().sum()
    v = v / v.norm()
    rest = with_spectrum(m, n, torch.linspace(1, 0.01, min(m, n)))
    u = orthonormal(m, 1, 9)
    rest = rest - u @ (u.mT @ rest)
    return rest - rest @ v @ v.mT + 1.45 * u @ v.mT


def test_a_matrix_made_against_a_known_start_is_not_believed():
    draws = generator(0)
    A = hidden_from(torch.randn(200, 1, generator=draws, dtype=torch.float64), 300, 200)
    certificate = Probable(rtol=0.3)  # a narrower interval takes steps in which rounding shows it
    fooled = certificate.bound(Dense(A), generator=generator(0))
    assert fooled.upper < 1.4  # whoever knows the start can do that
    honest = certificate.bound(Dense(A))
    assert honest.lower <= float(torch.linalg.matrix_norm(A, 2)) <= honest.upper
    assert certificate.bound(Dense(A.clone())) == honest  # equal input, equal interval


def test_the_start_depends_on_every_tensor_of_a_map():
    A, B, C = gaussian(30, 20), gaussian(30, 2), gaussian(2, 20)

    def first(*tensors, scale=1.0):
        tuned = Dense(tensors[0]) + LowRank(*tensors[1:], scale)
        return gaussian_draw(9, 1, seeded_by(tuned))

    def nudged(x):
        x = x.clone()
        x[-1, -1] = x[-1, -1].nextafter(2 * x[-1, -1])
        return x

    known = first(A, B, C)
    assert torch.equal(known, first(A.mT.contiguous().mT, B, C))
    for other in some([(nudged(A), B, C), (A, nudged(B), C), (A, B, nudged(C))]):
        assert not torch.equal(known, first(*other))
    assert not torch.equal(known, first(A, B, C, scale=1.0 + 2.0**-52))
