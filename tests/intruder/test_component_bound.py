"""The bound on every component against dense truth, a dense inverse and Lanczos polynomials."""

import pytest
import torch

from bulkedge._linmap import Dense
from bulkedge.intruder._component_bound import SLACK, WEIGHT, WIDE_SLACK, ComponentBound, maximize
from bulkedge.triplet import Bidiagonalization, Ritz
from cases import gaussian, orthonormal

WIDE = torch.float64
NOISE = 1e-12


def bound_of(W0, Y, steps):
    process = Bidiagonalization(Dense(W0), Y, NOISE)
    for _ in range(steps):
        process.extend()
    ritz = process.ritz()
    return ComponentBound(ritz, ritz.left.mT @ (process.left.mT @ Y), NOISE)


def over(component, sigma, radius=0.0):
    return component.evaluate(
        torch.tensor([sigma], dtype=WIDE), torch.tensor([radius], dtype=WIDE)
    )[0]


def ellipsoid(component, c, radius, slack):
    """The matrix of the quadratic form on (a, b, w), written out term by term."""
    ritz = component.ritz
    d, e, n = len(ritz.left), len(ritz.right), len(ritz.lacking)
    kappa = slack / (radius + component.noise) ** 2
    eye, rows = torch.eye(d + e + n, dtype=WIDE), []
    for i in range(max(d, e)):
        a = eye[i] if i < d else 0 * eye[0]
        b = eye[d + i] if i < e else 0 * eye[0]
        Cw = ritz.lacking[:, i] @ eye[d + e :] if i < e else 0 * eye[0]
        if i < d:
            rows.append(c * a - ritz.sigma[i] * b)
        if i < e:
            rows.append(c * b - ritz.sigma[i] * a - Cw)
    E = torch.stack(rows)
    weights = torch.cat([torch.ones(d), WEIGHT * torch.ones(e), torch.ones(n)]).to(WIDE)
    return torch.diag(weights) + kappa * E.mT @ E, d


@pytest.mark.parametrize("shape", [(30, 24), (24, 30)], ids=str)
@pytest.mark.parametrize(("steps", "k"), [(1, 4), (3, 1), (3, 4), (5, 5), (9, 3)])
def test_the_bound_is_that_of_the_ellipsoid(shape, steps, k):
    """Blocks bordered by w against the inverse of the whole; also where the space closes."""
    component = bound_of(gaussian(*shape), orthonormal(shape[0], k), steps)
    for c, radius in ((0.0, 0.1), (1.0, 0.02), (5.0, 0.3), (11.0, 1.0)):
        for slack, factor in ((SLACK, "evaluate"), (WIDE_SLACK, "projection")):
            M, d = ellipsoid(component, c, radius, slack)
            t = component.directions
            inverse = t.mT @ torch.linalg.inv(M)[:d, :d] @ t
            bound = (1 + WEIGHT + 2 * slack) * inverse
            if factor == "evaluate":
                torch.testing.assert_close(over(component, c, radius), bound.diagonal())
            else:
                torch.testing.assert_close(component.projection(c, radius), bound)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_no_component_is_larger(seed, steps):
    """Every base vector, by dense SVD; alone and with all those of an interval."""
    W0 = gaussian(60, 45) + 0.01 * seed
    U, S, _ = torch.linalg.svd(W0)
    Y = torch.linalg.qr(U[:, seed : seed + 1] + 0.1 * gaussian(60, 2)).Q
    component = bound_of(W0, Y, steps)
    components = (U[:, :45].mT @ Y).square()
    assert bool((component.evaluate(S, torch.zeros(45, dtype=WIDE)) >= components - 1e-12).all())
    for low, high in ((0.0, 3.0), (4.0, 4.5), (6.0, 9.0), (10.0, 14.0), (0.0, 20.0)):
        inside = U[:, :45][:, (low <= S) & (high >= S)]
        middle, radius = (low + high) / 2, (high - low) / 2
        if inside.shape[1]:
            assert bool((over(component, middle, radius) >= (inside.mT @ Y).square().sum(0)).all())
        room = component.projection(middle, radius) - Y.mT @ inside @ inside.mT @ Y
        assert float(torch.linalg.eigvalsh(room)[0]) > -1e-12


def christoffel(W0, y, steps, sigma):
    """1 / Σ p_j(σ²)² with the orthonormal polynomials of y's spectral measure, by Lanczos."""
    H, basis, values, before = W0 @ W0.mT, [y], [1.0], 0.0
    beta = 0.0
    for j in range(steps):
        r = H @ basis[j]
        alpha = float(r @ basis[j])
        r = r - torch.stack(basis, 1) @ (torch.stack(basis, 1).mT @ r)
        r = r - torch.stack(basis, 1) @ (torch.stack(basis, 1).mT @ r)
        after = float(r.norm())
        values.append(((sigma**2 - alpha) * values[j] - beta * before) / after)
        before, beta = values[j], after
        basis.append(r / after)
    return 1 / sum(p * p for p in values)


@pytest.mark.parametrize("sigma", [0.3, 2.0, 5.0, 9.0, 13.0])
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_for_one_vector_it_is_the_christoffel_function(sigma, steps):
    """Where α‖b‖² does not count: it bounds ‖a‖² + ‖w‖² + α‖b‖² by 1 + α, they 1 alone."""
    W0, y = gaussian(60, 60), orthonormal(60, 1)
    bound = float(over(bound_of(W0, y, steps), sigma))
    true = christoffel(W0, y[:, 0], steps, sigma)
    least = true / (1 + WEIGHT)  # ‖b‖ ≤ 1 only, and more of it than 1 is never found
    assert least < bound < true * (1 + WEIGHT + 2 * SLACK) * 1.0001


