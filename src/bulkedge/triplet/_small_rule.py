"""Small matrices, alone or in a batch: the first derivative from the decomposition itself.

It is the rule of :mod:`bulkedge.triplet._implicit`, with its system solved in the basis of all
singular vectors, which the forward solve has found.  Everything else (derivatives of higher order,
forward mode, compilers, tracers, values without a gap) goes the general way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bulkedge._precision import exact, exact_device

from ._gauge import rotation_gradient, sums
from ._numbers import NEAR
from ._result import SingularTriplets, Status, stated
from ._small import SMALL_UP_TO, Small, decompose, upright
from ._tracing import numbers_hidden
from .adjoint import DeflatedCG
from .solver import Auto

Rule = Callable[[int, tuple[Tensor, ...], tuple[Tensor | None, ...]], Tensor]
"""The general rule: k, what it knows of one matrix and the cotangents, to the gradient."""

SAVED = ("squares", "basis", "sigma", "u", "v", "residuals", "gaps")
"""What is kept of a decomposition from forward to backward."""
TALL = 4
"""A matrix with more than this many times as many rows as columns costs less the general way."""
MIN_TIE = 2.0 * torch.finfo(torch.float32).eps ** 0.5
"""Values of the block that are nearer, relative to σ₁, take the general rule and its warnings."""


def small_enough(A: Tensor, k: int) -> bool:
    """Whether matrices are decomposed here, if nothing hides their numbers."""
    if A.ndim < 2 or A.numel() == 0 or A.layout is not torch.strided:
        return False
    long, n = max(A.shape[-2:]), min(A.shape[-2:])
    dense = Auto.dense_below
    return (
        A.dtype in (torch.float32, torch.float64)
        and type(k) is int
        and 1 <= k <= max(n // 4, 1)
        and n <= SMALL_UP_TO
        and (n <= dense or long <= TALL * n)
        and exact_device(A.device) == A.device
    )


def nothing_around(*tensors: Tensor | None) -> bool:
    """Whether tensors are torch's own, can be looked at, and only reverse mode is around."""
    return not (
        torch.compiler.is_compiling()
        or any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors if x is not None)
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or numbers_hidden(*tensors)
    )


def small_triplet(A: Tensor, k: int, rule: Rule) -> SingularTriplets | None:
    """The k leading triplets of small matrices, with a derivative; None where they are no such.

    Args:
        A: Shape ``(..., m, n)``.
        k: How many.
        rule: The general rule, for derivatives of higher order.

    Returns:
        The triplets, those of a batch with its shape in front.
    """
    if not nothing_around(A) or not small_enough(A, k):
        return None
    with torch.no_grad():
        found = decompose(A, k)
    if found is None:
        return None
    sigma, u, v = _differentiable(k, found, A, rule)
    passes, batch = 1 + 2 * found.evaluations, A.shape[:-2].numel()
    near = found.following.to(A.dtype), found.basis[..., -1:].to(A.dtype)
    return SingularTriplets(
        sigma,
        u,
        v,
        stated(found.residuals.to(A.dtype), sigma.detach()),
        found.gaps.to(A.dtype),
        steps=found.evaluations,
        passes=passes * batch,
        status=Status.CONVERGED,
        near=near if A.ndim == 2 else None,
    )


