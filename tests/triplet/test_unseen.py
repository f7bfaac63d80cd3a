"""What may hide from a Krylov space: never denied where it is there, and soon denied where not."""

import pytest
import torch

from bulkedge._linmap import Dense
from bulkedge.triplet import Bidiagonalization, GolubKahan, Status, Unseen, singular_triplet
from bulkedge.triplet._rounding import ROUNDING_PROBES, measure_rounding
from bulkedge.triplet._unseen import smallest_eigenvalue_bound
from bulkedge.triplet.solver import golub_kahan
from bulkedge.triplet.solver._start import fixed_seed, gaussian
from cases import orthonormal
from helpers import some

WIDE = torch.float64


def draw(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(rows, columns, generator=generator, dtype=WIDE)


def with_values(values, m, n, seed=0):
    """A matrix with these singular values, and its left vectors."""
    values = torch.as_tensor(values, dtype=WIDE)
    U, V = orthonormal(m, len(values), seed), orthonormal(n, len(values), seed + 1)
    return (U * values) @ V.mT, U


def grown(W0, others, probes, steps, missed=1e-9):
    """What is unseen after so many steps from the others and the probes."""
    block = torch.linalg.qr(torch.cat([others.to(W0), probes.to(W0)], dim=1)).Q
    size = float(W0.norm())
    process = Bidiagonalization(Dense(W0), block, 4 * torch.finfo(W0.dtype).eps * size)
    for _ in range(steps):
        process.extend()
    count = process.left.shape[1] + process.right.shape[1]
    ritz = process.ritz()
    rounding = measure_rounding(process, ritz, draw(count, ROUNDING_PROBES, 9), missed, size)
    return Unseen.of(process, ritz, probes, size, missed, rounding)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 6), (2, 4), (3, 3), (4, 10)])
def test_the_least_eigenvalue_of_a_gaussian_matrix(rows, columns):
    """Rarer than the bound says, and for one row just as rare as it says."""
    Z = torch.randn(20_000, rows, columns, generator=torch.Generator().manual_seed(3), dtype=WIDE)
    least = torch.linalg.eigvalsh(Z @ Z.mT)[:, 0]
    for probability in (0.2, 0.05, 0.01):
        share = float(
            (least <= smallest_eigenvalue_bound(rows, columns, probability)).double().mean()
        )
        assert share < probability + 3 * (probability / 20_000) ** 0.5
    if rows == 1:  # there it is the leading term of the law of χ²
        assert float((least <= smallest_eigenvalue_bound(1, columns, 1e-3)).double().mean()) > 5e-4


def test_with_fewer_probes_than_vectors_nothing_is_known():
    assert smallest_eigenvalue_bound(3, 2, 0.5) == 0.0
    W0, _ = with_values(torch.linspace(1, 0.1, 30), 40, 30)
    unseen = grown(W0, draw(40, 3, 1), draw(40, 0), 6)
    assert not unseen.nothing_missed(0, 1, 0.99, 2.0)
    assert unseen.norm_bound == pytest.approx(float(W0.norm()))


@pytest.mark.parametrize("dtype", [torch.float32, WIDE])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("size", [2, 3, 5, 12])
def test_a_cluster_that_looks_like_one_vector(size, steps, dtype):
    """The start points to its mean; no claim that it is all, at any step, in either precision."""
    values = torch.linspace(0.5, 0.01, 80, dtype=WIDE)
    values[:size] = 1 + 1e-4 * torch.linspace(1, 0, size, dtype=WIDE)
    W0, U = with_values(values, 100, 90)
    mean = U[:, :size].sum(dim=1, keepdim=True) / size**0.5
    for seed in range(5):
        unseen = grown(W0.to(dtype), mean, draw(100, 8, seed), steps)
        for found in range(1, size):
            assert not unseen.nothing_missed(0, found, 0.8, float("inf"))
        near = (unseen.ritz.sigma > 0.8).sum()
        if steps > 5 and size <= (3 if dtype is torch.float32 else 5):
            assert unseen.nothing_missed(0, int(near), 0.8, float("inf"))


