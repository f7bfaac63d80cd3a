"""The controller: scale and rank as the spikes tell, and a run that goes on where it stopped."""

import json

import pytest
import torch

from bulkedge import InputError
from bulkedge.tune import AdaptedMatrix, RankController
from cases import orthonormal

WIDE = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def layer(rank=8, m=60, n=50, name="layer"):
    W0 = draw(m, n) / (m**0.5 + n**0.5)
    A = draw(rank, n, seed=1).requires_grad_()
    return AdaptedMatrix(name, W0, A, torch.zeros(m, rank, dtype=WIDE).requires_grad_())


def norms(matrix):
    return torch.linalg.svdvals((matrix.B @ matrix.A).detach())


def train(matrix, target, control, steps, rate=0.02):
    """Fit a target by the factors."""
    optimizer = torch.optim.Adam([matrix.A, matrix.B], lr=rate)
    handle = control.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        (matrix.B @ matrix.A - target).square().sum().backward()
        optimizer.step()
    handle.remove()


def test_rank_grows_where_spikes_are_held_and_only_there():
    """Eight directions of one strength, beyond the level: each is worth having."""
    theta = 1.0
    crowded, easy = layer(name="crowded"), layer(name="easy")
    many = 2.0 * orthonormal(60, 8) @ orthonormal(50, 8, 1).mT
    one = 0.5 * orthonormal(60, 1) @ orthonormal(50, 1, 1).mT
    for matrix, target in ((crowded, many), (easy, one)):
        control = RankController(
            [matrix], level=0.9, start=2, every=10, thresholds={matrix.name: theta}
        )
        train(matrix, target, control, 400)
        assert (control.state[matrix.name].rank >= 6) is (matrix is crowded)
        assert float(norms(matrix)[0]) <= 0.9 * theta * (1 + 1e-12)
    assert int((norms(crowded) > 0.5).sum()) >= 6


def test_directions_that_carry_nothing_are_given_back():
    matrix = layer()
    control = RankController([matrix], start=8, every=10, thresholds={"layer": 10.0})
    target = orthonormal(60, 2) @ orthonormal(50, 2, 1).mT
    train(matrix, target, control, 600)
    assert control.state["layer"].rank <= 3
    assert not bool(matrix.B[:, control.state["layer"].rank :].any())
    torch.testing.assert_close((matrix.B @ matrix.A).detach(), target, rtol=0, atol=0.1)


@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_turning_out_keeps_the_update(scale):
    B, A = draw(60, 4), draw(4, 50, seed=1)
    B = B @ torch.diag(torch.tensor([1.0, 1.0, 1e-4, 1e-4], dtype=WIDE))
    matrix = AdaptedMatrix("layer", draw(60, 50), A, B, lambda: scale)
    before = scale * B @ A
    control = RankController([matrix], start=4, grow=2, every=1, thresholds={"layer": 1e6})
    control.step()
    assert control.state["layer"].rank == 2
    torch.testing.assert_close(scale * matrix.B @ matrix.A, before, rtol=1e-3, atol=1e-2)


def test_spikes_are_held_one_by_one():
    B, A = draw(60, 4), draw(4, 50, seed=1)
    matrix = AdaptedMatrix("layer", draw(60, 50), A, B)
    U, S, Vt = torch.linalg.svd(B @ A, full_matrices=False)
    limit = float(S[1])
    control = RankController([matrix], level=0.5, start=4, thresholds={"layer": 2 * limit})
    control.step()
    torch.testing.assert_close(matrix.B @ matrix.A, U * S.clamp_max(limit) @ Vt)
    assert control.state["layer"].strongest == pytest.approx(float(S[0]) / (2 * limit))


def test_a_resumed_run_is_the_run():
    target = 2.0 * orthonormal(60, 8) @ orthonormal(50, 8, 1).mT

    def run(pieces):
        matrix = layer()
        optimizer = torch.optim.Adam([matrix.A, matrix.B], lr=0.02)
        state = None
        for steps in pieces:
            control = RankController([matrix], start=2, every=10, thresholds={"layer": 1.0})
            if state is not None:
                control.load_state_dict(json.loads(state))
            for _ in range(steps):
                optimizer.zero_grad()
                (matrix.B @ matrix.A - target).square().sum().backward()
                optimizer.step()
                control.step()
            state = json.dumps(control.state_dict())
        return matrix.B.detach(), json.loads(state)

    whole, state = run([60])
    parts, same = run([25, 35])
    assert state == same
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def test_a_state_of_other_layers_is_refused():
    control = RankController([layer()], thresholds={"layer": 1.0})
    other = RankController([layer(name="other")], thresholds={"other": 1.0})
    with pytest.raises(InputError, match="expected a state of the same layers"):
        control.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0}, "expected start ≥ 1, got 0; give RankController a"),
        ({"grow": 0}, "expected grow ≥ 1, got 0; give RankController a"),
        ({"every": 0}, "expected every ≥ 1, got 0; give RankController a"),
        ({"level": -1.0}, r"expected level to be positive and finite, got -1\.0"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        RankController([layer()], thresholds={"layer": 1.0}, **options)
