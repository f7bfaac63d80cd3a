"""Which tuned vectors are known one by one, and which only as a space."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from bulkedge._precision import exact
from bulkedge.triplet import SingularTriplets

MAX_RESIDUAL_OVER_GAP = 0.05
"""Neighbours are known one by one while their joint residual is at most this part of their gap."""


def ties(tuned: SingularTriplets) -> tuple[Tensor, Tensor]:
    """Which tuned vectors are known individually, and which only as a space.

    Neighbours whose residuals fill the gap between them form a group.  The error of a group is
    ``‖residuals‖ / gap`` (Wedin), at most 1, with the gap from the values of the group to where the
    true values of its neighbours may be.

    Args:
        tuned: Leading triplets, the last of whose ``gaps`` counts what may lie below it.

    Returns:
        ``groups`` and ``errors`` as :func:`certify` takes them, each of shape ``(k,)``.

    Example:
        >>> from bulkedge.triplet import singular_triplet
        >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
        >>> groups, errors = ties(singular_triplet(A, k=2))
        >>> groups.tolist(), bool((errors < 1e-12).all())
        ([0, 1], True)
    """
    sigma, rho = exact(tuned.sigma).cpu(), exact(tuned.residuals).cpu()
    k = len(sigma)
    below = sigma[:-1] - sigma[1:]  # the gap below each value
    following = exact(tuned.near[0][:1]).cpu() if tuned.near is not None else sigma.new_zeros(1)
    below = torch.cat([below, (sigma[-1:] - following) if len(following) else sigma[-1:]])
    # The value after the last may not have converged; the solver's own gap allows for that.
    if k == 1 or bool(tuned.gaps[-1] < below[-2]):
        below[-1] = torch.minimum(below[-1], exact(tuned.gaps[-1]).cpu())
    joined = torch.hypot(rho[:-1], rho[1:]) > MAX_RESIDUAL_OVER_GAP * below[:-1]
    groups = torch.cat([torch.zeros(1, dtype=torch.long), (~joined).long().cumsum(0)])
    errors = torch.ones(k, dtype=torch.float64)
    starts = [0, *(i + 1 for i, tied in enumerate(joined.tolist()) if not tied), k]
    gaps, bounds = below.tolist(), rho.tolist()
    for first, end in itertools.pairwise(starts):
        above = gaps[first - 1] - bounds[first - 1] if first else math.inf
        gap = min(above, gaps[end - 1] - (bounds[end] if end < k else 0.0))
        if gap > 0:
            errors[first:end] = min(math.hypot(*bounds[first:end]) / gap, 1.0)
    return groups, errors
