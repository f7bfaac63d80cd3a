"""The update that keeps the task's outputs and the base's, against a dense minimisation."""

import pytest
import torch
from torch import nn

from bulkedge import InputError
from bulkedge.moments import Moments
from bulkedge.repairing.protect import RIDGE, Protect, drift, protected


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
    kept = protected(torch.eye(3), base, None, 100.0)
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


def test_moments_of_another_model_are_refused():
    def of(width):
        model = nn.Sequential(nn.Linear(width, 2))
        with Moments(model) as moments, torch.no_grad():
            model(torch.eye(width))
        return moments

    with pytest.raises(InputError, match="expected moments of 4 inputs, got 3"):
        Protect(of(3)).factor(draw(2, 4), "0")
    with pytest.raises(InputError, match="1: no inputs of this layer were seen"):
        Protect(of(3)).factor(draw(2, 4), "1")
    with pytest.raises(InputError, match="strength ≥ 0"):
        Protect(of(3), strength=-1.0)
    with pytest.raises(InputError, match="not all zero"):
        protected(draw(2, 3), torch.zeros(3, 3), None, 1.0)


def test_a_moment_that_is_not_positive_is_refused():
    with pytest.raises(InputError, match="expected moments that are positive, got one that is not"):
        protected(draw(2, 3), torch.diag(torch.tensor([1.0, 9.0, -5.0])), None, 1.0)