def test_a_point_is_a_needle_between_two_cells():
    """A direction that is nearly a base vector: the bound reaches 1 at its σ and nowhere else."""
    W0 = gaussian(80, 70)
    U, S, _ = torch.linalg.svd(W0)
    Y = torch.linalg.qr(0.8 * U[:, 20:21] + 0.6 * orthonormal(80, 1)).Q
    component = bound_of(W0, Y, 40)
    top, norm = float(S[0]), float(S.norm())
    groups, one = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=WIDE)
    true = float((U.mT @ Y).square().max())
    bound, where = maximize(component, groups, 0.9 * true * one, (0.0, top, norm))
    assert float(bound) == float("inf")
    assert float(where) == pytest.approx(float(S[20]), abs=0.3)
    bound, where = maximize(component, groups, 1.3 * true * one, (0.0, top, norm))
    assert true <= float(bound) < 1.3 * true
    assert float(where) == 0.0
    # beside the needle there is nothing
    bound, _ = maximize(component, groups, 0.9 * true * one, (float(S[18]), top, norm))
    assert float(bound) < 0.9 * true


@pytest.mark.parametrize("limit", [0.2, 0.4, 0.8])
def test_the_maximum_is_above_a_fine_grid(limit):
    W0 = gaussian(60, 50)
    Y = orthonormal(60, 3)
    component = bound_of(W0, Y, 6)
    groups, limits = torch.tensor([0, 0, 1]), torch.full((2,), limit, dtype=WIDE)
    bound, where = maximize(component, groups, limits, (0.0, 15.0, 60.0))
    grid = torch.linspace(0, 60, 4001, dtype=WIDE)
    fine = component.evaluate(grid, 0 * grid)
    fine = torch.stack([fine[:, :2].sum(dim=1), fine[:, 2]], dim=1)
    for g in range(2):
        peak = float(fine[:, g].max())
        if float(bound[g]) < float("inf"):
            assert peak <= float(bound[g]) < limit
            assert float(where[g]) == 0.0
        else:
            assert peak > 0.9 * limit
            # where: no lower than the last σ with a bound above the limit that it could have met
            assert 0 < float(where[g]) <= float(grid[fine[:, g] > 0.9 * limit].max()) + 1.0
    assert bool(bound.isfinite().all()) == (limit > float(fine.max(dim=0).values.max()))


def test_a_hidden_value_beyond_the_top_is_looked_for():
    """σ up to ‖W0‖_F may be there: the space began orthogonal to its vector."""
    U, V = orthonormal(60, 50, 1), orthonormal(50, 50, 2)
    values = torch.linspace(1.0, 0.1, 50, dtype=WIDE)
    values[0] = 30.0
    W0 = (U * values) @ V.mT
    Y = torch.linalg.qr(0.9999**0.5 * U[:, 25:26] + 1e-2 * U[:, 0:1]).Q
    component = bound_of(W0, Y, 1)
    one, groups = torch.ones(1, dtype=WIDE), torch.zeros(1, dtype=torch.long)
    bound, where = maximize(component, groups, 1e-9 * one, (2.0, 3.0, 31.0))
    assert float(bound) == float("inf")
    assert 3.0 < float(where) < 31.0 * 1.25**2
    bound, _ = maximize(component, groups, 2.0 * one, (2.0, 3.0, 31.0))
    assert float(bound) >= float((U[:, :1].mT @ Y).square())


def test_noise_and_radius_only_ever_widen():
    W0, Y = gaussian(40, 30), orthonormal(40, 2)
    component = bound_of(W0, Y, 3)
    noisy = ComponentBound(component.ritz, component.directions, 0.05)
    for c in (0.5, 3.0, 8.0):
        narrow, wide = over(component, c, 0.1), over(component, c, 0.2)
        assert bool((narrow < wide).all())
        torch.testing.assert_close(over(noisy, c, 0.1), over(component, c, 0.15))
    # radii at which κ would leave double precision are taken as wider ones
    assert bool((over(component, 3.0, 1e-30) >= over(component, 3.0, 0.0)).all())
    assert bool(over(component, float(component.ritz.sigma[0]), 0.0).isfinite().all())


def test_limits_of_infinity_ask_nothing():
    ritz = Ritz(
        torch.tensor([1.0]), *(torch.eye(1, dtype=WIDE),) * 2, torch.zeros(1, 1, dtype=WIDE)
    )
    component = ComponentBound(ritz, torch.ones(1, 1, dtype=WIDE), NOISE)
    one, groups = torch.ones(1, dtype=WIDE), torch.zeros(1, dtype=torch.long)
    bound, where = maximize(component, groups, torch.inf * one, (0.0, 1.0, 1.0))
    assert 1.0 <= float(bound) < 1.5
    assert float(where) == 0.0


@pytest.mark.parametrize(("name", "value"), [("MAX_BISECTIONS", 1), ("MAX_CELLS", 0)])
def test_what_is_not_resolved_is_not_below(name, value, monkeypatch):
    """Rounds or memory run out before the intervals are narrow enough."""
    component = bound_of(gaussian(60, 50), orthonormal(60, 1), 10)
    one, groups = torch.ones(1, dtype=WIDE), torch.zeros(1, dtype=torch.long)
    grid = torch.linspace(0, 15, 3001, dtype=WIDE)
    limit = 1.02 * float(component.evaluate(grid, 0 * grid).max())
    assert float(maximize(component, groups, limit * one, (0.0, 15.0, 60.0))[0]) < limit
    monkeypatch.setattr(f"bulkedge.intruder._component_bound.{name}", value)
    bound, where = maximize(component, groups, limit * one, (0.0, 15.0, 60.0))
    assert float(bound) == float("inf")
    assert float(where) > 0.0
