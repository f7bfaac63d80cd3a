"""The leading triplet of a matrix that changes a little from step to step."""

from __future__ import annotations

import torch
from torch import Tensor

from bulkedge._guard import precise
from bulkedge._linmap import Dense, LinearMap
from bulkedge._precision import exact
from bulkedge.triplet import BlockKrylov, SingularTriplets, Status
from bulkedge.triplet._compiled import require_no_tangents
from bulkedge.triplet._given import GivenTriplet
from bulkedge.triplet._small_rule import nothing_around
from bulkedge.triplet._triplet import solve_from
from bulkedge.triplet.solver._start import generic

BLOCK = 6
"""The number of vectors carried from step to step, with the explorer."""
EXPLORER_STEPS = 4
"""The number of power iterations with the explorer at each step."""
LEAST, LARGEST = 1e-9, 1e9
"""Norms between these neither under- nor overflow in four products."""
LEAST_RTOL = 1e-5
"""A residual this small, relative to σ₁, is above the rounding of float32."""


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
    if not start.numel():
        return start
    peak = torch.linalg.vector_norm(start.detach(), torch.inf)
    if nothing_around(start) and 0 < float(peak) <= 2:
        return start
    return torch.where((peak > 0) & (peak <= 2), start, generic(*start.shape, like=start))


@precise
def track(
    A: LinearMap, start: Tensor, *, rtol: float, max_steps: int | None = None
) -> tuple[SingularTriplets, Tensor]:
    """The leading triplet of A, differentiable, and the start for the next matrix.

    A warm start can miss a new leading direction: its block is nearly invariant under AᵀA, so a
    direction orthogonal to the block would not enter it, however large its value.  So the last
    column, the explorer, is perturbed a little and first does a few power iterations outside the
    span of the others.  It converges to a direction that has come to exceed the known ones, which
    Rayleigh-Ritz then finds in the block.  Only a certificate excludes that a direction is missed.

    Cost: two passes with the block if the matrix hardly changed, and ``2 · EXPLORER_STEPS`` passes
    with one vector.

    Args:
        A: Shape ``(m, n)``.
        start: Shape ``(min(m, n), b)``; one that is no block of unit vectors is replaced.
        rtol: The residual to reach, relative to σ₁; the relative error of σ₁ itself is smaller by
            a factor of about residual/gap.
        max_steps: At most so many steps; 500 if None.

    Returns:
        The triplet and a start of the same shape.
    """
    transformed = torch._C._are_functorch_transforms_active()
    if torch.compiler.is_compiling() and type(A) is Dense and not transformed:
        return _in_graph(A.matrix, start, rtol, max_steps)
    start, columns = valid_start(start), start.shape[1]
    if type(A) is Dense and columns and rtol >= LEAST_RTOL and nothing_around(A.matrix, start):
        quick = _one_step(A.matrix, start, rtol, accept=max_steps == 1)
        if quick is not None:
            return quick
    with torch.no_grad():
        tall = A if A.shape[0] >= A.shape[1] else A.T
        # the explorer may have overflowed on its way
        start = valid_start(torch.cat([start[:, :-1], _explore(tall, start)], dim=1))
    solver = BlockKrylov(rtol=rtol, oversample=columns - 1, max_steps=max_steps or 500)
    result = solve_from(A, 1, start, solver=solver, strict=False)
    with torch.no_grad():
        v = result.v if A.shape[0] >= A.shape[1] else result.u
        near = start[:, :0] if result.near is None else result.near[1]
        block = torch.cat([v.detach(), near], dim=1)[:, : max(columns - 1, 1)]
        return result, torch.cat([block, start[:, -1:]], dim=1)[:, :columns]


