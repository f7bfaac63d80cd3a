"""The entry: validate, orient, solve, judge."""

from __future__ import annotations

import dataclasses
import math

import torch

from bulkedge._errors import ConvergenceError, InputError
from bulkedge._linmap import LinearMap, MatrixLike, Scaled, as_map

from ._result import SingularTriplets, Status
from .solver import BlockKrylov, Solver


def singular_triplet(
    A: MatrixLike,
    k: int = 1,
    *,
    solver: Solver | None = None,
    generator: torch.Generator | None = None,
    strict: bool = True,
) -> SingularTriplets:
    """The k leading singular triplets (σ, u, v) of A, without a full SVD.

    The result carries values only, no gradients.

    Args:
        A: A tensor of shape ``(m, n)``, float32 or float64, or a ``LinearMap``.
        k: How many triplets, ``1 ≤ k ≤ min(m, n)``.
        solver: The method; ``BlockKrylov()`` if None.
        generator: Source of the random start block; None takes a fixed seed, so that equal input
            gives equal output.
        strict: Raise when the tolerance is not reached; False returns what there is, and
            ``status`` tells.

    Returns:
        The triplets, with residuals, gaps, steps and passes.

    Raises:
        InputError: If A is empty, not finite or not of a supported dtype, or k does not fit.
        ConvergenceError: If the tolerance is not reached and ``strict``.

    Example:
        >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
        >>> [round(s, 12) for s in singular_triplet(A, k=2).sigma.tolist()]
        [3.0, 2.0]
        >>> from bulkedge.triplet import Dense, LowRank
        >>> tuned = Dense(A) + LowRank(A[:, :1], A[:1], scale=2.0)  # W0 + s·B·A, not formed
        >>> round(singular_triplet(tuned).sigma.item(), 12)
        21.0
    """
    A = as_map(A)
    _check(A, k)
    solver = BlockKrylov() if solver is None else solver
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    with torch.no_grad():
        size = _size(A)
        result = _solve_upright(Scaled(A, 1 / size) if size != 1 else A, k, solver, generator)
    if size != 1:
        figures = {name: getattr(result, name) * size for name in ("sigma", "residuals", "gaps")}
        result = dataclasses.replace(result, **figures)
    if strict and result.status is not Status.CONVERGED:
        raise ConvergenceError(
            f"{type(solver).__name__} on a {A.shape[0]}×{A.shape[1]} matrix, k={k}: largest "
            f"residual {float(result.residuals.max()):.2e} after {result.steps} steps; "
            f"{result.status.value}",
            result,
        )
    return result


def _check(A: LinearMap, k: int) -> None:
    """Raise InputError where there is nothing to solve."""
    if A.dtype not in (torch.float32, torch.float64):
        raise InputError(f"expected float32 or float64, got {A.dtype}; convert the matrix first")
    if 0 in A.shape:
        raise InputError(f"expected a matrix with entries, got shape {A.shape}")
    if not 1 <= k <= min(A.shape):
        raise InputError(f"expected 1 ≤ k ≤ {min(A.shape)} for shape {A.shape}, got k={k}")


def _size(A: LinearMap) -> float:
    """A power of two by which A must be divided lest the squares in a norm under- or overflow."""
    probe = torch.randn(A.shape[1], 1, generator=torch.Generator().manual_seed(1), dtype=A.dtype)
    largest = float(A.matmat(probe.to(A.device)).abs().max())
    if not math.isfinite(largest):
        raise InputError("expected finite entries, got NaN or Inf (or an overflow in the product)")
    if largest == 0 or 2**-20 < largest < 2**20:
        return 1.0
    return 2.0 ** (math.frexp(largest)[1] - 1)


def _solve_upright(
    A: LinearMap, k: int, solver: Solver, generator: torch.Generator
) -> SingularTriplets:
    """Solvers work on the shorter side: transpose a wide map, and swap u and v back."""
    if A.shape[0] >= A.shape[1]:
        return solver.compute(A, k, None, generator)
    flipped = solver.compute(A.T, k, None, generator)
    return dataclasses.replace(flipped, u=flipped.v, v=flipped.u)
