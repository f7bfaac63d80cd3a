"""Certificates against dense SVDs, on bases made for trouble; their parts against closed forms."""

import pytest
import torch

from bulkedge import InputError
from bulkedge._linmap import Dense, LinearMap, times_power
from bulkedge._verdict import certain_verdict
from bulkedge.intruder import Verdict, base_vectors, certificate, certify, scores, ties
from bulkedge.intruder._clusters import Clusters, find_clusters, presumed_complete, sine_bound
from bulkedge.intruder._factorisations import Factorisations
from bulkedge.triplet import Bidiagonalization, Ritz, SingularTriplets, Status
from bulkedge.triplet._rounding import Rounding
from bulkedge.triplet.solver._start import gaussian as gaussian_draw
from cases import gaussian, generator, orthonormal
from helpers import some

WIDE = torch.float64


def with_values(values, m, n, seed=0):
    """A matrix with these singular values; its left vectors, all m of them; and itself."""
    U, V = orthonormal(m, m, seed), orthonormal(n, n, seed + 1)
    p = len(values)
    return U, (U[:, :p] * torch.as_tensor(values, dtype=WIDE)) @ V[:, :p].mT


def check(W0, Y, tolerance=1e-9, **options):
    """Certify, and compare with the dense truth."""
    found = certify(W0, Y, **options)
    U, S, _ = torch.linalg.svd(W0.double(), full_matrices=False)
    subspace = options.get("subspace", 2 * Y.shape[1])
    base = base_vectors(U, S, tuple(W0.shape))
    true = scores(Y.double(), base, subspace)
    assert bool((found.lower <= true.score + tolerance).all())
    assert bool((found.upper >= true.score - tolerance).all())
    assert bool((found.overlap_lower <= true.subspace_overlap + tolerance).all())
    assert bool((found.overlap_upper >= true.subspace_overlap - tolerance).all())
    cosines = torch.linalg.svdvals(base.vectors[:, :subspace].mT @ Y.double())
    r = len(cosines)
    assert bool((found.cosines[0][:r] <= cosines + tolerance).all())
    assert bool((found.cosines[1][:r] >= cosines - tolerance).all())
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("columns", ["all", 20])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_score_bounds_the_overlap_with_few_vectors(rank, columns, grouped, seed):
    """Of s leading vectors each has at most the score: ``overlap² ≤ min(s, m, n)·score²``."""
    n = rank if columns == "all" else columns
    _, W0 = with_values(torch.linspace(2, 1, rank), 30, n, seed)
    Y = torch.linalg.qr(gaussian(30, 2).roll(seed, 0)).Q
    groups = torch.zeros(2, dtype=torch.long) if grouped else None
    for subspace in some([1, 2, 4]):
        found = check(W0, Y, subspace=subspace, groups=groups)
        most = min(subspace, n) ** 0.5 * found.upper
        assert bool((found.overlap_upper <= most.clamp_max(1.0) + 1e-12).all())
        assert bool((found.overlap_lower <= found.overlap_upper).all())


def test_a_base_of_one_column_is_decided_by_the_score_alone():
    W0, Y = gaussian(30, 1), torch.linalg.qr(gaussian(30, 2)[:, 1:]).Q
    found = check(W0, Y, max_steps=1, probes=0)
    assert float(found.upper) < 0.5
    assert found.verdicts == (Verdict.INTRUDER,)


