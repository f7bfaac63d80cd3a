"""The leading triplet of a matrix that changes a little from step to step."""

from __future__ import annotations

import torch
from torch import Tensor

from bulkedge._guard import precise
from bulkedge._linmap import LinearMap
from bulkedge.triplet import BlockKrylov, SingularTriplets
from bulkedge.triplet._triplet import solve_from
from bulkedge.triplet.solver._start import generic

BLOCK = 6
"""The number of vectors carried from step to step, with the explorer."""
EXPLORER_STEPS = 4
"""The number of power iterations with the explorer at each step."""


@precise
def fresh_start(A: LinearMap) -> Tensor:
    """Leading vectors of A without an earlier start, shape ``(min(m, n), ≤ BLOCK)``."""
    n = min(A.shape)
    columns = min(BLOCK, n)
    with torch.no_grad():
        like = torch.empty(0, dtype=A.dtype, device=A.device)
        if like.is_meta:  # a model that is being built has shapes, but no values
            return like.new_empty(n, columns)
        return track(A, generic(n, columns, like), rtol=1e-3)[1]


def valid_start(start: Tensor) -> Tensor:
    """The start itself, or a generic one if it cannot be a block of unit vectors.

    After ``to_empty`` a buffer may hold any values, infinity and NaN included.

    Returns:
        A block of the same shape.
    """
    peak = start.detach().abs().max()
    return torch.where((peak > 0) & (peak <= 2), start, generic(*start.shape, like=start))


@precise
def track(
    A: LinearMap, start: Tensor, *, rtol: float, max_steps: int | None = None
) -> tuple[SingularTriplets, Tensor]:
    """The leading triplet of A, differentiable, and the start for the next matrix.

    A warm start can miss a new leading direction: its block is nearly invariant under AᵀA, so a
    direction orthogonal to the block would not enter it, however large its value.  So the last
    column, the explorer, is perturbed a little and first does a few power iterations outside the
    span of the others: it converges to a direction that has come to exceed the known ones, which
    Rayleigh-Ritz then finds in the block.  Only a certificate excludes that a direction is missed.

    Cost: two passes with the block if the matrix hardly changed, and ``2 · EXPLORER_STEPS`` passes
    with one vector.

    Args:
        A: Shape ``(m, n)``.
        start: Shape ``(min(m, n), b)``.
        rtol: The residual to reach, relative to σ₁; the relative error of σ₁ itself is smaller by
            a factor of about residual/gap.
        max_steps: At most so many steps; 500 if None.

    Returns:
        The triplet and a start of the same shape.
    """
    columns = start.shape[1]
    with torch.no_grad():
        tall = A if A.shape[0] >= A.shape[1] else A.T
        start = torch.cat([start[:, :-1], _explore(tall, start)], dim=1)
    solver = BlockKrylov(rtol=rtol, oversample=columns - 1, max_steps=max_steps or 500)
    result = solve_from(A, 1, start, solver=solver, strict=False)
    with torch.no_grad():
        v = result.v if A.shape[0] >= A.shape[1] else result.u
        near = start[:, :0] if result.near is None else result.near[1]
        block = torch.cat([v.detach(), near], dim=1)[:, : max(columns - 1, 1)]
        return result, torch.cat([block, start[:, -1:]], dim=1)[:, :columns]


def _explore(A: LinearMap, start: Tensor) -> Tensor:
    """The explorer, shape ``(n, 1)``: power iteration on AᵀA outside the other columns."""
    block, x = start[:, :-1], start[:, -1:]
    x = x + 0.3 * x.roll(1, 0)
    for _ in range(EXPLORER_STEPS):
        x = A.rmatmat(_unit(A.matmat(x)))
        x = x - block @ (block.mT @ x)
        x = _unit(x)
    return x


def _unit(x: Tensor) -> Tensor:
    """``x / ‖x‖``; a smaller multiple of x if the norm underflows."""
    return x / torch.linalg.vector_norm(x).clamp_min(torch.finfo(x.dtype).tiny)


def as_matrix(weight: Tensor, dim: int = 0) -> Tensor:
    """The weight with ``dim`` in front and the rest flattened, as in torch's ``spectral_norm``."""
    return working(weight).movedim(dim, 0).flatten(1)


def working(weight: Tensor) -> Tensor:
    """The weight in float32, or in float64 if it is in float64."""
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
