"""The median of the largest component of a vector whose mean squared components are known."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF_ERF = 0.4769362762044699
"""The error function is one half here."""
MEDIAN_STEPS = 60
"""Newton's method for a median takes some 6 steps, and no more than this."""
MEDIAN_ERROR = 1e-13
"""A median is found when a step moves its logarithm by less than this."""


def median_score(weight: Tensor) -> Tensor:
    """The ε that every component stays below with a chance of one half.

    Args:
        weight: Mean squared components on each base vector, shape ``(r, p)``.

    Returns:
        Shape ``(r,)``; NaN where a weight is, as of a spike that makes no outlier.
    """
    known = weight.isfinite().all(-1)
    found = weight.new_full(known.shape, math.nan)
    found[known] = _median(weight[known])
    return found


def _median(weight: Tensor) -> Tensor:
    # Σ log erf(c_i t) = −log 2 in u = log t: concave, so that Newton's method climbs to the root
    # from below, without bisection; there the largest component alone has that chance.
    rest = (1 - weight).clamp_min(torch.finfo(torch.float64).tiny)
    c = (rest / (2 * weight)).sqrt()
    u = (HALF_ERF / c.amin(-1)).log()
    for _ in range(MEDIAN_STEPS):
        x = u.exp()[:, None] * c
        chance = torch.erf(x)
        slope = (x * (-x.square()).exp() / chance).nan_to_num(0.0).sum(-1) * (2 / math.pi**0.5)
        moved = -(chance.log().sum(-1) + math.log(2)) / slope
        u = u + moved
        if bool((moved.abs() <= MEDIAN_ERROR).all()):
            break
    t = u.exp()
    return t / torch.hypot(t, torch.ones_like(t))