def _differentiable(k: int, found: Small, A: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """σ, u and v in the dtype of A, with their derivative where it is asked for."""
    if A.requires_grad and torch.is_grad_enabled():
        return SmallTriplet.apply(k, found, rule, A)
    return _outputs(found, A)


def _outputs(found: Small, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """σ, u and v as they are given back."""
    tall = A.shape[-2] >= A.shape[-1]
    u, v = (found.u, found.v) if tall else (found.v, found.u)
    sigma = found.sigma[..., 0, :]
    return sigma.to(A.dtype), u.to(A.dtype).contiguous(), v.to(A.dtype).contiguous()


class SmallTriplet(torch.autograd.Function):
    """σ, U and V of a batch of small matrices that are decomposed already, in reverse mode."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, k: int, found: Small, rule: Rule, A: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What was found, in the dtype of A."""
        sigma, u, v = _outputs(found, A)
        if A.dtype is torch.float64:  # these are kept besides
            sigma, u, v = sigma.clone(), u.clone(), v.clone()
        ctx.k, ctx.rule = k, rule
        # A itself is saved, not the copy of it; and saved tensors can be offloaded
        ctx.rest = found.following, found.refinements, found.evaluations
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(sigma, u, v, A, *(getattr(found, name) for name in SAVED))
        return sigma, u, v

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, xi: Tensor | None, phi: Tensor | None, psi: Tensor | None
    ) -> tuple[None, None, None, Tensor | None]:
        """``Ā = U (diag ξ + M) Vᵀ + P Vᵀ + U Qᵀ``, as the general rule has it."""
        cotangents, gradient = (xi, phi, psi), None
        if xi is None and phi is None and psi is None:
            return None, None, None, None
        saved = ctx.saved_tensors
        (*outputs, A), kept = saved[:4], saved[4:]
        found = Small(upright(A), *kept, *ctx.rest)
        if not torch.is_grad_enabled() and nothing_around(*cotangents):
            gradient = _gradient(found, A, xi, phi, psi)
        if gradient is None:
            gradient = _by_rule(ctx, found, (*outputs, A), cotangents)
        return None, None, None, gradient


def _gradient(
    found: Small, A: Tensor, xi: Tensor | None, phi: Tensor | None, psi: Tensor | None
) -> Tensor | None:
    """Ā by the decomposition; None where the general rule may have to warn, or refuse."""
    vectors = phi is not None or psi is not None
    several = found.sigma.shape[-1] > 1
    if vectors and several and not bool((found.gaps > MIN_TIE * found.sigma[..., 0, :1]).all()):
        return None
    tall = A.shape[-2] >= A.shape[-1]
    phi, psi = (None if x is None else exact(x) for x in (phi, psi))
    phi, psi = (phi, psi) if tall else (psi, phi)
    u, v = found.u, found.v
    left, right = None if xi is None else u * exact(xi)[..., None, :], v
    if vectors:
        P, Q = found.outside(phi, psi)
        P = P + u @ _inside(found, phi, psi) if several else P
        P = P if left is None else left + P
        left, right = torch.cat([P, u], dim=-1), torch.cat([v, Q], dim=-1)
    if left is None:
        return None
    gradient = (left @ right.mT if tall else right @ left.mT).to(A.dtype)
    return gradient if math.isfinite(float(gradient.sum())) else None


def _inside(found: Small, phi: Tensor | None, psi: Tensor | None) -> Tensor:
    """M, the part of Ā inside the block, where no values are tied."""
    sigma = found.sigma[..., 0, :]
    a, b = rotation_gradient(found.u, phi), rotation_gradient(found.v, psi)
    gap = sigma[..., None, :] - sigma[..., :, None]
    gap.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    return (a + b) / gap / 2 + (a - b) / sums(sigma) / 2


def _by_rule(
    ctx: Any, found: Small, saved: tuple[Tensor, ...], cotangents: tuple[Tensor | None, ...]
) -> Tensor:
    """Ā by the general rule, which has derivatives itself, one matrix after the other."""
    *outputs, A = saved
    batch = A.shape[:-2]
    evidence = (found.residuals, found.gaps, *_near(found))
    known = (*outputs, *(x.to(A.dtype) for x in evidence), A)

    def each(x: Tensor | None) -> list[Tensor | None]:
        count = batch.numel()
        return [None] * count if x is None else [*x.reshape(count, *x.shape[len(batch) :])]

    ones, given = (zip(*map(each, x), strict=True) for x in (known, cotangents))
    parts = [ctx.rule(ctx.k, *both) for both in zip(ones, given, strict=True)]
    return torch.stack(parts).reshape(A.shape)


def _near(found: Small) -> tuple[Tensor, Tensor]:
    """Values beyond the k-th and their vectors, zeros where there are fewer than :data:`NEAR`."""
    theta = found.squares[..., -NEAR:].clamp_min(0.0).sqrt()
    pad = (0, NEAR - theta.shape[-1])
    Z = found.basis[..., -NEAR:]
    return torch.nn.functional.pad(theta.flip(-1), pad), torch.nn.functional.pad(Z.flip(-1), pad)


def leading_by_vmap(
    info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...], rule: Rule
) -> tuple[tuple[Tensor, ...], tuple[int, ...]] | None:
    """The vmap rule of the triplets where one solve does for all; None where it does not.

    Args:
        info: As torch gives it.
        in_dims: As torch gives it.
        args: The problem, the start and the tensors.
        rule: The general rule.

    Returns:
        What the rule returns: outputs, and where their batch is.
    """
    problem, start, *tensors = args
    if start is not None or not _usual(problem) or not nothing_around(*tensors):
        return None
    A = _stacked(tensors[0], in_dims[2], info.batch_size)
    if not small_enough(A, problem.k) or (found := decompose(A, problem.k)) is None:
        return None
    sigma, u, v = _differentiable(problem.k, found, A, rule)
    counts = [found.evaluations, 1 + 2 * found.evaluations, list(Status).index(Status.CONVERGED)]
    evidence = (x.to(A.dtype).contiguous() for x in (found.residuals, found.gaps, *_near(found)))
    residuals, gaps, theta, Z = evidence
    number = torch.tensor(counts).expand(info.batch_size, 3).clone()
    return (sigma, u, v, residuals, gaps, number, theta, Z), (0,) * 8


def outside_by_vmap(
    info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]] | None:
    """The same for the system of the derivative, without a derivative of its own."""
    problem, _, _, _, phi, psi, *known = args
    tensors = [x for x in (phi, psi, *known) if x is not None]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if recorded or not _usual(problem) or not nothing_around(*tensors):
        return None
    size, dims = info.batch_size, in_dims[4:]
    phi, psi = (
        None if x is None else _stacked(x, dim, size)
        for x, dim in zip((phi, psi), dims[:2], strict=True)
    )
    _, u, v, *_, A = (_stacked(x, dim, size) for x, dim in zip(known, dims[2:], strict=True))
    if not small_enough(A, problem.k) or (found := decompose(A, problem.k)) is None:
        return None
    if problem.k > 1 and not bool((found.gaps > MIN_TIE * found.sigma[..., 0, :1]).all()):
        return None
    tall = A.shape[-2] >= A.shape[-1]
    found = found.turned_like(exact(u if tall else v))
    phi, psi = (None if x is None else exact(x) for x in ((phi, psi) if tall else (psi, phi)))
    P, Q = (x.to(A.dtype) for x in found.outside(phi, psi))
    if not all(bool(x.isfinite().all()) for x in (P, Q)):
        return None
    return ((P, Q) if tall else (Q, P)), (0, 0)


def _usual(problem: Any) -> bool:
    """Whether a problem leaves the methods to us, and asks for vectors one by one."""
    methods = (problem.solver, problem.adjoint) == (Auto(), DeflatedCG())
    return methods and problem.plain and not problem.spaces_only


def _stacked(x: Tensor, dim: int | None, size: int) -> Tensor:
    """A tensor with the batch in front."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
