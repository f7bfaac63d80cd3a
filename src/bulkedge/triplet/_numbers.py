"""The two places where numbers are computed: the triplets, and the system of their derivative.

Both work on an upright map (m ≥ n) divided by a power of two, so that no square under- or overflows
and the solvers need to know neither.  Neither knows of autograd.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bulkedge._errors import ConvergenceError, InputError
from bulkedge._linmap import Counted, LinearMap, Scaled, not_finite, remedy, times_power
from bulkedge._precision import exact, full_precision

from ._gauge import (
    negligible,
    pair_scale,
    rotation_gradient,
    warn_of_cut,
    warn_of_rotations,
    warn_of_ties,
)
from ._known import has_vectors, require_known
from ._result import SingularTriplets, Status, stated
from ._size import divisor, exponent_of, power_of_two, size_of, times_power_of_two
from ._transposed import require_transposed
from .adjoint import AdjointSolver, System
from .solver import Solver
from .solver._start import fixed_seed

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

SCALE_WITH_MATRIX = ("sigma", "residuals", "gaps")
"""The fields of a result that scale with the matrix."""
NEAR = 16
"""This many singular values beyond the k-th are kept to precondition the derivative."""
Ambiguity = Literal["nothing", "rotations", "ties", "cut"]
"""What :func:`solve_outside_block` warns of besides its own accuracy."""


@dataclass(frozen=True)
class ForwardEvidence:
    """What the forward solve knows about its triplets, for the derivative to use.

    Attributes:
        residuals: Shape ``(k,)``.
        gaps: Shape ``(k,)``.
        near: See :class:`SingularTriplets`.
    """

    residuals: Tensor
    gaps: Tensor
    near: tuple[Tensor, Tensor]


def solve_leading(
    A: LinearMap,
    k: int,
    solver: Solver,
    start: Tensor | None,
    generator: torch.Generator | None,
    *,
    strict: bool,
) -> SingularTriplets:
    """The k leading triplets of A; ``start`` is on the shorter side of A."""
    with torch.no_grad(), full_precision(A.device):
        size = size_of(probed := Counted(A))
        if start is not None and not bool(torch.isfinite(start).all()):
            raise InputError("expected a finite init, got NaN or Inf")
        upright = _upright(Scaled(A, 1 / size) if size != 1 else A)
        try:
            result = solver.compute(upright, k, start, generator or fixed_seed())
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise not_finite(A) from error
        known = bool((result.sigma + result.residuals).isfinite().all())
        if strict and known and result.status is not Status.CONVERGED:
            require_transposed(upright, result.u, result.v)  # no more steps would help
    if size != 1:
        figures = {
            name: times_power_of_two(getattr(result, name), size) for name in SCALE_WITH_MATRIX
        }
        result = dataclasses.replace(result, **figures)
    if bool((result.sigma + result.residuals).isnan().any()):
        raise not_finite(A)
    if not bool(result.sigma.isfinite().all()):
        raise InputError(
            f"expected singular values that {A.dtype} can hold, got larger ones; {remedy(A.dtype)}"
        )
    u, v = (result.u, result.v) if _is_upright(A) else (result.v, result.u)
    near = _near(result, size, min(A.shape))
    passes = result.passes + probed.passes[0]
    result = dataclasses.replace(result, u=u, v=v, near=near, passes=passes)
    if strict and result.status is not Status.CONVERGED:
        raise ConvergenceError(
            f"{type(solver).__name__} on a {A.shape[0]}×{A.shape[1]} matrix, k={k}: largest "
            f"residual {float(result.residuals.max()):.2e} after {result.steps} steps; "
            f"{result.status.value}",
            dataclasses.replace(result, residuals=stated(result.residuals, result.sigma)),
        )
    return result


def solve_outside_block(
    A: LinearMap,
    adjoint: AdjointSolver,
    triplets: tuple[Tensor, Tensor, Tensor],
    cotangents: tuple[Tensor | None, Tensor | None],
    evidence: ForwardEvidence,
    *,
    xi: Tensor | None,
    warn_of: Ambiguity,
    tangent: bool,
    traced: bool = False,
) -> tuple[Tensor, Tensor]:
    """P ⊥ U and Q ⊥ V with ``K_i [p_i; q_i] = [φ_i; ψ_i]`` on the complement of the block.

    float32 is refined: the residual is taken in float64 where values lie close, since its rounding
    error comes back multiplied by σ/gap.

    ``warn_of`` says when a :class:`DegenerateWarning` is given besides:

    * ``"rotations"``: where the loss depends on an arbitrary basis within the block.  Then φ and ψ
      are the cotangents of the vectors themselves, and ξ is that of σ.
    * ``"ties"``: where values within the block are nearly equal.
    * ``"cut"``: where there is no gap below the k-th value.  Then only the spaces spanned by U and
      V count.
    * ``"nothing"``: nowhere.

    ``tangent`` says that φ and ψ are of forward mode.  Vectors of a zero σ then have the tangent
    NaN, with a warning instead of an error, because the tangent of σ itself is defined.

    ``traced`` says that zeros may stand for no cotangents at all, as a compiled graph fills them in
    where a loss depends on σ alone.  Vectors of a zero σ then get a warning instead of an error.

    Returns:
        P and Q, shaped like U and V; NaN where a cotangent is not finite.

    Raises:
        InputError: If a σ is zero to rounding, but for a tangent; or if the dtype has no numbers as
            large as the derivative.
    """
    with torch.no_grad(), full_precision(A.device):
        sigma, u, v = triplets
        if not _is_upright(A):
            swapped = (sigma, v, u), (cotangents[1], cotangents[0])
            q, p = solve_outside_block(
                A.T,
                adjoint,
                *swapped,
                evidence,
                xi=xi,
                warn_of=warn_of,
                tangent=tangent,
                traced=traced,
            )
            return p, q
        scale = _scale(cotangents)
        phi, psi = (None if c is None or not bool(c.any()) else c / scale for c in cotangents)
        nothing, spaces_only = phi is None and psi is None, warn_of == "cut"
        # Also for cotangents of zero: those of UΣVᵀ are multiplied by the σ that is zero.
        unused = nothing and traced and not spaces_only and not tangent
        if math.isnan(scale) or not (has_vectors(sigma, A.shape, tangent, unused) or unused):
            return torch.full_like(u, torch.nan), torch.full_like(v, torch.nan)
        warned = spaces_only and warn_of_cut(sigma, evidence.near[0])
        if nothing:
            return torch.zeros_like(u), torch.zeros_like(v)
        if warn_of == "rotations":
            xi = None if xi is None else xi / scale
            rotation = rotation_gradient(u, phi) + rotation_gradient(v, psi)
            warn_of_rotations(sigma, rotation, pair_scale(phi, psi), xi)
        elif warn_of == "ties":
            warn_of_ties(sigma)
        size = divisor(float(sigma[0]))
        theta, Z = evidence.near
        near, unit = (times_power_of_two(theta, 1 / size), Z), Scaled(A, 1 / size)
        # A subnormal singular value has lost digits, its vectors have not: compute it from them.
        small = float(sigma[-1]) < torch.finfo(sigma.dtype).tiny / torch.finfo(sigma.dtype).eps
        known = (u * unit.matmat(v)).sum(dim=0) if small else times_power_of_two(sigma, 1 / size)
        system = System(unit, known, u, v, None, None, near)
        system = dataclasses.replace(
            system, Phi=_met(system.outside_u, phi), Psi=_met(system.outside_v, psi)
        )
        if system.Phi is None and system.Psi is None:
            return torch.zeros_like(u), torch.zeros_like(v)
        close = float(evidence.gaps.min()) < 0.1 * float(sigma[0])
        p, q = _refined(adjoint, system, close=close)
        residuals, gaps = (
            times_power_of_two(x, 1 / size) for x in (evidence.residuals, evidence.gaps)
        )
        require_known(
            adjoint, system, (p, q), residuals, gaps, spaces_only=spaces_only, warned=warned
        )
        power = exponent_of(scale) - exponent_of(size)  # scale / size may be beyond all numbers
        p, q = times_power(p, power), times_power(q, power)
        if not all(bool(torch.isfinite(x).all()) for x in (p, q)):
            raise InputError(
                f"expected a matrix whose vectors have a derivative within the numbers of "
                f"{p.dtype}, got σ = {float(sigma[-1]):.1e}: multiply the matrix by a number, or "
                "the loss by a small one"
            )
        return p, q


def _met(outside: Callable[[Tensor], Tensor], cotangent: Tensor | None) -> Tensor | None:
    """The part of a cotangent outside the block, columns of rounding alone as zeros, or None."""
    if cotangent is None:
        return None
    # A solve for rounding would cost as many steps as any, and warn of gaps that nothing meets.
    part = outside(outside(cotangent))  # twice, for the digits of a small part
    lengths = (torch.linalg.vector_norm(x, dim=0) for x in (part, cotangent))
    part = torch.where(negligible(*lengths), 0.0, part)
    return part if bool(part.any()) else None


def _scale(cotangents: tuple[Tensor | None, Tensor | None]) -> float:
    """A power of two of the size of Φ and Ψ, so that their squares do not underflow; or NaN."""
    largest = max((float(c.abs().max()) for c in cotangents if c is not None), default=0.0)
    finite = all(bool(torch.isfinite(c).all()) for c in cotangents if c is not None)
    return power_of_two(largest) if finite else math.nan


def flatten(result: SingularTriplets) -> Outputs:
    """Tensors alone: σ, u, v, residuals, gaps, (steps, passes, status), near values and vectors."""
    counts = torch.tensor([result.steps, result.passes, list(Status).index(result.status)])
    if result.near is None:
        raise TypeError("expected a result of solve_leading(), which fills near")
    figures = (result.sigma, result.u, result.v, result.residuals, result.gaps)
    theta, Z = result.near
    # Contiguous clones, because autograd tracks views.
    own = (x.clone(memory_format=torch.contiguous_format) for x in (*figures, theta, Z))
    sigma, u, v, residuals, gaps, theta, Z = own
    return sigma, u, v, residuals, gaps, counts, theta, Z


def _refined(adjoint: AdjointSolver, system: System, *, close: bool) -> tuple[Tensor, Tensor]:
    """Solve; in float32 once more for the residual, until the correction is small."""
    p, q = adjoint.solve(system)
    if p.dtype is torch.float64:
        return p, q
    wide = _in_float64(system) if close else system
    p, q = p.to(wide.U), q.to(wide.U)
    for _ in range(4):
        r_u, r_v = (r.to(system.U) for r in wide.left_over(p, q))
        d_p, d_q = adjoint.solve(dataclasses.replace(system, Phi=r_u, Psi=r_v))
        p, q = p + d_p.to(p), q + d_q.to(q)
        if bool((_norms(d_p, d_q).to(p.device) <= 1e-3 * _norms(p, q)).all()):
            break
    return p.to(system.U), q.to(system.U)


def _in_float64(system: System) -> System:
    """The same system in float64, with σ from its Rayleigh quotient: its error counts most."""
    A = system.A.to(torch.float64)
    U, V = exact(system.U), exact(system.V)
    lengths = U.square().sum(dim=0).sqrt() * V.square().sum(dim=0).sqrt()
    sigma = (U * A.matmat(V)).sum(dim=0) / lengths
    Phi, Psi = (None if c is None else exact(c) for c in (system.Phi, system.Psi))
    return System(A, sigma, U, V, Phi, Psi, system.near)


def _is_upright(A: LinearMap) -> bool:
    return A.shape[0] >= A.shape[1]


def _upright(A: LinearMap) -> LinearMap:
    """Solvers work on the shorter side."""
    return A if _is_upright(A) else A.T


def _near(result: SingularTriplets, size: float, n: int) -> tuple[Tensor, Tensor]:
    """NEAR values and vectors, zeros where the solver returned fewer."""
    theta, Z = result.sigma.new_zeros(NEAR), result.v.new_zeros(n, NEAR)
    if result.near is not None:
        count = min(NEAR, len(result.near[0]))
        theta[:count] = times_power_of_two(result.near[0][:count], size)
        Z[:, :count] = result.near[1][:, :count]
    return theta, Z


def _norms(p: Tensor, q: Tensor) -> Tensor:
    return torch.hypot(torch.linalg.vector_norm(p, dim=0), torch.linalg.vector_norm(q, dim=0))
