"""The one derivative rule of singular triplets: any order, reverse and forward, for any map.

For simple singular values the conditions ``A v_i = σ_i u_i``, ``Aᵀ u_i = σ_i v_i`` with unit
vectors define (σ_i, u_i, v_i) implicitly.  Differentiating them gives ``dσ_i = u_iᵀ dA v_i`` and::

    K_i [du_i; dv_i] = [dA v_i − dσ_i u_i; dAᵀ u_i − dσ_i v_i],   K_i = [[σ_i I, −A], [−Aᵀ, σ_i I]].

K_i is symmetric; its null vector [u_i; v_i] and the right-hand side are orthogonal, and du_i ⊥ u_i,
dv_i ⊥ v_i make the solution unique.  We split it.  *Inside the block* of the k triplets, K_i is
diagonal in pairs, and with ``X = UᵀdA V``::

    u_jᵀdu_i = ½(X_ji + X_ij)/(σ_i − σ_j) + ½(X_ji − X_ij)/(σ_i + σ_j)
    v_jᵀdv_i = ½(X_ji + X_ij)/(σ_i − σ_j) − ½(X_ji − X_ij)/(σ_i + σ_j).

*Outside*, p_i ⊥ U and q_i ⊥ V solve K_i [p_i; q_i] = [φ_i; ψ_i] for the projected right-hand
side; there K_i is positive definite, and this solve is the work of an adjoint solver.  Reverse mode
is the transpose: for cotangents ξ, Φ, Ψ of σ, U, V, with a = UᵀΦ − ΦᵀU and b = VᵀΨ − ΨᵀV::

    Ā = U (diag ξ + M) Vᵀ + P Vᵀ + U Qᵀ,   M_ji = ½(a + b)_ji/(σ_i − σ_j) + ½(a − b)_ji/(σ_i + σ_j).

Ā has rank 2k at most and goes to the tensors of a map as the gradient of ``tr(LᵀA R)``, with
``L = [U(diag ξ + M) + P, U]`` and ``R = [V, Q]``: A = W0 + s·B·A₁ is never formed.

``a + b`` measures how the loss depends on the rotation of u_i, v_i within the block.  For a loss of
projectors it is zero, and the first term of M vanishes however close σ_i and σ_j are.  So the
quotient is zero where its numerator is zero to rounding.  Where it is not and σ_i and σ_j cannot be
told apart, the loss depends on an arbitrary choice of basis, and a warning names the gap.

The solve itself is differentiated as a function of (A, σ, U, V, Φ, Ψ), with the multipliers of its
constraints λ = UᵀΦ, μ = VᵀΨ; so derivatives of every order are further solves of the same kind.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from bulkedge._errors import DegenerateWarning, InputError
from bulkedge._linmap import Dense, LinearMap
from bulkedge._precision import full_precision

from ._compiled import one_by_one, op_implicit, op_leading, token
from ._gauge import over_gap, pair_scale, sums, turns, warn_of_ties
from ._numbers import Evidence, Outputs, flatten, implicit, leading
from .adjoint import AdjointSolver
from .solver import Solver


@dataclass(frozen=True)
class Problem:
    """What is asked for: everything but the tensors.

    Attributes:
        A: The map; its tensors are placeholders, the real ones come with each call.
        k: How many triplets.
        solver: The forward method.
        adjoint: The backward method.
        generator: Source of the start, None for a fixed seed.
        strict: Raise where the tolerance is not reached.
    """

    A: LinearMap
    k: int
    solver: Solver
    adjoint: AdjointSolver
    generator: torch.Generator | None
    strict: bool

    @property
    def plain(self) -> bool:
        """Whether it is one matrix, that a registered operator can take."""
        return type(self.A) is Dense and self.generator is None


class Triplet(torch.autograd.Function):
    """σ, U, V and the evidence, with reverse mode; :class:`TripletBothWays` adds the rest."""

    @staticmethod
    def forward(problem: Problem, start: Tensor | None, *tensors: Tensor) -> Outputs:
        """Solve; the derivative does not see how."""
        if problem.plain and _needs_operator(*tensors):
            return op_leading(*tensors, start, problem.k, token(problem.solver), problem.strict)
        A = problem.A.with_tensors(*tensors)
        return flatten(
            leading(A, problem.k, problem.solver, start, problem.generator, strict=problem.strict)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        """Keep the triplets and the evidence: they are all that the rule needs."""
        ctx.problem, _, *tensors = inputs
        sigma, u, v, residuals, gaps, counts, theta, Z = output
        ctx.mark_non_differentiable(residuals, gaps, counts, theta, Z)
        ctx.set_materialize_grads(False)
        _keep(ctx, sigma, u, v, residuals, gaps, theta, Z, *tensors)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, xi: Tensor | None, phi: Tensor | None, psi: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        """``Ā = U (diag ξ + M) Vᵀ + P Vᵀ + U Qᵀ``, pulled back to the tensors of the map."""
        known = ctx.saved_tensors
        sigma, u, v, _, _, _, _, *tensors = known
        with full_precision(u.device):
            L, R = torch.zeros_like(u) if xi is None else u * xi, v
            if phi is not None or psi is not None:
                if len(sigma) > 1:
                    L = L + u @ _inside(sigma, u, v, phi, psi)
                P, Q = outside(ctx.problem, True, xi, phi, psi, *known)
                L, R = torch.cat([L + P, u], dim=1), torch.cat([v, Q], dim=1)
            A = ctx.problem.A.with_tensors(*tensors)
            return None, None, *A.pullback(L, R, ctx.needs_input_grad[2:])


class TripletBothWays(Triplet):
    """With forward mode and vmap, which the compiler's tracer does not take."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """``dσ``, ``dU`` and ``dV``."""
        known = ctx.saved_tensors
        sigma, u, v, _, _, _, _, *tensors = known
        with full_precision(u.device):
            dA = ctx.problem.A.with_tensors(*tensors).pushforward(*_filled(tensors, tangents[2:]))
            right, left = dA.matmat(v), dA.rmatmat(u)
            X = u.mT @ right
            try:
                du, dv = outside(ctx.problem, False, None, right, left, *known)
            except InputError as error:  # vectors of a zero σ; that of σ itself is defined
                warnings.warn(f"{error}; theirs is NaN", DegenerateWarning, stacklevel=2)
                du, dv = torch.full_like(u, torch.nan), torch.full_like(v, torch.nan)
            if len(sigma) > 1:
                warn_of_ties(sigma)
                even = over_gap(sigma, X + X.mT, torch.zeros_like(X)) / 2
                odd = (X - X.mT) / sums(sigma) / 2
                du, dv = du + u @ (even + odd), dv + v @ (even - odd)
            return torch.diagonal(X), du, dv, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """One matrix after the other."""
        return one_by_one(TripletBothWays.apply, info, in_dims, *args)


