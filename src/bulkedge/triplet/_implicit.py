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
quotient is set to zero where its numerator is zero to rounding.  Where it is not, and σ_i and σ_j
are equal to rounding, the loss depends on an arbitrary choice of basis, and a warning names the
gap.

The solve itself is differentiated as a function of (A, σ, U, V, Φ, Ψ), with the multipliers of its
constraints λ = UᵀΦ, μ = VᵀΨ; so derivatives of every order are further solves of the same kind.

*Without the inside* (``frames``): where only the spaces spanned by U and V count, as in the best
rank-k part U S Vᵀ with S = UᵀA V, any smooth choice of bases has the same derivative.  We take the
one that does not rotate within its span, ``dU = P``, ``dV = Q``, ``dS = UᵀdA V``, where S, diagonal
at A, leaves the diagonal as A moves::

    P S − A Q = (I − UUᵀ) dA V,    Q Sᵀ − AᵀP = (I − VVᵀ) dAᵀU.

At A these are the systems K_i again, and no difference of two values of the block occurs.  In
reverse ``Ā = U Ξ Vᵀ + P Vᵀ + U Qᵀ`` for a cotangent Ξ of S, where P and Q solve the same for Φ and
Ψ with Sᵀ in the place of S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._linmap import Dense, LinearMap
from bulkedge._precision import full_precision

