"""Whether the derivative of singular vectors exists, and is known to working accuracy."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from bulkedge._errors import ConvergenceError, DegenerateWarning, InputError

from ._gauge import cut_advice
from ._result import resolution
from .adjoint import AdjointSolver, System


def has_vectors(sigma: Tensor, shape: tuple[int, int], tangent: bool, unused: bool) -> bool:
    """Whether every σ is above rounding; if not, an error, or for these two a warning."""
    try:
        _require_nonzero(sigma, shape)
    except InputError as error:
        if not tangent and not unused:
            raise
        theirs = "is NaN" if tangent else "was taken for 0"
        warnings.warn(f"{error}; theirs {theirs}", DegenerateWarning, stacklevel=3)
        return False
    return True


def _require_nonzero(sigma: Tensor, shape: tuple[int, int]) -> None:
    rank = int((sigma > resolution(sigma, shape)).sum())
    if rank < len(sigma):
        raise InputError(
            f"singular value {rank} (from 0) is zero to rounding, so that its vectors are "
            f"arbitrary and have no derivative; "
            + (f"ask for k ≤ {rank} triplets, or " if rank else "")
            + "use a loss of σ alone"
        )


def require_known(
    adjoint: AdjointSolver,
    system: System,
    solution: tuple[Tensor, Tensor],
    residuals: Tensor,
    gaps: Tensor,
    *,
    spaces_only: bool,
    warned: bool,
) -> None:
    """Warn where the vectors, or their derivative, are not known to working accuracy.

    ``λ = xᵀK x / xᵀx`` of the solution x is at least the gap below σ_k, and close to it where x
    lies mostly along the vector of σ_{k+1}.  The vectors are known to an error of residual/λ, and
    their derivative along x no better.

    Raises:
        ConvergenceError: If the adjoint stopped short, and no gap is to blame.
    """
    rhs, x = torch.cat(system.filled), torch.cat(solution)
    root = math.sqrt(torch.finfo(x.dtype).eps)
    lengths = torch.linalg.vector_norm(rhs, dim=0)
    error = torch.linalg.vector_norm(torch.cat(system.left_over(*solution)), dim=0)
    error = error / torch.where(lengths > 0, lengths, 1.0)
    gap_met = (x * rhs).sum(dim=0) / (x * x).sum(dim=0).clamp_min(torch.finfo(x.dtype).tiny)
    gap_met = torch.where(lengths > 0, gap_met.abs(), torch.inf)
    vector_noise = residuals + 8 * torch.finfo(torch.float64).eps * system.sigma[0]
    narrow = ~(vector_noise <= 1e-3 * gap_met)
    rounding = (
        8
        * torch.finfo(x.dtype).eps
        * torch.linalg.vector_norm(x, dim=0)
        / lengths.clamp_min(torch.finfo(x.dtype).tiny)
    )
    failed = ~(error <= 10 * root + rounding)
    # The solution of a failed solve says nothing of the gap: the gaps of the forward solve decide.
    invisible = 64 * torch.finfo(x.dtype).eps * system.sigma[0]
    below = _gaps_below(system, gaps)
    narrow |= failed & ~((vector_noise <= 1e-3 * below) & (below > invisible))
    gap_met = torch.where(failed, below, gap_met)
    if bool((failed & ~narrow).any()):
        raise ConvergenceError(
            f"{type(adjoint).__name__}: the derivative of the singular vectors was not found, "
            f"relative residual {float(error.max()):.1e}; raise max_steps of the adjoint, or use "
            "adjoint=ExplicitSVD()",
            solution,
        )
    if not bool(narrow.any()):
        return
    i = int(narrow.nonzero()[0])
    advice = _advice(system, i, float(gap_met[i]), float(residuals[i]), spaces_only=spaces_only)
    if not bool(torch.isfinite(x).all()):
        raise ConvergenceError(advice, solution)
    if not warned:
        warnings.warn(advice, DegenerateWarning, stacklevel=2)


def _gaps_below(system: System, gaps: Tensor) -> Tensor:
    """``σ_i − σ_{k+1}``, as the forward solve has seen it, shape ``(k,)``."""
    sigma, following = system.sigma, system.near[0][0]
    last = torch.where(following > 0, sigma[-1] - following, gaps[-1])
    return sigma - sigma[-1] + last


def _advice(system: System, i: int, gap_met: float, residual: float, *, spaces_only: bool) -> str:
    """What to do about a gap below the k-th value that a derivative has met."""
    k, top = len(system.sigma), float(system.sigma[0])
    if spaces_only:
        return cut_advice(k, gap_met / top)
    below, more = f"a singular value beyond the k={k} leading ones", "more triplets (larger k)"
    if k == system.A.shape[1]:  # all of them: what is left is the longer side's
        below, more = "0, the value of the null space of the longer side", "fewer triplets"
    return (
        f"the derivative of singular vector {i} (from 0) meets a relative gap of "
        f"{gap_met / top:.1e} to {below}, and the vectors have a relative residual of "
        f"{residual / top:.1e}: ask for {more}, a tighter rtol of the solver, or use a loss of σ "
        "alone"
    )