@pytest.mark.parametrize("dtype", [WIDE, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_base_that_is_zero_or_not_finite_is_refused(dtype):
    Y = orthonormal(9, 2)
    with pytest.raises(InputError, match=r"a base other than zero, .*leave the matrix out"):
        certify(torch.zeros(9, 7, dtype=dtype), Y)
    for value in some([float("nan"), float("inf")]):
        with pytest.raises(InputError, match="expected a base of finite norm"):
            certify(torch.full((9, 7), value, dtype=dtype), Y)


@pytest.mark.parametrize(
    ("dtype", "power"),
    [(WIDE, p) for p in (-1040, -700, 700, 1015)]
    + [(torch.float32, p) for p in (-125, -40, 40, 120)]
    + [(torch.bfloat16, p) for p in (-120, 120)],
)
def test_the_size_of_a_base_is_no_matter(dtype, power):
    W0 = gaussian(60, 40)
    W0[0, 0] += 30
    Y = torch.linalg.qr(torch.cat([torch.linalg.svd(W0).U[:, :1], gaussian(60, 1)], dim=1)).Q
    scaled = times_power(W0, power).to(dtype)
    unit = times_power(scaled.double(), -power)  # as far as the dtype has it
    same = certify(unit.to(dtype), Y, generator=generator(1))
    for source in some([None, generator(1)]):
        found = certify(scaled, Y, generator=source)
        assert [verdict.value for verdict in found.verdicts] == ["aligned", "intruder"]
        known = times_power(found.base_sigma, -power)
        if source is not None:
            torch.testing.assert_close(known, same.base_sigma, rtol=1e-9, atol=0)
            torch.testing.assert_close(found.lower, same.lower, rtol=1e-9, atol=0)
        torch.testing.assert_close(
            times_power(found.leading[1], -power), known[: len(found.leading[1])]
        )
        check(unit, Y)


def test_the_probes_depend_on_base_and_vectors(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        certificate, "gaussian", lambda *given: drawn.append(gaussian_draw(*given)) or drawn[-1]
    )
    W0, Y = gaussian(60, 40), orthonormal(60, 2)
    for base, vectors in some([(W0, Y), (W0.clone(), Y), (W0 * (1 + 2**-50), Y), (W0, -Y)]):
        certify(base, vectors, max_steps=1)
    first, same, *others = drawn
    assert torch.equal(first, same)
    assert not any(torch.equal(first, other) for other in some(others))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"expected vectors of shape \(9, k ≥ 1\), got \(7, 2\)"):
        certify(gaussian(9, 7), orthonormal(7, 2))
    with pytest.raises(InputError, match=r"expected vectors of shape \(9, k ≥ 1\), got \(9, 0\)"):
        certify(gaussian(9, 7), gaussian(9, 0))


@pytest.mark.parametrize("probes", [0, 1, 6])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (5, 1, 1), (5, 1, 3), (1, 5, 1), (6, 6, 6), (9, 6, 6), (6, 9, 6), (30, 4, 4)],
)
def test_the_smallest_shapes(m, n, k, probes):
    check(gaussian(m, n), orthonormal(m, k), probes=probes)
    check(gaussian(m, n).float(), orthonormal(m, k).float(), 1e-6, probes=probes)


def test_a_space_that_is_all_there_is_decides_without_probes():
    W0 = gaussian(7, 12)
    found = check(W0, orthonormal(7, 7), probes=0)
    torch.testing.assert_close(found.base_sigma, torch.linalg.svdvals(W0))
    assert Verdict.UNDECIDED not in found.verdicts


@pytest.mark.parametrize("spread", [0.0, 1e-12, 1e-8, 1e-5])
@pytest.mark.parametrize("size", [2, 5, 8, 20])
def test_nearly_equal_values_and_a_mixture_of_their_vectors(size, spread):
    """As many as a block of random vectors sees, or more of them."""
    values = torch.linspace(0.5, 0.01, 60, dtype=WIDE)
    values[:size] = 1 + spread * torch.linspace(1, 0, size, dtype=WIDE)
    U, W0 = with_values(values, 70, 60)
    mixture = U[:, :size].sum(dim=1, keepdim=True) / size**0.5
    for k in (1, 3):
        Y = torch.linalg.qr(torch.cat([mixture, gaussian(70, k - 1)], dim=1)).Q
        check(W0, Y, epsilon=0.6, subspace=25)
        # told from the truth by rounding alone: a float32 base has its own nearly equal values
        check(W0.float(), Y.float(), 1e-5, epsilon=0.3, subspace=25)


