"""The critical scale, held against SVDs of scaled updates."""

import pytest
import torch

from bulkedge import InputError
from bulkedge.update import BaseSpectrum, critical_scale
from helpers import oracle_scores, weights

GRID = 1.05


def first_new(W0, update, k, expected):
    """The first scale of a fine grid at which a leading direction scores below one half."""
    s = expected / 3
    while float(oracle_scores(W0, W0 + s * update, k).min()) >= 0.5:
        s *= GRID
    return s


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_generic_update_turns_new_near_where_it_is_expected_to(k, seed):
    """Within a factor of two: beside a base vector an outlier mixes with it, and is new later."""
    U, V = (torch.linalg.qr(weights(size, 6, seed=seed + size)).Q for size in (150, 200))
    W0 = weights(150, 200, seed=seed).double() / 200**0.5 + (U * torch.linspace(9, 4, 6)) @ V.mT
    u, v = weights(150, seed=seed + 7), weights(200, seed=seed + 8)
    update = torch.outer(u, v) / (u.norm() * v.norm())
    expected = critical_scale(BaseSpectrum.of(W0), 1.0, top_k=k)
    assert 0.8 < first_new(W0, update, k, expected) / expected < 2


def test_it_is_a_scale():
    base = BaseSpectrum.of(weights(60, 80))
    assert critical_scale(base, 6.0) == pytest.approx(critical_scale(base, 3.0) / 2)
    assert critical_scale(base, 0.0) is None
    even = BaseSpectrum.from_values(torch.linspace(1, 0.1, 200), (200, 200))
    assert critical_scale(even, 1.0) is None  # any update makes an outlier of a hard edge
    with pytest.raises(InputError, match="expected strongest ≥ 0"):
        critical_scale(base, -1.0)
