"""The critical scale, held against SVDs of scaled updates."""

import math

import pytest
import torch

from bulkedge import InputError
from bulkedge.triplet import thin_svd
from bulkedge.update import (
    BaseSpectrum,
    aligned_scale,
    aligned_scores,
    critical_scale,
    generic_scale,
    predict_spikes,
    update_svd,
)
from bulkedge.update._reduced import _chain, measured
from helpers import oracle_scores, some, weights

GRID = 1.05


def test_more_directions_than_there_are_and_a_base_of_lower_rank():
    U, S, V = thin_svd(torch.randn(30, 40, generator=torch.Generator().manual_seed(1)).double())
    B, A = torch.ones(30, 1).double(), torch.eye(40)[:1].double()
    update = update_svd(B, A, 1.0, (30, 40))
    base = BaseSpectrum.of((U * S) @ V.mT)
    for find in (
        lambda k: aligned_scale(base, (U, S, V), update, top_k=k),
        lambda k: generic_scale(base, [1.0], top_k=k),
        lambda k: aligned_scores(base, (U, S, V), update, [1.0], top_k=k).flatten().tolist(),
        lambda k: predict_spikes(base, [1.0], top_k=k).chance,
    ):
        assert find(60) == find(30)
    S = torch.where(torch.arange(30) < 12, S, 0.0)
    deficient = BaseSpectrum.of((U * S) @ V.mT)
    # any update makes a 13th direction, which is new
    assert aligned_scale(deficient, (U, S, V), update, top_k=13) == 0


def first_new(W0, update, k, expected):
    """The first scale of a fine grid at which a leading direction scores below one half."""
    s = expected / 3
    while float(oracle_scores(W0, W0 + s * update, k).min()) >= 0.5:
        s *= GRID
    return s


def trained(m, n, seed):
    """Noise under six outliers."""
    U, V = (torch.linalg.qr(weights(size, 6, seed=seed + size)).Q for size in (m, n))
    return weights(m, n, seed=seed).double() / n**0.5 + (U * torch.linspace(9, 4, 6)) @ V.mT


def leaning(W0, rank, seed, lean):
    """An update whose vectors lean towards the leading ones of the base."""
    U, _, V = thin_svd(W0)
    B = weights(len(U), rank, seed=seed) + lean * U[:, :rank]
    A = weights(len(V), rank, seed=seed + 1) + lean * V[:, 1 : rank + 1]
    return update_svd(B.double(), A.double().mT, 0.05, W0.shape)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_where_all_triplets_are_kept_the_small_matrix_is_exact(shape):
    W0 = trained(*shape, 1)
    update, svd = leaning(W0, 3, 4, 2.0), thin_svd(W0)
    small = measured(svd, svd[1], shape, update, 5)
    change = update.P @ update.Q.mT
    for scale in (0.2, 0.7, 1.0, 2.5, 9.0):
        s = torch.tensor(scale * update.norm / float(svd[1][0]), dtype=torch.float64)
        for problem, turned in ((small, False), (small.T, True)):
            pair = (W0.mT, (W0 + scale * change).mT) if turned else (W0, W0 + scale * change)
            exact = oracle_scores(*pair, 5).min()
            assert float(problem.lowest_score(s, 5)) == pytest.approx(float(exact), abs=1e-9)


def test_no_chain_is_kept_where_nothing_is_left_of_the_base():
    """One row a spike stays for what the rounding of its factor leaves outside."""
    svd = thin_svd(trained(24, 24, 1))
    small = measured(svd, svd[1], (24, 24), leaning(trained(24, 24, 1), 3, 4, 2.0), 5)
    assert small.core.shape == (24 + 3, 24 + 3)


@pytest.mark.parametrize("zeros", [0, 30])
def test_a_chain_has_the_moments_of_the_rest(zeros):
    values = torch.linspace(2, 0.1, 50, dtype=torch.float64)
    C = _chain(values, zeros, 2)
    for power in (1, 2, 3):
        moment = torch.linalg.matrix_power(C @ C.mT, power)[0, 0]
        exact = values.pow(2 * power).sum() / (50 + zeros)
        assert float(moment) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_known_update_turns_new_where_the_law_says(side):
    """Against SVDs on a grid; beyond 32 triplets the base is known by its bulk alone."""
    ratios = []
    for seed in range(4):
        W0 = trained(150, 200, seed)
        update, base = leaning(W0, 1 + seed, 40 + seed, 1.5 * (seed % 3)), BaseSpectrum.of(W0)
        U, S, V = thin_svd(W0)
        leading = U[:, :32], S[:32], V[:, :32]
        found = aligned_scale(base, leading, update, top_k=6, sides=[side])
        change = update.P @ update.Q.mT
        pair = (W0, change) if side == "left" else (W0.mT, change.mT)
        exact = first_new(*pair, 6, 1.2 * critical_scale(base, update.norm, top_k=6))
        ratios.append(abs(math.log(found / exact)))
    assert max(ratios) < math.log(1.15)
    assert sorted(ratios)[2] < math.log(GRID)


def test_what_lies_along_the_base_never_turns_new():
    W0 = trained(60, 80, 0)
    U, S, V = thin_svd(W0)
    along = update_svd(U[:, :1], V[:, :1].mT, 3.0, W0.shape)
    assert aligned_scale(BaseSpectrum.of(W0), (U, S, V), along) is None
    nothing = update_svd(0 * U[:, :1], V[:, :1].mT, 3.0, W0.shape)
    assert aligned_scale(BaseSpectrum.of(W0), (U, S, V), nothing) is None