def test_a_cluster_larger_than_the_block_is_not_taken_for_complete():
    U, W0 = with_values(1 + 1e-7 * torch.linspace(1, 0, 30, dtype=WIDE), 40, 30)
    Y = U[:, :30].sum(dim=1, keepdim=True) / 30**0.5  # each vector has 0.18 of it
    found = check(W0, Y, max_steps=3)
    assert float(found.lower[0]) < 0.2
    assert found.verdicts[0] is Verdict.UNDECIDED


def test_leading_vectors_that_y_has_nothing_of():
    values = torch.linspace(1.0, 0.02, 80, dtype=WIDE)
    values[:3] = torch.tensor([6.0, 5.0, 4.0], dtype=WIDE)
    U, W0 = with_values(values, 90, 80)
    found = check(W0, U[:, [40, 41]], subspace=3)
    assert float(found.overlap_upper.max()) < 1e-3
    assert found.base_sigma[:3].tolist() == pytest.approx([6.0, 5.0, 4.0])


@pytest.mark.parametrize("dtype", [WIDE, torch.float32])
@pytest.mark.parametrize("which", [0, 12, 39, 45])
def test_graded_values_over_eight_decades(dtype, which):
    U, W0 = with_values(torch.logspace(0, -8, 40, dtype=WIDE), 50, 40)
    Y = torch.cat([U[:, [which]], gaussian(50, 2)], dim=1)
    check(W0.to(dtype), torch.linalg.qr(Y).Q.to(dtype), 1e-9 if dtype is WIDE else 1e-5)


@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 0.05, 0.999, 1.0])
@pytest.mark.parametrize("error", [0.0, 0.1, 1.0])
def test_thresholds_and_errors_at_the_ends_of_their_range(epsilon, error):
    W0 = gaussian(50, 40)
    Y = orthonormal(50, 3)
    found = check(W0, Y, epsilon=epsilon, errors=torch.full((3,), error))
    exact = certify(W0, Y, epsilon=epsilon)
    assert bool((found.upper - found.lower >= min(error, 0.5) - 1e-9).all()) or error == 0
    if error == 1.0 and epsilon > 0:
        assert set(found.verdicts) == {Verdict.UNDECIDED}
    if epsilon == 0.0:
        assert set(exact.verdicts) == {Verdict.ALIGNED}


def test_groups_hold_for_every_vector_of_their_span():
    values = torch.linspace(2.0, 0.1, 50, dtype=WIDE)
    U, W0 = with_values(values, 60, 50)
    Y = torch.linalg.qr(U[:, :3] + 0.3 * gaussian(60, 3) / 60**0.5).Q
    found = certify(W0, Y, groups=torch.tensor([0, 0, 1]), subspace=6)
    for seed in range(20):
        turn = orthonormal(2, 2, seed)
        other = torch.cat([Y[:, :2] @ turn, Y[:, 2:]], dim=1)
        U0, S, _ = torch.linalg.svd(W0, full_matrices=False)
        true = scores(other, base_vectors(U0, S, (60, 50)), 6)
        assert bool((found.lower <= true.score + 1e-9).all())
        assert bool((found.upper >= true.score - 1e-9).all())
        assert bool((found.overlap_lower <= true.subspace_overlap + 1e-9).all())
        assert bool((found.overlap_upper >= true.subspace_overlap - 1e-9).all())


def ritz_of(W0, Y, steps):
    process = Bidiagonalization(Dense(W0), Y, 1e-13)
    for _ in range(steps):
        process.extend()
    return process, process.ritz()


