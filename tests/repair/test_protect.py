"""The update that keeps the task's outputs and the base's, against a dense minimisation."""

import pytest
import torch

from bulkedge import InputError
from bulkedge._linmap import LowRank
from bulkedge.moments import Moments, sketch, to_dense
from bulkedge.repairing import Protect, solve
from bulkedge.repairing.curve import GRID, Basis, curve, response, strength_for
from bulkedge.repairing.solve import RIDGE, Pairs, drift, pair_of, protected, solver


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def moment(n, seed, rank=None):
    x = draw(rank or 3 * n, n, seed=seed)
    return x.mT @ x


def objective(D, update, base, task, strength):
    return torch.trace((D - update) @ task @ (D - update).mT) + strength * torch.trace(
        D @ base @ D.mT
    )


def scaled(C):
    n = len(C)
    return C * n / torch.trace(C) + RIDGE * torch.eye(n, dtype=C.dtype)


@pytest.mark.parametrize("strength", [0.1, 1.0, 10.0])
def test_it_is_the_minimum(strength):
    update, base, task = draw(5, 7), moment(7, 1), moment(7, 2)
    found = protected(update, base, task, strength)
    leaf = found.clone().requires_grad_()
    loss = objective(leaf, update, scaled(base), scaled(task), strength)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert float(gradient.norm()) < 1e-10 * float(loss.detach())
    for seed in range(5):
        other = found + 1e-3 * draw(5, 7, seed=seed)
        assert objective(other, update, scaled(base), scaled(task), strength) > loss


def test_factors_are_protected_on_the_input_side_alone():
    B, A, base, task = draw(6, 2), draw(2, 8, seed=1), moment(8, 2), moment(8, 3)
    dense = protected(B @ A, base, task, 0.7)
    torch.testing.assert_close(B @ protected(A, base, task, 0.7), dense)


def test_the_same_moments_are_plain_scaling():
    A, C = draw(3, 6), moment(6, 1)
    torch.testing.assert_close(protected(A, C, 5 * C, 0.5), A / 1.5)


def test_an_input_that_the_base_is_not_used_on_is_kept():
    base = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    kept = protected(torch.eye(3), base, None, 100.0, ridge=1e-3)
    assert kept[2, 2] > 0.9
    assert kept[0, 0] < 0.02


def test_moments_of_fewer_inputs_than_their_width():
    A, base, task = draw(2, 40), moment(40, 1, rank=5), moment(40, 2, rank=7)
    found = protected(A, base, task, 1.0)
    assert bool(found.isfinite().all())
    dense = A @ scaled(task) @ torch.linalg.inv(scaled(task) + scaled(base))
    torch.testing.assert_close(found, dense, rtol=1e-6, atol=1e-8)


def test_a_diagonal_is_the_moment_of_an_embedding():
    A, base, task = draw(2, 5), torch.rand(5).double(), torch.rand(5).double()
    torch.testing.assert_close(
        protected(A, base, task, 2.0), protected(A, torch.diag(base), torch.diag(task), 2.0)
    )
    torch.testing.assert_close(
        protected(A, base, None, 2.0), protected(A, torch.diag(base), None, 2.0)
    )


def test_no_strength_changes_nothing():
    A = draw(2, 5).float()
    assert torch.equal(protected(A, moment(5, 1), None, 0.0), A.double())


def test_drift_is_the_share_of_the_output_that_moves():
    update, W0, x = draw(4, 6), draw(4, 6, seed=1), draw(50, 6, seed=2)
    expected = (x @ update.mT).square().sum() / (x @ W0.mT).square().sum()
    assert drift(update, W0, x.mT @ x) == pytest.approx(float(expected))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(InputError, match="strength ≥ 0"):
        Protect(Moments(), strength=-1.0)
    with pytest.raises(InputError, match="target_drift to be positive"):
        Protect(Moments(), target_drift=0.0)
    with pytest.raises(InputError, match="a strength or a target drift, got both"):
        Protect(Moments(), strength=1.0, target_drift=0.1)
    with pytest.raises(InputError, match="not all zero"):
        protected(draw(2, 3), torch.zeros(3, 3), None, 1.0)


def test_a_moment_that_is_not_positive_is_refused():
    with pytest.raises(InputError, match="expected moments that are positive, got one that is not"):
        protected(draw(2, 3), torch.diag(torch.tensor([1.0, 9.0, -5.0])), None, 1.0)


@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0])
def test_sketches_are_solved_as_what_they_stand_for(strength, monkeypatch):
    A = draw(3, 30)
    base, task = sketch(moment(30, 1), 4), sketch(moment(30, 2), 6)
    expected = protected(A, to_dense(base), to_dense(task), strength)
    alone = protected(A, to_dense(base), None, strength)

    def never(*_):
        raise AssertionError("a matrix of the size of the inputs was formed")

    monkeypatch.setattr(solve, "to_dense", never)
    found = protected(A, base, task, strength)
    assert float((found - expected).norm() / expected.norm()) < 1e-10
    found = protected(A, base, None, strength)
    assert float((found - alone).norm() / alone.norm()) < 1e-10


