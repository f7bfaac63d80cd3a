"""The two-sided update against its equation and a dense numerical minimisation."""

from itertools import pairwise

import pytest
import torch

from bulkedge import InputError
from bulkedge._linmap import LowRank
from bulkedge.repairing import Sides
from bulkedge.repairing.solve import RIDGE, protected

m, n, r = 9, 7, 2


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def moment(n, seed):
    x = draw(2 * n, n, seed=seed) * torch.logspace(0, -1, n, dtype=torch.float64)
    return x.mT @ x


def ridged(C):
    return C + RIDGE * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)


INPUTS, OUTPUTS = (moment(n, 1), moment(n, 2)), (moment(m, 3), moment(m, 4))
(C_b, C_t), (G_b, G_t) = (map(ridged, pair) for pair in (INPUTS, OUTPUTS))
B, A = draw(m, r), draw(r, n, seed=1)


def objective(D, W, strength):
    lost = torch.trace(G_t @ (D - W) @ C_t @ (D - W).mT)
    return lost + strength * torch.trace(G_b @ D @ C_b @ D.mT)


def minimum(W, strength, seed):
    """The least that factors of this rank reach, by a quasi-Newton method from a random start."""
    leaves = [draw(m, r, seed=seed).requires_grad_(), draw(r, n, seed=seed + 1).requires_grad_()]
    settings = {"max_iter": 2000, "tolerance_grad": 1e-11, "tolerance_change": 0}
    search = torch.optim.LBFGS(leaves, **settings, line_search_fn="strong_wolfe")

    def closure():
        search.zero_grad()
        loss = objective(leaves[0] @ leaves[1], W, strength)
        loss.backward()
        return loss

    search.step(closure)
    return float(objective(leaves[0] @ leaves[1], W, strength).detach())


@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0])
def test_a_matrix_solves_the_equation(strength):
    W = draw(m, n)
    D = Sides.of(INPUTS, OUTPUTS).solved(W, strength)
    left = G_t @ D @ C_t + strength * G_b @ D @ C_b
    torch.testing.assert_close(left, G_t @ W @ C_t, rtol=1e-9, atol=1e-9)
    # and, independently, the same system written out over all entries
    system = torch.kron(G_t, C_t) + strength * torch.kron(G_b, C_b)
    dense = torch.linalg.solve(system, (G_t @ W @ C_t).flatten()).reshape(m, n)
    torch.testing.assert_close(D, dense, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0])
def test_factors_reach_the_least_of_their_rank(strength):
    layer, W = Sides.of(INPUTS, OUTPUTS), 2 * B @ A
    update = LowRank(B, A, 2.0)
    found = [layer.solved(update, strength, sweeps).to_dense() for sweeps in (*range(6), 200)]
    reached = [float(objective(D, W, strength)) for D in found]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(reached))
    assert reached[1] < reached[0] < objective(W, W, strength)
    least = min(minimum(W, strength, seed) for seed in (10, 20))
    assert reached[-1] == pytest.approx(least, rel=1e-8)
    assert reached[5] == pytest.approx(least, rel=1e-2)


def test_without_sweeps_a_alone_is_new_and_the_best_for_its_b():
    found = Sides.of(INPUTS, OUTPUTS).solved(LowRank(B, A, 2.0), 1.5, sweeps=0)
    torch.testing.assert_close(found.B, B)
    leaf = found.A.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(2 * B @ leaf, 2 * B @ A, 1.5), leaf)
    assert float(gradient.abs().max()) < 1e-8
    assert (found.A.shape, found.scale) == ((r, n), 2.0)


@pytest.mark.parametrize("sweeps", [0, 3])
def test_without_curvatures_it_is_the_one_sided_update(sweeps):
    one = torch.eye(m, dtype=torch.float64)
    layer = Sides.of(INPUTS, (3 * one, 5 * one))
    strength = 0.7 * 5 / 3 * float(INPUTS[1].trace() / INPUTS[0].trace())  # of moments as measured
    expected = B @ protected(A, *INPUTS, 0.7)
    found = layer.solved(LowRank(B, A), strength, sweeps).to_dense()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layer.solved(B @ A, strength), expected)


def test_no_strength_changes_nothing_and_what_makes_no_sense_is_refused():
    layer = Sides.of(INPUTS, OUTPUTS)
    torch.testing.assert_close(layer.solved(LowRank(B, A), 0.0).to_dense(), B @ A)
    with pytest.raises(InputError, match="expected strength"):
        layer.solved(B @ A, -1.0)
    with pytest.raises(InputError, match="expected sweeps ≥ 0, got -1"):
        layer.solved(LowRank(B, A), 1.0, sweeps=-1)
    with pytest.raises(InputError, match="moments that are positive"):
        Sides.of(INPUTS, (G_b, G_t - 2 * torch.eye(m)))