@pytest.mark.parametrize("seed", range(6))
def test_the_sine_of_converged_ritz_vectors(seed):
    """Against the projection on the base vectors between the cuts, wherever the cuts are."""
    values = torch.cat([torch.tensor([3.0, 2.5, 1.2]), torch.linspace(1, 0.1, 37)]).to(WIDE)
    U, W0 = with_values(values, 45, 40, seed)
    process, ritz = ritz_of(W0, orthonormal(45, 4, seed), 3 + seed % 3)
    s, rho = ritz.sigma[: len(ritz.residuals)], ritz.residuals
    vectors = process.left @ ritz.left
    tightest = 0.0
    for first, last, low, high in [
        (0, 1, 2.7, 1e9),
        (0, 2, 1.5, 1e9),
        (1, 2, 1.5, 2.8),
        (0, 3, 1.1, 9.0),
    ]:
        bound = sine_bound(
            s[first:last], rho[first:last], low, high if high < 1e9 else float("inf")
        )
        outside = U[:, :40][:, (values <= low) | (values > high)]
        whole = torch.cat([outside, U[:, 40:]], dim=1)
        true = float(torch.linalg.matrix_norm(whole.mT @ vectors[:, first:last], 2))
        assert true <= bound + 1e-12
        tightest = max(tightest, true / bound)
    assert tightest > 0.3
    assert sine_bound(s[:1], rho[:1], float(s[0]), float("inf")) == float("inf")
    assert sine_bound(s[:1], rho[:1], 0.0, float(s[0])) == float("inf")


def small_ritz(values, residuals):
    """Ritz vectors with these values and residuals, each with a direction of its own."""
    s, rho = torch.tensor(values, dtype=WIDE), torch.tensor(residuals, dtype=WIDE)
    eye = torch.eye(len(s), dtype=WIDE)
    return Ritz(s, eye, eye, torch.diag(rho))


def presumed(ritz, probes):
    clusters = find_clusters(ritz, Rounding(0.0))
    return [cluster.end for cluster in presumed_complete(clusters, probes)]


def test_clusters_are_cut_at_gaps_that_residuals_do_not_fill():
    ritz = small_ritz([4.0, 2.0, 1.99, 1.0, 0.9], [1e-3, 1e-3, 1e-3, 0.05, 0.3])
    clusters = find_clusters(ritz, Rounding(0.0))
    # 2 and 1.99 are apart by ten residuals; 0.9 + 0.3 fills the gap below 1
    assert [(cluster.first, cluster.end) for cluster in clusters] == [(0, 1), (1, 2), (2, 3)]
    middle = (4.0**2 / 2 + 2.0**2 / 2) ** 0.5
    assert [cluster.low for cluster in clusters] == pytest.approx(
        [middle, (2.0**2 / 2 + 1.99**2 / 2) ** 0.5, (1.99**2 / 2 + 1.0**2 / 2) ** 0.5]
    )
    assert [cluster.high for cluster in clusters] == [float("inf"), *(s.low for s in clusters[:-1])]
    assert clusters[0].total_error == pytest.approx(1e-3 * 4 / (16 - middle**2))
    assert clusters[2].total_error > clusters[0].error


def test_a_residual_further_down_moves_the_cut():
    near = find_clusters(small_ritz([4.0, 2.0, 1.0], [1e-3, 1e-3, 1e-3]), Rounding(0.0))
    far = find_clusters(small_ritz([4.0, 2.0, 1.0], [1e-3, 1e-3, 2.8]), Rounding(0.0))
    assert [cluster.end for cluster in near] == [1, 2]
    assert near[0].low < 3.2 < far[0].low == pytest.approx(3.8)
    assert [cluster.end for cluster in far] == [1]
    assert far[0].total_error > near[0].total_error
    noisy = find_clusters(small_ritz([4.0, 2.0, 1.0], [1e-3, 1e-3, 1e-3]), Rounding(0.01))
    assert noisy[0].total_error == pytest.approx(21 * near[0].total_error)


