"""The largest of many Gaussian components: its chance to stay below ε, and its median."""

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


def chance_below(epsilon: float | Tensor, weight: Tensor) -> Tensor:
    """Chance that every component stays below ε."""
    epsilon = torch.as_tensor(epsilon, dtype=weight.dtype)[..., None]
    tangent = epsilon / (1 - epsilon.square()).sqrt()
    rest = (1 - weight).clamp_min(torch.finfo(torch.float64).tiny)  # ε = 1 makes the tangent ∞
    return torch.erf(tangent * (rest / (2 * weight)).sqrt()).prod(-1)


def median_score(weight: Tensor) -> Tensor:
    """The ε with a chance of one half."""
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
