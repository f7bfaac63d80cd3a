"""The first scale at which an update makes a new direction, by matrices of some 40 rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bulkedge._fields import DEFAULT_EPSILON

from ._reduced import Reduced, drawn

REACH = 64.0
"""The search goes down by this factor at a time."""
UNSURE = 64.0
"""It ends at so many times the rounding error of the base's values."""
FINE = 1.05
"""A small matrix is looked at in steps by this factor."""
LOWEST, HIGHEST = 0.25, 8.0
"""Between these, in units of ``σ_k(W0)/‖ΔW‖₂``; lower where the lowest is new already."""
AT_ONCE = 4
"""So many steps are taken together."""
GENERIC_DRAWS = 15
"""The scale of a generic update is the median over this many draws."""


def generic_strength(values: Tensor, shape: tuple[int, int], top_k: int) -> float:
    """The strength at which half of the generic updates of rank one make a new direction.

    Args:
        values: All singular values of the base, descending, or a quadrature of them.
        shape: ``(m, n)``.
        top_k: How many leading directions are judged; all if there are fewer.

    Returns:
        The strength; 0 where they do at every strength above the rounding of the base's values, as
        where σ_k is tied; ∞ where none does up to 8 σ_k.
    """
    one, top_k = torch.ones(1, dtype=torch.float64), min(top_k, *shape)
    problems = drawn(values, shape, one, top_k, GENERIC_DRAWS, seed=0)
    found = first_new([problems], top_k, DEFAULT_EPSILON, (GENERIC_DRAWS,))
    return float(found.median()) * float(values[0])


def first_new(
    problems: Sequence[Reduced], top_k: int, epsilon: float, batch: tuple[int, ...] = ()
) -> Tensor:
    """The first scale of a grid at which one of the leading k scores below ε.

    Args:
        problems: The small matrices of each side.
        top_k: How many leading directions count.
        epsilon: The threshold.
        batch: Of the updates, where they are drawn.

    Returns:
        Scales in units of ``σ₁(W0)/‖ΔW‖₂``, of the shape of the batch.  0 where one does at each
        scale down to the rounding of the base's values; ∞ where none does.
    """
    start, size = problems[0].sigma_k, math.log(FINE)
    steps = torch.arange(int(math.log(HIGHEST / LOWEST) / size) + 1).to(start)
    grid = start * LOWEST * FINE**steps

    def first(grid: Tensor) -> Tensor:
        found = torch.full(batch, math.inf, dtype=torch.float64)
        for part in grid.split(AT_ONCE):
            scales = part.reshape(-1, *(1 for _ in batch))
            scores = [one.lowest_score(scales.expand(-1, *batch), top_k) for one in problems]
            new = torch.stack(scores).amin(0) < epsilon
            hits = torch.where(new, scales, math.inf).amin(0)
            found = torch.minimum(found, hits)
            if bool(found.isfinite().all()):
                break
        return found

    found, end = first(grid), UNSURE * problems[0].rounding
    while grid[0] > end and bool((found <= grid[0]).any()):
        span = min(math.log(REACH), math.log(float(grid[0] / end)))
        grid = grid[0] * FINE ** torch.arange(-math.ceil(span / size), 0).to(start)
        found = torch.minimum(found, first(grid))
    # new at the lowest scale of all: where it begins cannot be told
    return torch.where(found <= grid[0].clamp_min(end), 0.0, found / math.sqrt(FINE))