class Outside(torch.autograd.Function):
    """P ⊥ U and Q ⊥ V with ``K_i [p_i; q_i] = [φ_i; ψ_i]`` outside the block."""

    @staticmethod
    def forward(
        problem: Problem,
        judge: bool,
        xi: Tensor | None,
        phi: Tensor | None,
        psi: Tensor | None,
        *known: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Solve, and judge whether the data determine the answer."""
        if problem.plain and _needs_operator(phi, psi, *known):
            return op_implicit(xi, phi, psi, *known, token(problem.adjoint), judge)
        sigma, u, v, residuals, gaps, theta, Z, *tensors = known
        return implicit(
            problem.A.with_tensors(*tensors),
            problem.adjoint,
            (sigma, u, v),
            (phi, psi),
            Evidence(residuals, gaps, (theta, Z)),
            xi=xi,
            judge=judge,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the system and its solution."""
        ctx.problem, _, _, *system = inputs
        ctx.set_materialize_grads(False)
        _keep(ctx, *output, *system)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, p_bar: Tensor | None, q_bar: Tensor | None
    ) -> tuple[Any, ...]:
        """With the same solve (a, b) for the cotangents of P and Q."""
        P, Q, phi, psi, *known = ctx.saved_tensors
        _, u, v, _, _, _, _, *tensors = known
        with full_precision(u.device):
            a, b = outside(ctx.problem, False, None, p_bar, q_bar, *known)
            sigma_bar = -((a * P).sum(dim=0) + (b * Q).sum(dim=0))
            u_bar = -_bordered(u, (a, phi), (P, p_bar))
            v_bar = -_bordered(v, (b, psi), (Q, q_bar))
            A = ctx.problem.A.with_tensors(*tensors)
            L, R = torch.cat([a, P], dim=1), torch.cat([Q, b], dim=1)
            A_bar = A.pullback(L, R, ctx.needs_input_grad[-len(tensors) :])
        phi_bar, psi_bar = (None if x is None else g for x, g in ((phi, a), (psi, b)))
        evidence = None, None, None, None
        return None, None, None, phi_bar, psi_bar, sigma_bar, u_bar, v_bar, *evidence, *A_bar