def test_claims_are_as_seldom_wrong_as_they_say():
    """With a probability of one in four, and a cluster of two of which the start has one."""
    values = torch.linspace(0.5, 0.01, 40, dtype=WIDE)
    values[:2] = torch.tensor([1.0, 1 - 1e-6])
    W0, U = with_values(values, 60, 50)
    start = U[:, :1] + U[:, 1:2]
    few = [grown(W0, start / start.norm(), draw(60, 2, s), 3, missed=0.5) for s in range(300)]
    assert sum(unseen.nothing_missed(0, 1, 0.8, float("inf")) for unseen in few) < 150


@pytest.mark.parametrize("dtype", [torch.float32, WIDE])
def test_the_size_on_a_cell_is_an_upper_bound(dtype):
    W0, _ = with_values(torch.linspace(1, 0.05, 60, dtype=WIDE), 80, 70)
    unseen = grown(W0.to(dtype), draw(80, 2, 1), draw(80, 5), 4)
    others = torch.ones(len(unseen.ritz.left), dtype=WIDE)
    others[:2] = 0
    generator = torch.Generator().manual_seed(1)
    centre = torch.rand(50, generator=generator, dtype=WIDE) * 1.5
    radius = 10 ** (-4 * torch.rand(50, generator=generator, dtype=WIDE) - 1)
    _, over = unseen._norm_bounds(centre, radius, others)
    for share in some(torch.linspace(-1, 1, 21, dtype=WIDE)):
        at, _ = unseen._norm_bounds(
            (centre + share * radius).abs(), torch.zeros_like(radius), others
        )
        assert bool((at <= over * (1 + 1e-9)).all())
    assert int(over.isfinite().sum()) > 20


def test_what_hides_has_the_component_on_the_probes_that_is_claimed():
    """The identity behind it, with the dense vectors: Gᵀu = H(σ)ᵀw for every u left out."""
    W0, U = with_values(torch.linspace(1, 0.05, 60, dtype=WIDE), 80, 70)
    G = draw(80, 5)
    process = Bidiagonalization(Dense(W0), torch.linalg.qr(G).Q, 1e-13)
    for _ in range(3):
        process.extend()
    ritz = process.ritz()
    rounding = measure_rounding(process, ritz, draw(30, ROUNDING_PROBES, 9), 1e-9, float(W0.norm()))
    unseen = Unseen.of(process, ritz, G, float(W0.norm()), 1e-9, rounding)
    C, s, T = ritz.lacking, ritz.sigma[: len(ritz.residuals)], unseen.coordinates
    values = torch.linalg.svdvals(W0)
    for i in (0, 7, 30, 59):
        u, w = U[:, i], process._next.double() @ U[:, i]
        H = (C[:, : len(s)] * (s / (values[i] ** 2 - s**2))) @ T[: len(s)]
        torch.testing.assert_close(G.mT @ u, H.mT @ w, rtol=1e-6, atol=1e-8)


def test_the_ceiling_comes_down_to_the_largest_value():
    W0 = draw(200, 200)
    largest = float(torch.linalg.svdvals(W0)[0])
    bounds = [grown(W0, draw(200, 2, 5), draw(200, 8), s).norm_bound for s in (2, 6, 12)]
    assert bounds == sorted(bounds, reverse=True)
    assert largest < bounds[-1] < 1.03 * largest


