"""The leading triplet of a matrix that changes a little from step to step."""

from __future__ import annotations

import torch
from torch import Tensor

from bulkedge._guard import precise
from bulkedge._linmap import LinearMap
from bulkedge.triplet import BlockKrylov, SingularTriplets
from bulkedge.triplet._triplet import solve_from
from bulkedge.triplet.solver._start import generic

BLOCK = 6  # vectors carried from step to step, the explorer included
EXPLORE = 4  # steps of the explorer


@precise
def fresh_start(A: LinearMap) -> Tensor:
    """A start from nothing, shape ``(min(m, n), ≤ BLOCK)``: the leading vectors of A."""
    n = min(A.shape)
    columns = min(BLOCK, n)
    with torch.no_grad():
        like = torch.empty(0, dtype=A.dtype, device=A.device)
        if like.is_meta:  # a model that is being built, before it has numbers
            return like.new_empty(n, columns)
        return track(A, generic(n, columns, like), rtol=1e-3)[1]


def sound(start: Tensor) -> Tensor:
    """The start, or a generic one in its place where it is not a block of vectors of length one.

    What ``to_empty`` leaves in a buffer is anything, infinite and NaN included.

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

    A warm start sees what the last step saw: its block is nearly invariant, and a new direction
    orthogonal to it would stay unseen however large.  So the last column, the explorer, is turned a
    little and does a few steps of power iteration outside the others first: a direction that
    has come to exceed the known ones dominates it, and Rayleigh-Ritz finds it in the block.  Only a
    certificate excludes that something is missed.

    Cost: two passes with the block if the matrix hardly changed, ``2 · EXPLORE`` with one vector.

    Args:
        A: Shape ``(m, n)``.
        start: Shape ``(min(m, n), b)``.
        rtol: Wanted residual relative to σ₁; σ₁ itself is far better, by about residual/gap.
        max_steps: Steps at most; None for no limit worth the name.

    Returns:
        The triplet and a start of the same shape.
    """
    columns = start.shape[1]
    with torch.no_grad():
        upright = A if A.shape[0] >= A.shape[1] else A.T
        start = torch.cat([start[:, :-1], _explore(upright, start)], dim=1)
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
    for _ in range(EXPLORE):
        x = A.rmatmat(_unit(A.matmat(x)))
        x = x - block @ (block.mT @ x)
        x = _unit(x)
    return x


def _unit(x: Tensor) -> Tensor:
    """``x / ‖x‖``, in part where the norm is too small for a number."""
    return x / torch.linalg.vector_norm(x).clamp_min(torch.finfo(x.dtype).tiny)


def as_matrix(weight: Tensor, dim: int = 0) -> Tensor:
    """The weight with ``dim`` in front and the rest flattened, as torch's own takes it."""
    return working(weight).movedim(dim, 0).flatten(1)


def working(weight: Tensor) -> Tensor:
    """The weight in float32 at least."""
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