class OutsideBothWays(Outside):
    """With forward mode and vmap."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        """The solve for the tangent of the right-hand side less that of K times the solution."""
        P, Q, phi, psi, *known = ctx.saved_tensors
        _, u, v, _, _, _, _, *tensors = known
        with full_precision(u.device):
            moved = _filled((phi, psi, *known), tangents[3:])
            d_phi, d_psi, d_sigma, du, dv, _, _, _, _, *d_tensors = cast("list[Tensor]", moved)
            dA = ctx.problem.A.with_tensors(*tensors).pushforward(*d_tensors)
            right = dA.matmat(Q) - d_sigma * P
            left = dA.rmatmat(P) - d_sigma * Q
            if phi is not None:
                right = right + d_phi - du @ (u.mT @ phi)
            if psi is not None:
                left = left + d_psi - dv @ (v.mT @ psi)
            p, q = outside(ctx.problem, False, None, right, left, *known)
            # P stays orthogonal to U as both move
            return p - u @ (du.mT @ P), q - v @ (dv.mT @ Q)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """One system after the other."""
        return one_by_one(OutsideBothWays.apply, info, in_dims, *args)


class TripletTraced(Triplet):
    """For the compiler's tracer, which wants a fixed number of arguments."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        problem: Problem, start: Tensor | None, A: Tensor
    ) -> Outputs:
        """One matrix."""
        return Triplet.forward(problem, start, A)


class OutsideTraced(Outside):
    """For the compiler's tracer."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        problem: Problem,
        judge: bool,
        xi: Tensor | None,
        phi: Tensor | None,
        psi: Tensor | None,
        sigma: Tensor,
        u: Tensor,
        v: Tensor,
        residuals: Tensor,
        gaps: Tensor,
        theta: Tensor,
        Z: Tensor,
        A: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One matrix."""
        known = sigma, u, v, residuals, gaps, theta, Z, A
        return Outside.forward(problem, judge, xi, phi, psi, *known)


def triplet(problem: Problem, start: Tensor | None, *tensors: Tensor) -> Outputs:
    """The differentiable triplets, flat: see :func:`flatten`."""
    if problem.plain and torch.compiler.is_compiling():
        return TripletTraced.apply(problem, start, *tensors)
    _refuse_forward_over_forward()
    return TripletBothWays.apply(problem, start, *tensors)


def outside(problem: Problem, *args: Any) -> tuple[Tensor, Tensor]:
    """The differentiable solve."""
    if problem.plain and torch.compiler.is_compiling():
        return OutsideTraced.apply(problem, *args)
    return OutsideBothWays.apply(problem, *args)


def _keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Save for either mode; the compiler's tracer knows of one alone."""
    ctx.save_for_backward(*tensors)
    if not (ctx.problem.plain and torch.compiler.is_compiling()):
        ctx.save_for_forward(*tensors)


def _needs_operator(*tensors: Tensor | None) -> bool:
    """Whether someone else must unpack the numbers: the compiler, or autograd's own vmap.

    That vmap (``is_grads_batched``) is not torch.func's, and knows only operators.  In all other
    cases they are passed by, because the first call of a registered operator loads the compiler.

    Returns:
        True for a registered operator.
    """
    if torch.compiler.is_compiling():
        return True
    batched: Any = torch._C._parse_dispatch_key("Batched")
    return any(torch._C._dispatch_keys(x).has(batched) for x in tensors if x is not None)


def _filled(
    values: Sequence[Tensor | None], tangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Zeros where a tangent is absent."""
    return [
        None if x is None else torch.zeros_like(x) if t is None else t
        for x, t in zip(values, tangents, strict=True)
    ]


def _refuse_forward_over_forward() -> None:
    """Inside two forward modes a custom function loses the outer tangent, and torch is silent."""
    if torch._C._are_functorch_transforms_active():
        from torch._C._functorch import TransformType
        from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

        kinds = [level.key() for level in retrieve_all_functorch_interpreters()]
        if kinds.count(TransformType.Jvp) > 1:
            raise InputError(
                "forward mode over forward mode is not supported by torch's custom functions; "
                "take reverse mode for one of the two, say jacfwd(jacrev(f))"
            )


def _inside(sigma: Tensor, u: Tensor, v: Tensor, phi: Tensor | None, psi: Tensor | None) -> Tensor:
    """M, the part of Ā inside the block, shape ``(k, k)``."""
    a, b = turns(u, phi), turns(v, psi)
    return over_gap(sigma, a + b, pair_scale(phi, psi)) / 2 + (a - b) / sums(sigma) / 2


def _bordered(basis: Tensor, *pairs: tuple[Tensor, Tensor | None]) -> Tensor:
    """``Σ x (basisᵀ y)ᵀ``: the derivative of the constraints."""
    terms = [x @ (y.mT @ basis) for x, y in pairs if y is not None]
    return sum(terms, start=torch.zeros_like(basis))