def test_as_many_equal_values_as_probes_may_have_company():
    ritz = small_ritz([2.0, 2.0, 2.0, 1.0, 0.5], [1e-9] * 5)
    assert presumed(ritz, 4) == [3, 4]
    assert presumed(ritz, 3) == presumed(ritz, 0) == []


def test_what_leads_is_complete_up_to_the_first_that_is_not():
    clusters = find_clusters(small_ritz([4.0, 2.0, 1.0, 0.5], [1e-6] * 4), Rounding(0.0))
    known = Clusters(clusters, [True, False, True], 5.0)
    assert [cluster.end for cluster in known.leading] == [1]


def test_an_invariant_space_keeps_its_last_vector():
    open_ = small_ritz([2.0, 1.0], [0.0, 0.0])
    closed = Ritz(open_.sigma, open_.left, open_.right, open_.lacking[:0])
    assert [cluster.end for cluster in find_clusters(open_, Rounding(1e-12))] == [1]
    assert [cluster.end for cluster in find_clusters(closed, Rounding(1e-12))] == [1, 2]


class Diagonal(LinearMap):
    """A large base whose singular vectors are the unit vectors."""

    def __init__(self, values, dtype):
        self.values, self.dtype = values.to(dtype), dtype
        self.shape, self.device = (len(values), len(values)), values.device

    def matmat(self, X):
        return self.values[:, None] * X

    rmatmat = matmat

    def gram(self):
        return torch.diag(self.values.square())

    def norm_bound(self):
        return float(self.values.norm())

    def to_dense(self):
        return torch.diag(self.values)

    @property
    def tensors(self):
        return (self.values,)

    def with_tensors(self, values):
        return Diagonal(values, self.dtype)


