"""The one derivative rule of singular triplets: any order, reverse and forward, for any map.

For simple singular values the conditions ``A v_i = σ_i u_i``, ``Aᵀ u_i = σ_i v_i`` with unit
vectors define (σ_i, u_i, v_i) implicitly.  Differentiating them gives ``dσ_i = u_iᵀ dA v_i`` and::

    K_i [du_i; dv_i] = [dA v_i − dσ_i u_i; dAᵀ u_i − dσ_i v_i],   K_i = [[σ_i I, −A], [−Aᵀ, σ_i I]].

K_i is symmetric; its null vector [u_i; v_i] and the right-hand side are orthogonal, and du_i ⊥ u_i,
dv_i ⊥ v_i make the solution unique.  We split it.  *Inside the block* of the k triplets, K_i is
diagonal in pairs, and with ``X = UᵀdA V``::

    u_jᵀdu_i = ½(X_ji + X_ij)/(σ_i − σ_j) + ½(X_ji − X_ij)/(σ_i + σ_j)
    v_jᵀdv_i = ½(X_ji + X_ij)/(σ_i − σ_j) − ½(X_ji − X_ij)/(σ_i + σ_j).

*OutsideBlock*, p_i ⊥ U and q_i ⊥ V solve K_i [p_i; q_i] = [φ_i; ψ_i] for the projected right-hand
side; there K_i is positive definite, and this solve is the work of an adjoint solver.  Reverse mode
is the transpose: for cotangents ξ, Φ, Ψ of σ, U, V, with a = UᵀΦ − ΦᵀU and b = VᵀΨ − ΨᵀV::

    Ā = U (diag ξ + M) Vᵀ + P Vᵀ + U Qᵀ,   M_ji = ½(a + b)_ji/(σ_i − σ_j) + ½(a − b)_ji/(σ_i + σ_j).

Ā has rank 2k at most and goes to the tensors of a map as the gradient of ``tr(LᵀA R)``, with
``L = [U(diag ξ + M) + P, U]`` and ``R = [V, Q]``: A = W0 + s·B·A₁ is never formed.

``a + b`` measures how the loss depends on the rotation of u_i, v_i within the block.  For a loss of
projectors it is zero, and the first term of M vanishes however close σ_i and σ_j are.  So the
quotient is set to zero where its numerator is zero to rounding.  Where it is not, and σ_i and σ_j
are equal to rounding, the loss depends on an arbitrary choice of basis, and a warning names the
gap.

The solve itself is differentiated as a function of (A, σ, U, V, Φ, Ψ), with the multipliers of its
constraints λ = UᵀΦ, μ = VᵀΨ; so derivatives of every order are further solves of the same kind.

*Spaces only* (``spaces_only``): the best rank-k part U S Vᵀ with S = UᵀA V depends only on the
spaces that U and V span.  There any smooth choice of bases gives the same derivative.  We take the
bases that do not rotate within their span: ``dU = P``, ``dV = Q``, ``dS = UᵀdA V``.  S is diagonal
at A, and does not stay so as A moves::

    P S − A Q = (I − UUᵀ) dA V,    Q Sᵀ − AᵀP = (I − VVᵀ) dAᵀU.

At A these are the systems K_i again, and no difference of two values of the block occurs.  In
reverse ``Ā = U Ξ Vᵀ + P Vᵀ + U Qᵀ`` for a cotangent Ξ of S, where P and Q solve the same for Φ and
Ψ with Sᵀ in the place of S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._linmap import Dense, LinearMap
from bulkedge._precision import full_precision

from ._compiled import by_rule, op_leading, op_outside_block, strategy, token, vmap_by_loop
from ._gauge import (
    constraint_gradient,
    inside,
    over_gap,
    sigma_cotangent,
    sums,
    times_sigma,
    transposed,
)
from ._numbers import (
    Ambiguity,
    ForwardEvidence,
    Outputs,
    flatten,
    solve_leading,
    solve_outside_block,
)
from ._small_rule import leading_by_vmap, outside_by_vmap
from ._tracing import functionalized, jvp_levels, numbers_hidden
from .adjoint import AdjointSolver, DeflatedCG
from .solver import Auto, Solver


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
        spaces_only: Whether U and V stand only for the spaces that they span.  Then σ is the
            diagonal matrix S, and only what no change of basis alters has derivatives.
    """

    A: LinearMap
    k: int
    solver: Solver
    adjoint: AdjointSolver
    generator: torch.Generator | None
    strict: bool
    spaces_only: bool = False

    @property
    def plain(self) -> bool:
        """Whether a registered operator can take it: one matrix, and no generator."""
        return type(self.A) is Dense and self.generator is None

    @property
    def ambiguity(self) -> Ambiguity:
        """What to warn of where the choice of a basis within the block does not matter."""
        return "cut" if self.spaces_only else "nothing"