from ._compiled import by_rule, one_by_one, op_implicit, op_leading, strategy, token
from ._gauge import over_gap, pair_scale, rotation_gradient, sums
from ._numbers import Check, Evidence, Outputs, flatten, implicit, leading
from ._tracing import functionalized, jvp_levels, numbers_hidden
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
        frames: Whether U and V stand for the spaces that they span.  Then σ comes as the diagonal
            matrix S, and derivatives are defined for what no change of basis can alter.
    """

    A: LinearMap
    k: int
    solver: Solver
    adjoint: AdjointSolver
    generator: torch.Generator | None
    strict: bool
    frames: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is one matrix, that a registered operator can take."""
        return type(self.A) is Dense and self.generator is None

    @property
    def check(self) -> Check:
        """What a derivative that is no tangent of the vectors themselves has to look for."""
        return "cut" if self.frames else ""


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
                leading(A, problem.k, problem.solver, start, source, strict=problem.strict)
            )
        sigma, *others = found
        return cast("Outputs", (torch.diag(sigma) if problem.frames else sigma, *others))

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
            L, R = torch.zeros_like(u) if xi is None else _times(u, xi), v
            if phi is not None or psi is not None:
                inside = len(sigma) > 1 and not ctx.problem.frames
                if inside:
                    L = L + u @ _inside(sigma, u, v, phi, psi)
                check = "rotations" if inside else ctx.problem.check
                P, Q = Outside.apply(ctx.problem, check, xi, phi, psi, *_transposed(known))
                L, R = torch.cat([L + P, u], dim=1), torch.cat([v, Q], dim=1)
            A = ctx.problem.A.with_tensors(*tensors)
            return None, None, *A.pullback(L, R, ctx.needs_input_grad[2:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """``dσ``, ``dU`` and ``dV``."""
        known = ctx.saved_tensors
        sigma, u, v, _, _, _, _, *tensors = known
        with full_precision(u.device):
            dA = ctx.problem.A.with_tensors(*tensors).pushforward(*_filled(tensors, tangents[2:]))
            right, left = dA.matmat(v), dA.rmatmat(u)
            X = u.mT @ right
            inside = len(sigma) > 1 and not ctx.problem.frames
            check = "ties" if inside else "cut tangent" if ctx.problem.frames else "tangent"
            du, dv = Outside.apply(ctx.problem, check, None, right, left, *known)
            if inside:
                even = over_gap(sigma, X + X.mT, torch.zeros_like(X)) / 2
                odd = (X - X.mT) / sums(sigma) / 2
                du, dv = du + u @ (even + odd), dv + v @ (even - odd)
            d_sigma = X if ctx.problem.frames else torch.diagonal(X)
            return d_sigma, du, dv, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """One matrix after the other."""
        return one_by_one(Triplet.apply, info, in_dims, *args)


class Outside(torch.autograd.Function):
    """P ⊥ U and Q ⊥ V with ``K_i [p_i; q_i] = [φ_i; ψ_i]`` outside the block."""

    @staticmethod
    def forward(
        problem: Problem,
        check: Check,
        xi: Tensor | None,
        phi: Tensor | None,
        psi: Tensor | None,
        *known: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Solve, and check whether the data determine the answer."""
        if problem.frames:
            xi, known = None, (torch.diagonal(known[0]), *known[1:])
        if numbers_hidden(phi, psi, *known):
            _require_plain(problem)
            with by_rule():
                return op_implicit(xi, phi, psi, *known, token(problem.adjoint), check)
        sigma, u, v, residuals, gaps, theta, Z, *tensors = known
        return implicit(
            problem.A.with_tensors(*tensors),
            problem.adjoint,
            (sigma, u, v),
            (phi, psi),
            Evidence(residuals, gaps, (theta, Z)),
            xi=xi,
            check=check,
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
        sigma, u, v, _, _, _, _, *tensors = known
        with full_precision(u.device):
            a, b = Outside.apply(
                ctx.problem, ctx.problem.check, None, p_bar, q_bar, *_transposed(known)
            )
            sigma_bar = -(_overlaps(sigma, P, a) + _overlaps(sigma, b, Q))
            u_bar = -_bordered(u, (a, phi), (P, p_bar))
            v_bar = -_bordered(v, (b, psi), (Q, q_bar))
            A = ctx.problem.A.with_tensors(*tensors)
            L, R = torch.cat([a, P], dim=1), torch.cat([Q, b], dim=1)
            A_bar = A.pullback(L, R, ctx.needs_input_grad[-len(tensors) :])
        phi_bar, psi_bar = (None if x is None else g for x, g in ((phi, a), (psi, b)))
        evidence = None, None, None, None
        return None, None, None, phi_bar, psi_bar, sigma_bar, u_bar, v_bar, *evidence, *A_bar

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        """The solve for the tangent of the right-hand side less that of K times the solution."""
        P, Q, phi, psi, *known = ctx.saved_tensors
        _, u, v, _, _, _, _, *tensors = known
        with full_precision(u.device):
            moved = _filled((phi, psi, *known), tangents[3:])
            d_phi, d_psi, d_sigma, du, dv, _, _, _, _, *d_tensors = cast("list[Tensor]", moved)
            dA = ctx.problem.A.with_tensors(*tensors).pushforward(*d_tensors)
            right = dA.matmat(Q) - _times(P, d_sigma)
            left = dA.rmatmat(P) - _times(Q, d_sigma.mT if ctx.problem.frames else d_sigma)
            if phi is not None:
                right = right + d_phi - du @ (u.mT @ phi)
            if psi is not None:
                left = left + d_psi - dv @ (v.mT @ psi)
            p, q = Outside.apply(ctx.problem, ctx.problem.check, None, right, left, *known)
            # P stays orthogonal to U as both move
            return p - u @ (du.mT @ P), q - v @ (dv.mT @ Q)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """One system after the other."""
        return one_by_one(Outside.apply, info, in_dims, *args)


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
    return node(tensors[0], start, problem.k, solver, adjoint, problem.strict, problem.frames)


def node(
    A: Tensor,
    start: Tensor | None,
    k: int,
    solver: int,
    adjoint: int,
    strict: bool,
    frames: bool,
) -> Outputs:
    """One matrix, as one node of a compiled graph, with all of its derivatives."""
    like = Dense(torch.empty_like(A, device="meta"))
    problem = Problem(like, k, strategy(solver), strategy(adjoint), None, strict, frames)
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
    if not problem.plain:
        raise InputError(
            f"expected a matrix where torch traces, fakes or batches tensors (make_fx, "
            f"FakeTensorMode, the meta device, is_grads_batched), got {type(problem.A).__name__}"
            f"{'' if problem.generator is None else ' and a generator'}; pass its to_dense(), and "
            "no generator"
        )


def _keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Save for either mode."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


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


def _transposed(known: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The transposed system has Sᵀ for S: equal numbers, as S is diagonal, other derivatives."""
    S, *rest = known
    return (S if S.ndim == 1 else S.mT), *rest


def _times(X: Tensor, sigma: Tensor) -> Tensor:
    """``X S``, for S or its diagonal."""
    return X * sigma if sigma.ndim == 1 else X @ sigma


def _overlaps(sigma: Tensor, X: Tensor, Y: Tensor) -> Tensor:
    """``XᵀY``, of the shape of σ: the whole, or its diagonal."""
    return (X * Y).sum(dim=0) if sigma.ndim == 1 else X.mT @ Y


def _inside(sigma: Tensor, u: Tensor, v: Tensor, phi: Tensor | None, psi: Tensor | None) -> Tensor:
    """M, the part of Ā inside the block, shape ``(k, k)``."""
    a, b = rotation_gradient(u, phi), rotation_gradient(v, psi)
    return over_gap(sigma, a + b, pair_scale(phi, psi)) / 2 + (a - b) / sums(sigma) / 2


def _bordered(basis: Tensor, *pairs: tuple[Tensor, Tensor | None]) -> Tensor:
    """``Σ x (basisᵀ y)ᵀ``: the derivative of the constraints."""
    terms = [x @ (y.mT @ basis) for x, y in pairs if y is not None]
    return sum(terms, start=torch.zeros_like(basis))