@pytest.mark.parametrize("dtype", [WIDE, torch.float32])
@pytest.mark.parametrize("gap", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("size", [600, 2048])
def test_a_cluster_that_only_the_vector_points_to_is_not_one_vector(size, gap, dtype):
    """After three steps the eight values look like one, which y would be."""
    x = torch.arange(size, dtype=WIDE) / size
    cluster = 1.12 * (1 - gap * torch.arange(8, dtype=WIDE))
    W0 = Diagonal(torch.cat([cluster, (1 - x[: size - 8] ** 2).sqrt()]), dtype)
    y = torch.zeros(size, 1, dtype=dtype)
    y[:8] = 8**-0.5
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        found = certify(W0, y, generator=generator)
        assert float(found.lower) <= 8**-0.5 + 1e-6
        assert float(found.upper) >= 8**-0.5 - 1e-6
        assert found.verdicts[0] in (Verdict.INTRUDER, Verdict.ROTATED, Verdict.UNDECIDED)


@pytest.mark.parametrize("seed", range(12))
def test_leading_vectors_that_were_not_seen_are_not_left_out_of_the_count(seed):
    """Two vectors just above: what y points to is beyond the leading ones."""
    generator = torch.Generator().manual_seed(seed)
    size, power = 2048, (1, 2, 4, 8)[seed % 4]
    top = 1 + 10 ** -(0.5 + float(torch.rand((), generator=generator)))
    above = top + (top - 1) * 10 ** -(0.5 + float(torch.rand((), generator=generator)))
    near = (top - 1) * 10 ** -(1 + 4 * float(torch.rand((), generator=generator)))
    x = torch.arange(size, dtype=WIDE) / size
    leading = torch.tensor([above * 1.01, above, top, top - near], dtype=WIDE)
    W0 = Diagonal(torch.cat([leading, (1 - x[: size - 4] ** power).sqrt()]), WIDE)
    y = torch.zeros(size, 1, dtype=WIDE)
    y[2:4] = 2**-0.5
    found = certify(W0, y, epsilon=0.8, generator=generator)
    assert float(found.overlap_lower) < 1e-6  # of the two leading vectors it has nothing
    assert float(found.cosines[0]) < 1e-6
    assert found.verdicts[0] in (Verdict.INTRUDER, Verdict.UNDECIDED)
    assert float(found.lower) <= 2**-0.5 + 1e-6 <= float(found.upper) + 2e-6


def factorisations(W0):
    W0 = Dense(W0)
    return Factorisations(W0, W0.rounding_scale(), torch.Generator().manual_seed(0), 1e-9)


def test_no_more_values_than_were_found():
    """Courant and Fischer, on either side of a matrix, rounding included."""
    for m, n in ((90, 60), (60, 90), (60, 60)):
        values = torch.cat([torch.tensor([5.0, 3.0, 2.9]), torch.linspace(1.0, 0.1, 57)]).to(WIDE)
        U, W0 = with_values(values, m, n)
        process, ritz = ritz_of(W0, torch.linalg.qr(U[:, :3] + 0.1 * gaussian(m, 3)).Q, 8)
        for dtype in (WIDE, torch.float32):
            told = factorisations(W0.to(dtype))
            assert told.at_most(3, 2.0, process, ritz)
            assert told.at_most(1, 4.0, process, ritz)
            assert told.at_most(0, 5.1, process, ritz)
            assert not told.at_most(2, 2.0, process, ritz)
            assert not told.at_most(1, 2.95, process, ritz)
            assert not told.at_most(0, 4.9, process, ritz)


def tuned(sigma, residuals, beyond=None, last=torch.inf):
    values = torch.tensor(sigma, dtype=WIDE)
    eye = torch.eye(9, len(values), dtype=WIDE)
    near = None if beyond is None else (torch.tensor([beyond], dtype=WIDE), eye[:, :1])
    rho = torch.tensor(residuals, dtype=WIDE)
    gaps = torch.full_like(rho, torch.inf)
    gaps[-1] = last
    return SingularTriplets(
        values, eye, eye, rho, gaps, steps=1, passes=1, status=Status.CONVERGED, near=near
    )


def test_ties_are_neighbours_whose_gap_their_residuals_fill():
    groups, _ = ties(tuned([5.0, 3.0, 2.99, 1.0], [1e-3, 3e-4, 3e-4, 1e-3], beyond=0.5))
    assert groups.tolist() == [0, 1, 2, 3]
    groups, errors = ties(tuned([5.0, 3.0, 2.99, 1.0], [1e-3, 4e-3, 3e-3, 1e-3], beyond=0.5))
    assert groups.tolist() == [0, 1, 1, 2]
    # the gap is to where the neighbour's true value may be
    pair = 5e-3 / (1.99 - 1e-3)
    assert errors.tolist() == pytest.approx([1e-3 / (2 - 4e-3), pair, pair, 1e-3 / 0.5])


def test_the_gap_below_the_last_vector():
    sigma, rho = [2.0, 1.0], [1e-3, 1e-3]
    near = 1e-3 / (1 - 1e-3)  # to where the neighbour's true value may be
    assert ties(tuned(sigma, rho))[1].tolist() == pytest.approx([near, near])
    assert ties(tuned(sigma, rho, beyond=0.5))[1].tolist() == pytest.approx([near, 2e-3])
    assert ties(tuned(sigma, rho, beyond=1.0))[1].tolist() == pytest.approx([near, 1.0])
    # what the solver knows of values yet to converge; a tie above says nothing of the gap below
    assert ties(tuned(sigma, rho, 0.5, 0.1))[1].tolist() == pytest.approx([near, 1e-2])
    assert ties(tuned([1.0], [1e-3], 0.5, 0.1))[1].tolist() == pytest.approx([1e-2])
    groups, errors = ties(tuned([1.0, 1.0], rho, 0.5, 0.0))
    assert groups.tolist() == [0, 0]
    assert errors.tolist() == pytest.approx([1e-3 * 2**0.5 / 0.5] * 2)


@pytest.mark.parametrize("dtype", [WIDE, torch.float32])
@pytest.mark.parametrize("least", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-10, 0.0])
def test_a_floor_is_never_above_the_smallest_value(dtype, least):
    """Cholesky of a near-singular Gram matrix, with its rounding."""
    for seed in range(3):
        values = torch.linspace(1.0, 0.5, 40, dtype=WIDE)
        values[-3:] = least
        W0 = with_values(values, 200, 40, seed)[1].to(dtype)
        true = float(torch.linalg.svdvals(W0.double())[-1])
        floor = factorisations(W0)
        for factor in (0.5, 0.9, 1.0 + 1e-6, 1.1, 2.0, 10.0):
            x = factor * max(true, 1e-12)
            assert not (floor.all_exceed(x) and x > true)
        if least >= 1e-2:
            assert floor.all_exceed(0.5 * true)
            assert not floor.all_exceed(1.1 * true)