def test_forms_of_moments_may_be_mixed():
    A, base, task = draw(3, 20), moment(20, 1), moment(20, 2)
    few, all_of_it = sketch(base, 3), sketch(base, 20)
    diagonal = torch.rand(20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for one, other in ((few, task), (task, few), (few, diagonal), (all_of_it, few)):
        expected = protected(A, to_dense(one), to_dense(other), 0.7)
        torch.testing.assert_close(protected(A, one, other, 0.7), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(protected(A, all_of_it, task, 1.0), protected(A, base, task, 1.0))


def test_a_sketch_that_is_not_positive_is_refused():
    found = sketch(moment(6, 1), 2)
    found.rest[0] = -0.5 * found.values[0]
    with pytest.raises(InputError, match="expected moments that are positive"):
        protected(draw(2, 6), found, None, 1.0, ridge=1e-3)


def test_a_pair_of_moments_is_factorised_once_and_few_are_kept(monkeypatch):
    made, original = [], torch.linalg.cholesky_ex

    def counted(matrix):
        made.append(matrix)
        return original(matrix)

    pairs = [(moment(6, i), moment(6, i + 10)) for i in range(4)]
    expected = [protected(draw(2, 6), *pair, 0.5) for pair in pairs]
    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    solvers = Pairs(solver, torch.device("cpu"))
    for i in (0, 0, 1, 0, 1, 0):  # as of the projections of an attention
        assert torch.equal(solvers(*pairs[i], 0.5)(draw(2, 6)), expected[i])
    assert len(made) == 2
    for i in (2, 3, 0):  # each takes the place of another
        assert torch.equal(solvers(*pairs[i], 0.5)(draw(2, 6)), expected[i])
    assert len(made) == 5
    solvers(*pairs[0], 0.25)
    assert len(made) == 6


def test_one_basis_gives_every_strength():
    A, base, task = draw(3, 8), moment(8, 1, rank=4), moment(8, 2)
    basis = Basis.of(*pair_of(base, task))
    for strength in (1e-3, 0.5, 40.0):
        expected = protected(A, base, task, strength)
        found = basis.times(A, strength)
        assert float((found - expected).norm() / expected.norm()) < 1e-9


@pytest.mark.parametrize("form", ["exact", "sketch", "mixed", "diagonal"])
def test_drift_at_every_strength_is_that_of_the_protected_update(form):
    B, A, W0 = draw(7, 2, seed=4), draw(2, 12, seed=5), draw(7, 12, seed=6)
    base, task = moment(12, 1, rank=5), moment(12, 2)
    if form == "diagonal":
        base, task = base.diagonal(), task.diagonal()
    if form in ("sketch", "mixed"):
        base = sketch(base, 3)
    if form == "sketch":
        task = sketch(task, 4)
    output = solve.moved(W0, base)
    both = pair_of(base, task)
    for update in (LowRank(B, A, 0.5), 0.5 * B @ A):
        found = curve(update, *both, response(*both), output)
        for i in range(0, len(GRID), 7):
            expected = drift(0.5 * B @ protected(A, base, task, GRID[i]), W0, base)
            assert float(found[i]) == pytest.approx(expected, rel=1e-6, abs=1e-18)


def test_the_strength_of_a_drift_is_found_between_the_points_of_the_grid():
    layers = [(draw(4, 9, seed=i), moment(9, 10 + i), moment(9, 20 + i)) for i in range(3)]
    factors = [0.3, 1.0, 7.0]

    def mean_at(strength):
        parts = [
            solve.moved(protected(D, b, t, strength * f), b)
            for (D, b, t), f in zip(layers, factors, strict=True)
        ]
        return sum(parts) / len(parts)

    curves = [curve(D, *pair_of(b, t), response(*pair_of(b, t)), 1.0) for D, b, t in layers]
    before = [solve.moved(D, b) for D, b, _ in layers]
    start = sum(before) / 3
    for share in (0.999, 0.8, 0.3, 0.05, 1e-4):
        strength = strength_for(share * start, curves, before, factors)
        assert mean_at(strength) == pytest.approx(share * start, rel=2e-3)
    for target in (1.01 * start, 1e-30):
        with pytest.raises(InputError, match=r"expected a target drift between .* and .*, got"):
            strength_for(target, curves, before, factors)


def test_the_strength_is_found_where_the_layers_multiply_it_by_far_apart_factors():
    layers = [(draw(4, 9, seed=i), moment(9, 10 + i), moment(9, 20 + i)) for i in range(3)]
    factors = [2.0**-45, 1.0, 2.0**45]
    curves = [curve(D, *pair_of(b, t), response(*pair_of(b, t)), 1.0) for D, b, t in layers]
    before = [solve.moved(D, b) for D, b, _ in layers]
    for share in (0.9, 0.3, 0.01, 1e-4):
        target = share * sum(before) / 3
        strength = strength_for(target, curves, before, factors)
        found = [
            solve.moved(protected(D, b, t, strength * f), b)
            for (D, b, t), f in zip(layers, factors, strict=True)
        ]
        assert sum(found) / 3 == pytest.approx(target, rel=2e-3)
