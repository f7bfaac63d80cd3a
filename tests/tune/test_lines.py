"""Which line a holder keeps spikes below, and layers whose bases have none."""

import pytest
import torch

from bulkedge import InputError
from bulkedge.tune import AdaptedMatrix, IntruderPenalty, Monitor, RankController, SpikeClip

TOP_K = 10


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def base(m=400, n=300, strong=12):
    """Noise with some strong values, as a pretrained weight has."""
    W0 = draw(m, n) / m**0.5
    U, _, Vh = torch.linalg.svd(W0, full_matrices=False)
    return W0 + U[:, :strong] * torch.linspace(6, 3, strong, dtype=torch.float64) @ Vh[:strong]


def layer(W0, name="layer", strength=50.0):
    m, n = W0.shape
    u, v = draw(m, 1, seed=1), draw(1, n, seed=2)
    return AdaptedMatrix(name, W0, v / v.norm(), strength * u / u.norm())


def test_the_leading_line_is_where_a_spike_reaches_the_tenth_value():
    """By a dense SVD: on the noise alone, the value of a generic spike at the line is σ_k."""
    W0 = base()
    theta = SpikeClip([layer(W0)], level=1.0, of="leading").thresholds["layer"]
    edge = SpikeClip([layer(W0)], level=1.0).thresholds["layer"]
    assert theta > 1.2 * edge
    sigma_k = float(torch.linalg.svdvals(W0)[TOP_K - 1])
    u, v, noise = draw(400, 1, seed=10), draw(1, 300, seed=30), base(strong=0)
    values = torch.linalg.svdvals(noise + theta * (u / u.norm()) @ (v / v.norm()))
    assert float(values[0]) == pytest.approx(sigma_k, rel=0.02)


def test_a_base_without_strong_values_has_one_line():
    W0 = draw(400, 300) / 400**0.5
    lines = [SpikeClip([layer(W0)], of=of).thresholds["layer"] for of in ("edge", "leading")]
    assert lines[0] <= lines[1] < 1.1 * lines[0]


def test_a_line_has_a_name():
    with pytest.raises(InputError, match=r'expected of to be "edge" or "leading", got .middle'):
        SpikeClip([layer(base())], of="middle")


GATE = torch.ones(1, 300, dtype=torch.float64)
HOLDERS = {
    "SpikeClip": SpikeClip,
    "RankController": RankController,
    "IntruderPenalty": lambda matrices: IntruderPenalty(matrices, per_call=None),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_layers_without_a_bulk_are_left_alone_with_one_note(kind):
    matrices = [layer(GATE, "gate"), layer(base()), layer(2 * GATE, "other_gate")]
    with pytest.warns(UserWarning, match=r"2 layers without a bulk .*: gate, other_gate") as notes:
        holder = HOLDERS[kind](matrices)
    assert len(notes) == 1
    assert [matrix.name for matrix in holder.matrices] == ["layer"]
    getattr(holder, "step", holder)()
    assert float((matrices[0].B @ matrices[0].A).norm()) == pytest.approx(50.0)


@pytest.mark.parametrize("kind", HOLDERS)
def test_nothing_to_hold_is_an_error(kind):
    with pytest.raises(InputError, match=r"expected a layer with a bulk, .* none of 1: gate"):
        HOLDERS[kind]([layer(GATE, "gate")])


def test_a_known_threshold_holds_a_layer_without_a_bulk():
    clip = SpikeClip([layer(GATE, "gate")], level=1.0, thresholds={"gate": 2.0})
    assert clip.step() == 1
    assert clip.strongest == {"gate": pytest.approx(25.0)}


def test_a_monitor_watches_layers_without_a_bulk():
    """An audit judges them, too."""
    monitor = Monitor([layer(GATE, "gate", 1e3), layer(base())])
    monitor.check()
    assert monitor.figures["gate"].strongest is None
    assert monitor.metrics()["bulkedge/coverage"] == 1.0
    again = Monitor([layer(GATE, "gate", 1e3), layer(base())])
    again.load_state_dict(monitor.state_dict())
    assert again.figures == monitor.figures
