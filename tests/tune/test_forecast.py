"""What is expected at the end of a run, from its first steps."""

import pytest
import torch

from bulkedge import InputError
from bulkedge.tune import AdaptedMatrix, Monitor
from bulkedge.tune._forecast import EXPONENTS, forecasts


def test_strengths_grow_as_a_power_of_the_sum_of_the_rates():
    (found,) = forecasts({"layer": 0.25}, 10, [0.1] * 40)
    assert found.at_end == pytest.approx(tuple(0.25 * 4**p for p in EXPONENTS))
    early, expected, late = found.crossing
    # 0.25 (steps / 10)^p = 1
    assert early == -int(-10 * 4 ** (1 / EXPONENTS[2]) // 1)
    assert (expected, late) == (None, None)


def test_steps_with_low_rates_add_little():
    slow = forecasts({"layer": 0.5}, 10, [0.1] * 10 + [0.001] * 30)[0]
    fast = forecasts({"layer": 0.5}, 10, [0.1] * 40)[0]
    assert slow.at_end[1] < 0.55 < fast.at_end[1]


def test_layers_that_are_there_already_and_the_order():
    found = forecasts({"weak": 0.1, "strong": 2.0}, 3, [0.1] * 6)
    assert [x.name for x in found] == ["strong", "weak"]
    assert found[0].crossing == (3, 3, 3)
    assert found[1].crossing == (None, None, None)


@pytest.mark.parametrize(("step", "rates"), [(0, [0.1]), (2, [0.1]), (1, [0.0, 0.1])])
def test_a_run_that_has_not_begun_or_is_over(step, rates):
    with pytest.raises(InputError, match="expected the learning rates of all steps of a run"):
        forecasts({"layer": 0.1}, step, rates)


def test_a_monitor_forecasts_by_the_thresholds_of_leading_directions():
    draw = torch.Generator().manual_seed(0)
    W0, B, A = (torch.randn(*s, generator=draw) for s in [(300, 250), (300, 2), (2, 250)])
    left, right = (torch.linalg.qr(torch.randn(n, 12, generator=draw)).Q for n in W0.shape)
    W0 = W0 + (left * torch.linspace(90, 60, 12)) @ right.T
    matrix = AdaptedMatrix("layer", W0, A, B)
    monitor = Monitor([matrix], every=100)
    for _ in range(20):
        monitor.step()
    (found,) = monitor.forecast([0.1] * 40)
    theta = monitor.top_k_thresholds["layer"]
    assert theta > monitor.thresholds["layer"]
    assert found.strength == pytest.approx(float(torch.linalg.svdvals(B @ A)[0]) / theta)
    # of a run that is resumed, θ_k is measured when it is asked for
    resumed = Monitor([matrix], every=100, thresholds=monitor.thresholds)
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.forecast([0.1] * 40) == [found]