class Triplet(torch.autograd.Function):
    """σ, U, V and the evidence, in reverse mode, forward mode and vmap."""

    @staticmethod
    def forward(problem: Problem, start: Tensor | None, *tensors: Tensor) -> Outputs:
        """Solve, outside of autograd."""
        if numbers_hidden(*tensors):
            _require_plain(problem)
            with by_rule():
                solver = token(problem.solver)
                found = op_leading(*tensors, start, problem.k, solver, problem.strict)
        else:
            A, source = problem.A.with_tensors(*tensors), problem.generator
            found = flatten(
                solve_leading(A, problem.k, problem.solver, start, source, strict=problem.strict)
            )
        sigma, *others = found
        return cast("Outputs", (torch.diag(sigma) if problem.spaces_only else sigma, *others))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        """Keep the triplets and the evidence: they are all that the rule needs."""
        ctx.problem, _, *tensors = inputs
        sigma, u, v, residuals, gaps, counts, theta, Z = output
        ctx.mark_non_differentiable(residuals, gaps, counts, theta, Z)
        ctx.set_materialize_grads(False)
        _save(ctx, sigma, u, v, residuals, gaps, theta, Z, *tensors)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, xi: Tensor | None, phi: Tensor | None, psi: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        """``Ā = U (diag ξ + M) Vᵀ + P Vᵀ + U Qᵀ``, pulled back to the tensors of the map."""
        known = ctx.saved_tensors
        sigma, u, v, _, _, _, _, *tensors = known
        with full_precision(u.device):
            L, R = torch.zeros_like(u) if xi is None else times_sigma(u, xi), v
            if phi is not None or psi is not None:
                several = len(sigma) > 1 and not ctx.problem.spaces_only
                if several:
                    L = L + u @ inside(sigma, u, v, phi, psi)
                warn_of = "rotations" if several else ctx.problem.ambiguity
                P, Q = OutsideBlock.apply(
                    ctx.problem, warn_of, False, xi, phi, psi, *transposed(known)
                )
                L, R = torch.cat([L + P, u], dim=1), torch.cat([v, Q], dim=1)
            A = ctx.problem.A.with_tensors(*tensors)
            return None, None, *A.pullback(L, R, ctx.needs_input_grad[2:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """``dσ``, ``dU`` and ``dV``."""
        known = ctx.saved_tensors
        sigma, u, v, _, _, _, _, *tensors = known
        with full_precision(u.device):
            dA = ctx.problem.A.with_tensors(*tensors).pushforward(
                *_zeros_where_absent(tensors, tangents[2:])
            )
            right, left = dA.matmat(v), dA.rmatmat(u)
            X = u.mT @ right
            several = len(sigma) > 1 and not ctx.problem.spaces_only
            warn_of = "ties" if several else ctx.problem.ambiguity
            du, dv = OutsideBlock.apply(ctx.problem, warn_of, True, None, right, left, *known)
            if several:
                even = over_gap(sigma, X + X.mT, torch.zeros_like(X)) / 2
                odd = (X - X.mT) / sums(sigma) / 2
                du, dv = du + u @ (even + odd), dv + v @ (even - odd)
            d_sigma = X if ctx.problem.spaces_only else torch.diagonal(X)
            return d_sigma, du, dv, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Small matrices in one solve, others one after the other."""
        found = leading_by_vmap(info, in_dims, args, gradient_by_rule)
        return found or vmap_by_loop(Triplet.apply, info, in_dims, *args)


class OutsideBlock(torch.autograd.Function):
    """The part outside the block: P ⊥ U and Q ⊥ V with ``K_i [p_i; q_i] = [φ_i; ψ_i]``."""

    @staticmethod
    def forward(
        problem: Problem,
        warn_of: Ambiguity,
        tangent: bool,
        xi: Tensor | None,
        phi: Tensor | None,
        psi: Tensor | None,
        *known: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Solve, and warn where the data do not determine the answer."""
        if problem.spaces_only:
            xi, known = None, (torch.diagonal(known[0]), *known[1:])
        if numbers_hidden(phi, psi, *known):
            _require_plain(problem)
            with by_rule():
                adjoint = token(problem.adjoint)
                return op_outside_block(xi, phi, psi, *known, adjoint, warn_of, tangent)
        sigma, u, v, residuals, gaps, theta, Z, *tensors = known
        return solve_outside_block(
            problem.A.with_tensors(*tensors),
            problem.adjoint,
            (sigma, u, v),
            (phi, psi),
            ForwardEvidence(residuals, gaps, (theta, Z)),
            xi=xi,
            warn_of=warn_of,
            tangent=tangent,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the system and its solution."""
        ctx.problem, _, _, _, *system = inputs
        ctx.set_materialize_grads(False)
        _save(ctx, *output, *system)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, p_bar: Tensor | None, q_bar: Tensor | None
    ) -> tuple[Any, ...]:
        """With the same solve (a, b) for the cotangents of P and Q."""
        P, Q, phi, psi, *known = ctx.saved_tensors
        sigma, u, v, _, _, _, _, *tensors = known
        with full_precision(u.device):
            a, b = OutsideBlock.apply(
                ctx.problem,
                ctx.problem.ambiguity,
                False,
                None,
                p_bar,
                q_bar,
                *transposed(known),
            )
            sigma_bar = -(sigma_cotangent(sigma, P, a) + sigma_cotangent(sigma, b, Q))
            u_bar = -constraint_gradient(u, (a, phi), (P, p_bar))
            v_bar = -constraint_gradient(v, (b, psi), (Q, q_bar))
            A = ctx.problem.A.with_tensors(*tensors)
            L, R = torch.cat([a, P], dim=1), torch.cat([Q, b], dim=1)
            A_bar = A.pullback(L, R, ctx.needs_input_grad[-len(tensors) :])
        phi_bar, psi_bar = (None if x is None else g for x, g in ((phi, a), (psi, b)))
        settings, evidence = [None] * 4, [None] * 4  # problem, warn_of, tangent, ξ; residuals to Z
        return *settings, phi_bar, psi_bar, sigma_bar, u_bar, v_bar, *evidence, *A_bar

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        """The solve for the tangent of the right-hand side less that of K times the solution."""
        P, Q, phi, psi, *known = ctx.saved_tensors
        _, u, v, _, _, _, _, *tensors = known
        with full_precision(u.device):
            moved = _zeros_where_absent((phi, psi, *known), tangents[4:])
            d_phi, d_psi, d_sigma, du, dv, _, _, _, _, *d_tensors = cast("list[Tensor]", moved)
            dA = ctx.problem.A.with_tensors(*tensors).pushforward(*d_tensors)
            right = dA.matmat(Q) - times_sigma(P, d_sigma)
            left = dA.rmatmat(P) - times_sigma(
                Q, d_sigma.mT if ctx.problem.spaces_only else d_sigma
            )
            if phi is not None:
                right = right + d_phi - du @ (u.mT @ phi)
            if psi is not None:
                left = left + d_psi - dv @ (v.mT @ psi)
            warn_of = ctx.problem.ambiguity
            p, q = OutsideBlock.apply(ctx.problem, warn_of, False, None, right, left, *known)
            # P stays orthogonal to U as both move
            return p - u @ (du.mT @ P), q - v @ (dv.mT @ Q)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Those of small matrices in one solve, others one after the other."""
        found = outside_by_vmap(info, in_dims, args)
        return found or vmap_by_loop(OutsideBlock.apply, info, in_dims, *args)


def gradient_by_rule(k: int, known: tuple[Tensor, ...], cotangents: Any) -> Tensor:
    """Ā of one matrix, differentiable itself; ``known`` is what :class:`Triplet` saves."""
    like = Dense(torch.empty_like(known[-1], device="meta"))
    problem = Problem(like, k, Auto(), DeflatedCG(), None, strict=True)
    ctx = SimpleNamespace(
        problem=problem, saved_tensors=known, needs_input_grad=(False, False, True)
    )
    return cast("Tensor", Triplet.backward(ctx, *cotangents)[2])


def triplet(problem: Problem, start: Tensor | None, *tensors: Tensor) -> Outputs:
    """The differentiable triplets, flat: see :func:`flatten`."""
    if not torch.compiler.is_compiling():
        _refuse_forward_over_forward()
        _refuse_functionalize()
        return Triplet.apply(problem, start, *tensors)
    if not problem.plain or jvp_levels() > 1 or functionalized():
        return _uncompiled(problem, start, *tensors)
    _allow_node()
    solver, adjoint = token(problem.solver), token(problem.adjoint)
    return node(tensors[0], start, problem.k, solver, adjoint, problem.strict, problem.spaces_only)


def node(
    A: Tensor,
    start: Tensor | None,
    k: int,
    solver: int,
    adjoint: int,
    strict: bool,
    spaces_only: bool,
) -> Outputs:
    """One matrix, as one node of a compiled graph, with all of its derivatives."""
    like = Dense(torch.empty_like(A, device="meta"))
    problem = Problem(like, k, strategy(solver), strategy(adjoint), None, strict, spaces_only)
    return Triplet.apply(problem, start, A)


def _allow_node() -> None:
    """Let the compiler take :func:`node` as it is; it runs this before it looks the name up."""
    torch.compiler.allow_in_graph(node)


# This is what torch.compiler.assume_constant_result sets; it would load the compiler at import.
_allow_node._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _uncompiled(problem: Problem, start: Tensor | None, *tensors: Tensor) -> Outputs:
    """Break the graph: no node can hold a map, a generator, or forward over forward mode."""
    return cast("Any", torch.compiler.disable(triplet))(problem, start, *tensors)


# This is what torch.compiler.disable sets; it would load the compiler at import.
_uncompiled._torchdynamo_disable = True  # pyright: ignore[reportFunctionMemberAccess]
_uncompiled._torchdynamo_disable_msg = (  # pyright: ignore[reportFunctionMemberAccess]
    "bulkedge: one graph can hold the singular triplets of a matrix, got a LinearMap, a generator, "
    "or forward mode over forward mode; leave out fullgraph=True, or pass the matrix"
)


def _require_plain(problem: Problem) -> None:
    """InputError where a registered operator is needed and cannot take the problem."""
    if not problem.plain:
        raise InputError(
            f"expected a matrix where torch traces, fakes or batches tensors (make_fx, "
            f"FakeTensorMode, the meta device, is_grads_batched), got {type(problem.A).__name__}"
            f"{'' if problem.generator is None else ' and a generator'}; pass its to_dense(), and "
            "no generator"
        )


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for reverse and forward mode."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _zeros_where_absent(
    values: Sequence[Tensor | None], tangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The tangents, zeros in the place of absent ones."""
    return [
        None if x is None else torch.zeros_like(x) if t is None else t
        for x, t in zip(values, tangents, strict=True)
    ]


def _refuse_forward_over_forward() -> None:
    """Inside two forward modes a custom function loses the outer tangent, and torch is silent."""
    if jvp_levels() > 1:
        raise InputError(
            "forward mode over forward mode is not supported by torch's custom functions; "
            "take reverse mode for one of the two, say jacfwd(jacrev(f))"
        )


def _refuse_functionalize() -> None:
    """Torch has no rule for a custom function inside its functionalize."""
    if functionalized():
        raise InputError(
            "torch.func.functionalize has no rule for the derivatives of singular triplets; leave "
            "it out, nothing here writes in place; or call this outside of it"
        )