def _one_step(
    A: Tensor, start: Tensor, rtol: float, *, accept: bool
) -> tuple[SingularTriplets, Tensor] | None:
    """:func:`track` where one Rayleigh-Ritz step does, which is nearly always; else None."""
    with torch.no_grad():
        M = A.detach()
        M = M if M.shape[0] >= M.shape[1] else M.mT
        explorer, columns = _explored(M, start), start.shape[1]
        V = torch.linalg.qr(torch.cat([start[:, :-1], explorer], dim=1)).Q
        image = M @ V
        if not LEAST < float(torch.linalg.vector_norm(image)) < LARGEST:
            return None
        _, Y = torch.linalg.eigh(exact(image.mT @ image))
        Y = Y.flip(1).to(M)
        V, image = V @ Y, image @ Y
        values = torch.linalg.vector_norm(image, dim=0)
        sigma, theta = values.split([1, len(values) - 1])
        u, v = image[:, :1] / sigma, V[:, :1].clone()
        residual = torch.linalg.vector_norm(torch.addmm(v * sigma, M.mT, u, beta=-1), dim=0)
        converged = float(residual) <= rtol * float(sigma)
        if not (accept or converged):
            return None
        sigma, gap = sigma.clone(), sigma - theta[:1] if len(theta) else sigma
        following = torch.cat([V[:, : max(columns - 1, 1)], explorer], dim=1)[:, :columns]
        Z = V[:, 1:]
    (u, v) = (u, v) if A.shape[0] >= A.shape[1] else (v, u)
    found = sigma, u, v, residual, gap, theta, Z
    if A.requires_grad and torch.is_grad_enabled():
        sigma, u, v = GivenTriplet.apply(found, A)
    status = Status.CONVERGED if converged else Status.MAX_STEPS
    passes = 2 * EXPLORER_STEPS + 2
    near = theta, Z
    return SingularTriplets(sigma, u, v, residual, gap, 1, passes, status, near), following


def _in_graph(
    A: Tensor, start: Tensor, rtol: float, max_steps: int | None
) -> tuple[SingularTriplets, Tensor]:
    """:func:`track` in a compiled graph: all of it one operator, and one node that has derivatives.

    Returns:
        The triplet and a start of the same shape.
    """
    *found, following = op_track(A.detach(), start.detach(), rtol, max_steps)
    _allow_node()
    sigma, u, v = node(A, *found)
    residual, gap, *near = found[3:]
    unknown = -1, -1, Status.DEFERRED
    return SingularTriplets(sigma, u, v, residual, gap, *unknown, (near[0], near[1])), following


@torch.library.custom_op("bulkedge::track", mutates_args=())
def op_track(
    A: Tensor, start: Tensor, rtol: float, max_steps: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """σ, u, v, residual, gap, values and vectors near them, and the start for the next matrix."""
    require_no_tangents()
    result, following = track(Dense(A), start, rtol=rtol, max_steps=max_steps)
    theta, Z = result.near or (start.new_zeros(0), start[:, :0])
    near = 0, start.shape[1] - theta.shape[0]
    pad = torch.nn.functional.pad
    found = result.sigma, result.u, result.v, result.residuals, result.gaps
    outputs = (*found, pad(theta, near), pad(Z, near), following)
    # their own memory, laid out like the fake tensors below
    own = (x.clone(memory_format=torch.contiguous_format) for x in outputs)
    sigma, u, v, residual, gap, theta, Z, following = own
    return sigma, u, v, residual, gap, theta, Z, following


@op_track.register_fake
def _(A: Tensor, start: Tensor, *_: object) -> tuple[Tensor, ...]:
    (m, n), columns = A.shape, start.shape[1]
    shapes = (1,), (m, 1), (n, 1), (1,), (1,), (columns,), start.shape, start.shape
    return tuple(A.new_empty(shape) for shape in shapes)


def node(A: Tensor, *found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`op_track` has found, as one node of a compiled graph, with its derivatives."""
    return GivenTriplet.apply(found, A)


def _allow_node() -> None:
    """Let the compiler take :func:`node` as it is; it runs this before it looks the name up."""
    torch.compiler.allow_in_graph(node)


# This is what torch.compiler.assume_constant_result sets; it would load the compiler at import.
_allow_node._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _explored(M: Tensor, start: Tensor) -> Tensor:
    """:func:`_explore` of a matrix whose norm is no extreme number; the vector of unit length."""
    block, x = start[:, :-1], start[:, -1]
    x = torch.add(x, x.roll(1, 0), alpha=0.3)
    adjoint, across = M.mT, block.mT
    for step in range(EXPLORER_STEPS):
        x = adjoint.mv(M.mv(x))
        x = torch.addmv(x, block, across.mv(x), alpha=-1)
        if step % 2:  # two steps neither under- nor overflow
            x = x / torch.linalg.vector_norm(x)
    return x[:, None]


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