@pytest.mark.parametrize("dtype", [torch.float32, WIDE])
def test_golub_kahan_goes_on_until_none_is_missed(dtype):
    """Converged residuals are no proof: begun at the mean of a cluster they tell of the mean."""
    values = torch.linspace(0.5, 0.01, 300, dtype=WIDE)
    values[:3] = 1 + 1e-5 * torch.linspace(1, 0, 3, dtype=WIDE)
    U, V = orthonormal(400, 300, 0), orthonormal(350, 300, 1)
    W = ((U * values) @ V.mT).to(dtype)
    mix = torch.zeros(300, 2, dtype=WIDE)
    mix[:3, 0], mix[3, 1] = 3**-0.5, 1.0
    init, seed = ((U @ mix).to(dtype), (V @ mix).to(dtype)), torch.Generator().manual_seed(2)
    trusting, proved = (
        singular_triplet(W, 2, init=init, generator=seed, strict=False,
                         solver=GolubKahan(rtol=0.2, oversample=8, failure_probability=missed))
        for missed in (None, 1e-9)
    )  # fmt: skip
    assert trusting.status is proved.status is Status.CONVERGED
    assert float(trusting.sigma[1]) < 0.9
    assert float(proved.sigma[1]) == pytest.approx(1.0, abs=1e-2)


def test_where_steps_do_not_suffice_it_says_so():
    W = draw(300, 300)
    few = GolubKahan(rtol=1e-2, max_steps=3, failure_probability=1e-9)
    assert singular_triplet(W, 3, solver=few, strict=False).status is Status.UNPROVED
    with pytest.raises(Exception, match="a leading triplet may have been missed"):
        singular_triplet(W, 3, solver=few)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_matrix_of_lower_rank_has_none_above(rank):
    W = draw(40, rank) @ draw(rank, 30, 1)
    found = singular_triplet(W, 5, solver=GolubKahan(failure_probability=1e-9), strict=False)
    assert found.status is Status.CONVERGED
    assert found.rank == rank


@pytest.mark.parametrize("strong", [2, 6])
def test_a_search_that_cannot_end_in_time_is_given_up_and_no_other(strong):
    """Six are asked for: the edge of noise is too close for so few steps, and spikes are not."""
    values = torch.cat([torch.linspace(6, 4, strong), torch.linspace(1, 0, 300 - strong)])
    A, _ = with_values(values, 300, 300)
    solver = GolubKahan(vector_tol=1e-3, max_steps=12, restart=False, foresee=True)
    found = singular_triplet(A, 6, solver=solver, strict=False)
    without = GolubKahan(vector_tol=1e-3, max_steps=12, restart=False)
    expected = singular_triplet(A, 6, solver=without, strict=False)
    if strong == 6:
        assert found.status is Status.CONVERGED
        assert torch.equal(found.sigma, expected.sigma)
    else:
        assert found.status is expected.status is Status.MAX_STEPS
        assert found.steps < expected.steps == 12


def test_a_matrix_made_against_the_fixed_seed_is_not_proved(monkeypatch):
    """Its first triplet is orthogonal to every vector that a fixed seed would draw."""
    solver = GolubKahan(failure_probability=1e-9, oversample=8)
    m, n = 400, 300
    drawn = gaussian(n, 9, fixed_seed())
    V = torch.linalg.qr(torch.cat([drawn, draw(n, 2)], dim=1)).Q[:, -2:]
    known = torch.linalg.qr(drawn).Q[:, :1]
    v = torch.cat([known, V[:, :1]], dim=1)
    u = orthonormal(m, 2, 5)
    rest = with_values(torch.linspace(1, 0.1, n), m, n)[0]
    rest = rest - u @ (u.mT @ rest)
    A = (u * torch.tensor([30.0, 50.0])) @ v.mT + rest - rest @ v @ v.mT
    with monkeypatch.context() as patch:
        patch.setattr(golub_kahan, "unforeseen", lambda generator, *_: generator)
        fooled = singular_triplet(A, 1, solver=solver)
    assert (round(fooled.sigma.item()), fooled.status) == (30, Status.CONVERGED)
    assert round(singular_triplet(A, 1, solver=solver).sigma.item()) == 50
    given = torch.Generator().manual_seed(3)
    assert round(singular_triplet(A, 1, solver=solver, generator=given).sigma.item()) == 50
