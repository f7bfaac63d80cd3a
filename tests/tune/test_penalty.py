"""The penalty: its value from dense SVDs, its gradient from differences, and its turns."""

import pytest
import torch

from bulkedge import InputError
from bulkedge.tune import AdaptedMatrix, IntruderPenalty
from bulkedge.update import BaseSpectrum
from cases import orthonormal
from helpers import some

WIDE = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def adapted(strength, m=70, n=50, name="layer", seed=0):
    """Noise with three outliers, and one spike of that strength."""
    W0 = draw(m, n, seed=seed) / (m**0.5 + n**0.5)
    outliers = torch.tensor([5.0, 4.0, 3.0], dtype=WIDE)
    W0 += orthonormal(m, 3, seed) * outliers @ orthonormal(n, 3, seed + 1).mT
    B = strength * orthonormal(m, 1, seed + 5)
    A = orthonormal(n, 1, seed + 6).mT.clone()
    return AdaptedMatrix(name, W0, A.requires_grad_(), B.requires_grad_())


def dense(matrix, k):
    """The same by SVDs, from the formula."""
    W0, W = matrix.base, matrix.base + matrix.scale * matrix.B @ matrix.A
    edge = BaseSpectrum.of(W0).fit.edge
    U0, _, V0t = torch.linalg.svd(W0, full_matrices=False)
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    inside = (U0[:, : 2 * k].mT @ U[:, :k]).square().sum(dim=0)
    inside = inside + (V0t[: 2 * k] @ Vt[:k].mT).square().sum(dim=0)
    floor = max(edge, float(S[k].detach())) + 0.02 * float(S[0].detach())
    return ((S[:k] - floor).clamp_min(0) / edge * (1 - inside / 2)).sum()


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0, 3.5, 8.0])
def test_value_and_gradient_are_those_of_dense_svds(strength):
    matrix = adapted(strength)
    value = IntruderPenalty([matrix], k=6)()
    # the space of the base is sought to a hundredth
    assert float(value.detach()) == pytest.approx(
        float(dense(matrix, 6).detach()), rel=2e-3, abs=2e-3
    )
    found = torch.autograd.grad(value, (matrix.A, matrix.B))
    exact = torch.autograd.grad(dense(matrix, 6), (matrix.A, matrix.B))
    for x, y in some(zip(found, exact, strict=True)):
        torch.testing.assert_close(x, y, rtol=3e-2, atol=3e-2)


def test_an_update_inside_the_pretrained_space_costs_nothing():
    matrix = adapted(0.0)
    U, _, Vt = torch.linalg.svd(matrix.base, full_matrices=False)
    old = AdaptedMatrix("old", matrix.base, Vt[:1], 3 * U[:, :1])
    assert float(IntruderPenalty([old], k=4)()) < 1e-2
    assert float(IntruderPenalty([adapted(3.0)], k=4)().detach()) > 0.5


def test_descending_it_takes_the_spike_out():
    matrix = adapted(4.0)
    penalty = IntruderPenalty([matrix], k=6)
    optimizer = torch.optim.SGD([matrix.A, matrix.B], lr=0.2)
    first = float(penalty().detach())
    for _ in range(60):
        optimizer.zero_grad()
        penalty().backward()
        optimizer.step()
    assert float(penalty().detach()) < 0.05 * first


def test_layers_take_turns_and_the_mean_is_that_of_all():
    matrices = [adapted(s, name=f"layer{s}", seed=10 * i) for i, s in enumerate((2.0, 3.0, 4.0))]
    values = IntruderPenalty(matrices).values()
    total = sum(values.values())
    penalty = IntruderPenalty(matrices, per_call=1)
    calls = [float(penalty().detach()) for _ in range(6)]
    assert calls[:3] == pytest.approx([3 * value for value in values.values()], rel=1e-2)
    assert sum(calls) / 6 == pytest.approx(total, rel=1e-2)
    assert float(IntruderPenalty(matrices, per_call=None)().detach()) == pytest.approx(
        total, rel=1e-2
    )


def test_the_weight_may_be_a_schedule_and_a_state_resumes_it():
    matrix = adapted(3.0)
    one = float(IntruderPenalty([matrix])().detach())
    penalty = IntruderPenalty([matrix], weight=lambda calls: 0.5 * calls)
    assert float(penalty().detach()) == 0
    assert float(penalty().detach()) == pytest.approx(0.5 * one, rel=1e-3)
    resumed = IntruderPenalty([matrix], weight=lambda calls: 0.5 * calls)
    resumed.load_state_dict(penalty.state_dict())
    assert float(resumed().detach()) == pytest.approx(one, rel=1e-3)


def test_equal_values_do_no_harm():
    """Two spikes of one strength: no warning, and a gradient that does not depend on the basis."""
    B, A = 4.0 * orthonormal(70, 2, 5), orthonormal(50, 2, 6).mT
    gradients = []
    for turn in (torch.eye(2, dtype=WIDE), orthonormal(2, 2, 9)):
        factors = (turn.mT @ A).requires_grad_(), (B @ turn).requires_grad_()
        pair = AdaptedMatrix("pair", draw(70, 50) / 15, *factors)
        value = IntruderPenalty([pair], k=6)()
        value.backward()
        gradients.append(factors[1].grad @ turn.mT)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"k": 0}, {"per_call": 0}])
def test_what_is_refused(options):
    with pytest.raises(InputError, match=rf"expected {next(iter(options))} ≥ 1, got 0"):
        IntruderPenalty([adapted(1.0)], **options)


def test_autocast_does_not_reach_inside():
    matrix = adapted(3.0)
    W0, A, B = (x.detach().float() for x in (matrix.base, matrix.A, matrix.B))
    single = AdaptedMatrix("single", W0, A.requires_grad_(), B.requires_grad_())

    def look(half):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            value = IntruderPenalty([single], k=4)()
        return value.detach(), *torch.autograd.grad(value, (A, B))

    for x, y in some(zip(look(True), look(False), strict=True)):
        assert x.dtype is torch.float32
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