def test_a_tall_base_is_told_from_its_kernel_by_a_floor():
    """A vector outside the range looks to products like one with a tiny value."""
    U, W0 = with_values(torch.linspace(1.0, 0.6, 30, dtype=WIDE), 90, 30)
    found = check(W0, U[:, 50:51])
    assert found.verdicts[0] is Verdict.INTRUDER


def test_the_spectrum_keeps_what_is_known_and_the_sum_of_squares():
    values = torch.cat([torch.tensor([9.0, 6.0, 4.0]), torch.linspace(1.5, 0.2, 57)]).to(WIDE)
    U, W0 = with_values(values, 80, 60)
    found = certify(W0, torch.linalg.qr(U[:, :2] + 0.1 * gaussian(80, 2) / 9).Q)
    assert found.spectrum.shape == (60,)
    assert bool((found.spectrum[:-1] >= found.spectrum[1:] - 1e-12).all())
    torch.testing.assert_close(found.spectrum[:3], values[:3], rtol=1e-4, atol=0)
    assert float(found.spectrum.square().sum()) == pytest.approx(float(values.square().sum()), 0.02)
    assert float((found.spectrum - values).abs().max()) < 0.35


@pytest.mark.parametrize(
    ("ends", "what"),
    [
        ((0.5, 0.9, 0.0, 1.0), Verdict.ALIGNED),
        ((0.4, 0.5, 0.0, 0.1), Verdict.UNDECIDED),
        ((0.0, 0.4, 0.6, 0.8), Verdict.UNDECIDED),
        ((0.0, 0.4, 0.75, 0.8), Verdict.ROTATED),
        ((0.0, 0.4, 0.1, 0.7), Verdict.INTRUDER),
    ],
)
def test_a_verdict_holds_at_both_ends_of_both_intervals(ends, what):
    assert certain_verdict(0.5, *ends) is what


def test_one_large_residual_ties_two_neighbours():
    assert ties(tuned([2.0, 1.99], [1e-6, 6e-4]))[0].tolist() == [0, 0]
    assert ties(tuned([2.0, 1.99], [6e-4, 1e-6]))[0].tolist() == [0, 0]
    assert ties(tuned([2.0, 1.99], [3e-4, 1e-6]))[0].tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_in_half_precision_is_widened(dtype):
    W0, Y = gaussian(90, 70).to(dtype), orthonormal(90, 2).float()
    found, wide = (certify(W, Y, generator=generator(1)) for W in (W0, W0.float()))
    assert found.verdicts == wide.verdicts
    torch.testing.assert_close(found.upper, wide.upper, rtol=0, atol=1e-4)


def test_products_are_full_float32_whatever_was_asked_for(monkeypatch):
    seen, extend = [], Bidiagonalization.extend

    def watched(self):
        seen.append(torch.get_float32_matmul_precision())
        return extend(self)

    monkeypatch.setattr(Bidiagonalization, "extend", watched)
    torch.set_float32_matmul_precision("medium")
    try:
        certify(gaussian(90, 70).float(), orthonormal(90, 2).float())
        assert set(seen) == {"highest"}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
