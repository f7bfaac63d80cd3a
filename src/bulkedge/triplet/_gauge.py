"""Inside the block of k triplets: quotients by σ_i − σ_j, and when the data determine them."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from bulkedge._errors import DegenerateWarning


def turns(basis: Tensor, cotangent: Tensor | None) -> Tensor:
    """``a = UᵀΦ − ΦᵀU``: the change of the loss as the basis turns within its span."""
    k = basis.shape[1]
    if cotangent is None:
        return basis.new_zeros(k, k)
    X = basis.mT @ cotangent
    return X - X.mT


def sums(sigma: Tensor) -> Tensor:
    """``σ_i + σ_j``, shape ``(k, k)``."""
    return sigma + sigma[:, None]


def pair_scale(phi: Tensor | None, psi: Tensor | None) -> Tensor | float:
    """Size of the cotangents of each pair of columns, shape ``(k, k)``: sets that of rounding."""
    lengths = [torch.linalg.vector_norm(x, dim=0) for x in (phi, psi) if x is not None]
    return sums(sum(lengths[1:], start=lengths[0])) if lengths else 0.0


def over_gap(sigma: Tensor, numerator: Tensor, size: Tensor | float) -> Tensor:
    """``numerator_ji / (σ_i − σ_j)``; zero on the diagonal, and for rounding over rounding."""
    gap = sigma - sigma[:, None]
    drop = _tied(sigma) & (_quiet(numerator, size) | (gap.abs() <= _resolution(sigma)))
    return torch.where(drop, 0.0, numerator) / torch.where(drop, 1.0, gap)


def warn_of_turns(
    sigma: Tensor, numerator: Tensor, size: Tensor | float, xi: Tensor | None
) -> None:
    """Warn of a loss whose gradient depends on the choice of basis among near-equal values."""
    off = ~torch.eye(len(sigma), dtype=torch.bool, device=sigma.device)
    tied = _tied(sigma) & off
    if not bool(tied.any()):
        return
    loud = tied & ~_quiet(numerator, size)
    if xi is not None:
        # a loss of σ and vectors together, like that of U Σ Vᵀ, hides its turns in σ_i − σ_j
        differs = (xi - xi[:, None]).abs() > _noise(xi) * (xi.abs() + xi.abs()[:, None])
        loud |= tied & differs & (torch.as_tensor(size, device=sigma.device) > 0)
    if bool(loud.any()):
        i, j = (int(x) for x in loud.nonzero()[0])
        _warn(sigma, i, j)


def warn_of_ties(sigma: Tensor) -> None:
    """Warn of a derivative in forward mode, which cannot know what the loss depends on."""
    off = ~torch.eye(len(sigma), dtype=torch.bool, device=sigma.device)
    pairs = (_tied(sigma) & off).nonzero()
    if len(pairs):
        _warn(sigma, *(int(x) for x in pairs[0]))


def _warn(sigma: Tensor, i: int, j: int) -> None:
    gap = float((sigma[i] - sigma[j]).abs() / sigma[0])
    warnings.warn(
        f"singular values {i} and {j} (from 0) differ by {gap:.1e} of the largest: their vectors "
        "are not unique to working accuracy, and this derivative depends on them one by one; use "
        "a loss of projectors such as u @ u.mT, or one of σ alone",
        DegenerateWarning,
        stacklevel=3,
    )


def _tied(sigma: Tensor) -> Tensor:
    gap, larger = (sigma - sigma[:, None]).abs(), torch.maximum(sigma, sigma[:, None])
    return gap <= math.sqrt(torch.finfo(sigma.dtype).eps) * larger


def _quiet(numerator: Tensor, size: Tensor | float) -> Tensor:
    return numerator.abs() <= _noise(numerator) * size


def _noise(x: Tensor) -> float:
    return 16 * torch.finfo(x.dtype).eps


def _resolution(sigma: Tensor) -> Tensor:
    return 8 * torch.finfo(sigma.dtype).eps * sigma[0]
