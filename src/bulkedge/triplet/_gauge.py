"""Quotients by σ_i − σ_j inside the block of k triplets, and whether the data determine them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from bulkedge._errors import DegenerateWarning


def rotation_gradient(basis: Tensor, cotangent: Tensor | None) -> Tensor:
    """``a = UᵀΦ − ΦᵀU``: the change of the loss as the basis rotates within its span."""
    if cotangent is None:
        k = basis.shape[-1]
        return basis.new_zeros(*basis.shape[:-2], k, k)
    X = basis.mT @ cotangent
    return X - X.mT


def sums(sigma: Tensor) -> Tensor:
    """``σ_i + σ_j``, shape ``(..., k, k)``."""
    return sigma[..., None, :] + sigma[..., :, None]


def pair_scale(phi: Tensor | None, psi: Tensor | None) -> Tensor | float:
    """Size of the cotangents of each pair of columns, ``(k, k)``, to which rounding is relative."""
    lengths = [torch.linalg.vector_norm(x, dim=0) for x in (phi, psi) if x is not None]
    return sums(sum(lengths[1:], start=lengths[0])) if lengths else 0.0


def over_gap(sigma: Tensor, numerator: Tensor, size: Tensor | float) -> Tensor:
    """``numerator_ji / (σ_i − σ_j)``; 0 on the diagonal, and where both are zero to rounding."""
    gap = sigma - sigma[:, None]
    drop = _tied(sigma) & (negligible(numerator, size) | (gap.abs() <= _resolution(sigma)))
    return torch.where(drop, 0.0, numerator) / torch.where(drop, 1.0, gap)


def transposed(known: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The transposed system has Sᵀ for S: equal numbers, as S is diagonal, other derivatives."""
    S, *rest = known
    return (S if S.ndim == 1 else S.mT), *rest


def times_sigma(X: Tensor, sigma: Tensor) -> Tensor:
    """``X S``, for S or its diagonal."""
    return X * sigma if sigma.ndim == 1 else X @ sigma


def sigma_cotangent(sigma: Tensor, X: Tensor, Y: Tensor) -> Tensor:
    """``XᵀY`` where σ is a matrix, its diagonal where σ is a vector."""
    return (X * Y).sum(dim=0) if sigma.ndim == 1 else X.mT @ Y


def inside(sigma: Tensor, u: Tensor, v: Tensor, phi: Tensor | None, psi: Tensor | None) -> Tensor:
    """M, the part of Ā inside the block, shape ``(k, k)``."""
    a, b = rotation_gradient(u, phi), rotation_gradient(v, psi)
    return over_gap(sigma, a + b, pair_scale(phi, psi)) / 2 + (a - b) / sums(sigma) / 2


def constraint_gradient(basis: Tensor, *pairs: tuple[Tensor, Tensor | None]) -> Tensor:
    """``Σ x (basisᵀ y)ᵀ``: the derivative of the constraints."""
    terms = [x @ (y.mT @ basis) for x, y in pairs if y is not None]
    return sum(terms, start=torch.zeros_like(basis))


def warn_of_rotations(
    sigma: Tensor, numerator: Tensor, size: Tensor | float, xi: Tensor | None
) -> None:
    """Warn of a loss whose gradient depends on the choice of basis among near-equal values."""
    off = ~torch.eye(len(sigma), dtype=torch.bool, device=sigma.device)
    tied = _tied(sigma) & off
    if not bool(tied.any()):
        return
    dependent = tied & ~negligible(numerator, size)
    if xi is not None:
        # In a loss of σ and vectors together, like one of U Σ Vᵀ, the numerator vanishes with
        # σ_i − σ_j although the quotient does not.  The cotangents of σ_i and σ_j then differ.
        differs = (xi - xi[:, None]).abs() > _noise(xi) * (xi.abs() + xi.abs()[:, None])
        dependent |= tied & differs & (torch.as_tensor(size, device=sigma.device) > 0)
    if bool(dependent.any()):
        i, j = (int(x) for x in dependent.nonzero()[0])
        _warn(sigma, i, j)


def warn_of_ties(sigma: Tensor) -> None:
    """Warn of ties in forward mode, where the loss is not known."""
    off = ~torch.eye(len(sigma), dtype=torch.bool, device=sigma.device)
    pairs = (_tied(sigma) & off).nonzero()
    if len(pairs):
        _warn(sigma, *(int(x) for x in pairs[0]))


def warn_of_cut(sigma: Tensor, below: Tensor) -> bool:
    """Warn of a derivative of the best rank-k part where ``σ_k = σ_{k+1}`` to rounding.

    Args:
        sigma: The k leading values.
        below: Values beyond the k-th, as far as they are known.

    Returns:
        Whether it was warned of.
    """
    gap = sigma[-1] - below[:1].sum()
    if not bool(gap <= _resolution(sigma)):
        return False
    warnings.warn(cut_advice(len(sigma), float(gap / sigma[0])), DegenerateWarning, stacklevel=3)
    return True


def cut_advice(k: int, gap: float) -> str:
    """What to do where the best rank-k part has no derivative, or one beyond rounding."""
    return (
        f"truncate(A, k={k}): σ_{k} and σ_{k + 1} have a relative gap of {abs(gap):.1e}, so that "
        f"the best rank-{k} part has no derivative to working accuracy; choose a k at a gap"
    )


def _warn(sigma: Tensor, i: int, j: int) -> None:
    """Warn that a derivative depends on the vectors i and j one by one."""
    gap = float((sigma[i] - sigma[j]).abs() / sigma[0])
    warnings.warn(
        f"singular values {i} and {j} (from 0) differ by {gap:.1e} of the largest: their vectors "
        "are not unique to working accuracy, and this derivative depends on them one by one; use "
        "a loss of projectors such as u @ u.mT, or one of σ alone",
        DegenerateWarning,
        stacklevel=3,
    )


def _tied(sigma: Tensor) -> Tensor:
    """Which pairs of values agree to half of their digits, or to rounding, shape ``(k, k)``."""
    gap, larger = (sigma - sigma[:, None]).abs(), torch.maximum(sigma, sigma[:, None])
    noise = 8 * torch.finfo(torch.float64).eps * sigma[0]  # of vectors: that over the gap
    return (gap <= math.sqrt(torch.finfo(sigma.dtype).eps) * larger) | (1e-3 * gap <= noise)


def negligible(numerator: Tensor, size: Tensor | float) -> Tensor:
    """Where a numerator is zero to rounding."""
    return numerator.abs() <= _noise(numerator) * size


def _noise(x: Tensor) -> float:
    """The relative rounding error of a sum of a few products."""
    return 16 * torch.finfo(x.dtype).eps


def _resolution(sigma: Tensor) -> Tensor:
    """The rounding error of a difference of two values."""
    return 8 * torch.finfo(sigma.dtype).eps * sigma[0]
