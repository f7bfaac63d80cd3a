"""The lower end of a bulk, and what a fit makes of it and of repulsion."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special

from bulkedge._errors import InputError
from bulkedge.rmt import (
    EmpiricalBulk,
    SingularValueLaw,
    WhiteBulk,
    fit_bulk,
    fit_lower_edge,
    lower_edge_test,
)
from bulkedge.rmt._bessel import bessel, hard_edge_survival
from helpers import some
from noise import noise_values

LEVELS = (0.01, 0.05, 0.5)


def three_sd(level, draws):
    return 3 * math.sqrt(level * (1 - level) / draws)


def test_bessel_functions_are_those_of_scipy():
    x = torch.linspace(0, 60, 40, dtype=torch.float64)
    for order in (0, 1, 7, 30):
        np.testing.assert_allclose(bessel(order, x), special.jv(order, x.numpy()), atol=5e-15)


def test_the_hard_edge_of_square_noise_is_that_of_edelman():
    s = torch.tensor([0.0, 1e-6, 0.01, 1.0, 10.0, 60.0, 1e5], dtype=torch.float64)
    found = hard_edge_survival(0, s)
    torch.testing.assert_close(found, torch.exp(-s / 8 - s.sqrt() / 2), atol=1e-14, rtol=0)


# square, nearly so, at the change of centring, with a soft edge, and beyond the hard law
@pytest.mark.parametrize("shape", [(40, 40), (40, 41), (52, 40), (40, 100), (60, 260)], ids=str)
def test_noise_has_a_smallest_value_as_often_as_it_should(shape):
    rng, draws = np.random.default_rng(5), 800
    values = np.array([noise_values(shape, rng)[-1] for _ in range(draws)])
    grid = np.sort(values)[:: draws // 40]
    levels = lower_edge_test(0.3 * grid, shape, sigma=0.3)  # monotone: read between its points
    for level in LEVELS:
        point = np.interp(level, levels, grid)
        # the grid has every twentieth value, whose own chance is read exactly
        assert abs((values <= point).mean() - level) < three_sd(level, draws) + 0.013


def test_a_fitted_sigma_alarms_as_often_and_is_transposed_without_effect():
    rng, draws = np.random.default_rng(1), 150
    for shape in ((48, 48), (48, 70)):
        found = np.array([fit_bulk(noise_values(shape, rng), shape).lower.p_value
                          for _ in range(draws)])  # fmt: skip
        for level in LEVELS:
            assert abs((found < level).mean() - level) < three_sd(level, draws)
    assert lower_edge_test(3.0, (30, 60), sigma=1.0) == lower_edge_test(3.0, (60, 30), sigma=1.0)


def test_a_small_outlier_is_told_in_noise_and_beside_any_bulk():
    rng = np.random.default_rng(0)
    for shape in ((80, 80), (80, 200)):
        values = noise_values(shape, rng)
        assert fit_bulk(values, shape).lower.outliers == 0
        values[-1] *= 1e-3 if shape[0] == shape[1] else 0.6
        found = fit_bulk(values, shape)
        assert found.white
        assert found.lower.outliers == 1
        assert found.lower.p_value < 0.05
        assert found.lower.hard is (shape[0] == shape[1]) or shape == (80, 200)
    wide = noise_values((80, 200), rng) ** 2  # no law, a soft edge from below
    assert not fit_bulk(wide, (80, 200)).white
    assert fit_lower_edge(wide, (80, 200)).outliers == 0
    wide[-1] *= 0.3
    assert fit_bulk(wide, (80, 200)).lower.outliers == 1
    square = noise_values((80, 80), rng) * np.linspace(2, 1, 80)
    assert fit_lower_edge(square, (80, 80)).outliers == 0
    square[-2:] = [1e-3, 1e-5]
    found = fit_lower_edge(square, (80, 80))
    assert (found.outliers, found.position, found.hard) == (2, 0.0, True)


@pytest.mark.parametrize("gap", [0, 4])
def test_a_hard_edge_without_a_law_alarms_as_often_as_it_should(gap):
    rng, draws, shape = np.random.default_rng(2), 200, (160, 160 + gap)
    # the density at zero is all that counts: stretched values have another law, and the same edge
    found = [
        fit_lower_edge((v + v**2 / 80), shape).p_value
        for v in (noise_values(shape, rng) for _ in range(draws))
    ]
    for level in (0.05, 0.5):
        assert abs((np.array(found) < level).mean() - level) < three_sd(level, draws) + 0.01


def test_a_bulk_with_the_density_of_noise_that_repels_wrongly_is_not_noise():
    rng, shape = np.random.default_rng(0), (300, 500)
    law = SingularValueLaw.of(shape)
    grid = law.isf((np.arange(300) + 0.5) / 300)
    blocks = np.sort(np.concatenate([noise_values((150, 250), rng) for _ in range(2)]))[::-1]
    for values, scale in some([(grid, 1.0), (blocks * math.sqrt(2), 1.0)]):
        found = fit_bulk(values * scale, shape)
        assert found.misfit <= found.misfit_limit  # the density is that of noise
        assert not found.white
        assert isinstance(found.bulk, EmpiricalBulk)
        assert found.repulsion.p_value < 1e-6
        # where values come from a quadrature nothing is known of their spacings
        partly = fit_bulk(values * scale, shape, exact=40)
        assert partly.white
        assert partly.repulsion is None
        assert partly.lower is None
    noise = fit_bulk(noise_values(shape, rng), shape)
    assert noise.white
    assert isinstance(noise.bulk, WhiteBulk)
    assert noise.repulsion.p_value > 1e-3


def test_noise_is_called_none_by_its_spacings_once_in_a_thousand_times():
    rng, draws, shape = np.random.default_rng(4), 200, (40, 45)
    fits = [fit_bulk(noise_values(shape, rng), shape) for _ in range(draws)]
    assert sum(not fit.white for fit in fits) <= 3  # 0.4 expected; 4 or more once in 1,300
    assert np.mean([fit.repulsion.ratio for fit in fits]) == pytest.approx(0.5307, abs=0.012)


def test_what_has_no_lower_end_is_refused_or_left_out():
    for value, words in ((-1.0, "singular values ≥ 0"), (math.nan, "singular values ≥ 0")):
        with pytest.raises(InputError, match=words):
            lower_edge_test(value, (30, 30), sigma=1.0)
    with pytest.raises(InputError, match="positive finite sigma"):
        lower_edge_test(1.0, (30, 30), sigma=0.0)
    with pytest.raises(InputError, match="singular values of a 30×40 matrix, more than 12"):
        fit_lower_edge(np.ones(12), (30, 40))
    values = np.concatenate([np.linspace(9, 1, 40), np.zeros(20)])
    with pytest.raises(InputError, match=r"they have no edge|got equal ones"):
        fit_lower_edge(values, (60, 60))
    assert fit_bulk(values, (60, 60)).lower is None