def haar(size, rank, seed):
    return torch.linalg.qr(weights(size, rank, seed=seed).double()).Q


def test_scale_and_chance_of_strengths_alone_are_those_of_random_vectors():
    W0 = trained(60, 80, 0)
    base, gamma = BaseSpectrum.of(W0), torch.tensor([1.0, 0.8, 0.5], dtype=torch.float64)
    expected = generic_scale(base, gamma, top_k=6, draws=31)
    drawn = [
        (haar(60, 3, 2 * i) * gamma) @ haar(80, 3, 2 * i + 1).mT for i in range(60)
    ]  # fmt: skip
    new = [
        [float(oracle_scores(W0, W0 + s * expected * D, 6).min()) < 0.5 for D in drawn]
        for s in (0.75, 1.0, 1.4)
    ]
    shares = [sum(row) / len(row) for row in new]
    assert shares[0] < 0.5 < shares[2]
    for s, share in some(zip((0.75, 1.0, 1.4), shares, strict=True)):
        told = predict_spikes(base, s * expected * gamma, top_k=6, draws=200).chance
        assert told == pytest.approx(share, abs=3 * math.sqrt(0.25 / len(drawn)))


def test_the_chance_of_nothing_and_of_what_was_not_asked_for():
    base = BaseSpectrum.of(trained(60, 80, 0))
    assert predict_spikes(base, [0.0]).chance == 0.0
    assert math.isnan(predict_spikes(base, [1.0], draws=0).chance)
    assert predict_spikes(base, [1.0], draws=0).top_k_threshold == critical_scale(base, 1.0)
    assert generic_scale(base, [0.0]) is None
    with pytest.raises(InputError, match="expected one row of finite strengths ≥ 0"):
        generic_scale(base, [-1.0])


def test_triplets_that_do_not_fit():
    W0 = trained(60, 80, 0)
    base, update, (U, S, V) = BaseSpectrum.of(W0), leaning(W0, 1, 3, 0.0), thin_svd(W0)
    with pytest.raises(InputError, match="triplets and spikes of a base of shape"):
        aligned_scale(base, (V, S, U), update)
    with pytest.raises(InputError, match="expected the 10 leading triplets and more, got 4"):
        aligned_scale(base, (U[:, :4], S[:4], V[:, :4]), update)


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_generic_update_turns_new_near_where_it_is_expected_to(k, seed):
    """Within a factor of two: beside a base vector an outlier mixes with it, and is new later."""
    W0 = trained(150, 200, seed)
    u, v = weights(150, seed=seed + 7), weights(200, seed=seed + 8)
    update = torch.outer(u, v) / (u.norm() * v.norm())
    expected = critical_scale(BaseSpectrum.of(W0), 1.0, top_k=k)
    assert 0.8 < first_new(W0, update, k, expected) / expected < 2


def test_it_is_a_scale():
    base = BaseSpectrum.of(weights(60, 80))
    assert critical_scale(base, 6.0) == pytest.approx(critical_scale(base, 3.0) / 2)
    assert critical_scale(base, 0.0) is None
    even = BaseSpectrum.from_values(torch.linspace(1, 0.1, 200), (200, 200))
    found = critical_scale(even, 1.0)  # theory has no threshold for a hard edge
    assert found == pytest.approx(generic_scale(even, [1.0]))
    assert critical_scale(even, 2.0) == pytest.approx(found / 2)
    with pytest.raises(InputError, match="expected strongest ≥ 0"):
        critical_scale(base, -1.0)


def crowded(width, n=40):
    """A base whose values lie in a band of some width, and a generic update of norm 1."""
    generator = torch.Generator().manual_seed(0)
    S = (1 + width * torch.rand(n, generator=generator).double()).sort(descending=True).values
    U, V = (torch.linalg.qr(weights(n, n, seed=seed).double()).Q for seed in (1, 2))
    a, b = (torch.linalg.qr(weights(n, 1, seed=seed).double()).Q for seed in (3, 4))
    return (U, S, V), update_svd(a, b.mT, 1.0, (n, n)), a @ b.mT


@pytest.mark.parametrize("width", [0.1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8])
def test_the_scale_of_a_narrow_band_is_found_however_narrow(width):
    (U, S, V), update, change = crowded(width)
    W0 = (U * S) @ V.mT
    found = aligned_scale(BaseSpectrum.of(W0), (U, S, V), update)
    assert found > 0

    def lowest(scale):
        return float(oracle_scores(W0, W0 + scale * change, 10).min())

    grid = torch.logspace(math.log10(width) - 3, 1, 500, dtype=torch.float64).tolist()
    assert found == pytest.approx(next(s for s in grid if lowest(s) < 0.5), rel=0.12)


@pytest.mark.parametrize("width", [1e-3, 1e-5, 1e-7])
def test_a_generic_scale_shrinks_with_the_band(width):
    found = [generic_scale(BaseSpectrum.of((U * S) @ V.mT), [1.0])
             for (U, S, V), *_ in (crowded(width), crowded(width / 10))]  # fmt: skip
    assert found[0] / found[1] == pytest.approx(10, rel=0.2)


def test_tied_values_leave_no_scale_at_which_nothing_is_new():
    (U, _, V), update, _ = crowded(0.0)
    S = torch.cat([torch.linspace(3, 2, 5), torch.ones(20), torch.linspace(0.9, 0.1, 15)]).double()
    base = BaseSpectrum.from_values(S, (40, 40))
    assert aligned_scale(base, (U, S, V), update) == 0
    assert generic_scale(base, [1.0]) == 0
