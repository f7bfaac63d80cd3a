"""The best approximation of rank k, differentiable across equal values inside the block."""

from __future__ import annotations

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import as_whole
from bulkedge._guard import all_finite, finite, require_strided
from bulkedge._linmap import LinearMap, MatrixLike, as_map
from bulkedge._precision import full_precision

from ._triplet import check_methods, checked, solve_from
from .adjoint import AdjointSolver
from .solver import Solver


def truncate(
    A: MatrixLike,
    k: int,
    *,
    solver: Solver | None = None,
    adjoint: AdjointSolver | None = None,
    generator: torch.Generator | None = None,
    strict: bool = True,
) -> Tensor:
    """The best rank-k approximation ``A_k = Σ_{i≤k} σ_i u_i v_iᵀ`` of A, with its own derivative.

    The same sum written with :func:`singular_triplet` is right as long as the k leading values keep
    apart.  Where two of them coincide their vectors have no derivative, and no cotangents of u, σ
    and v can carry that of the sum, which exists.  Here only ``σ_k > σ_{k+1}`` is asked for::

        dA_k = U (UᵀdA V) Vᵀ + P Σ Vᵀ + U Σ Qᵀ,

        p_i σ_i − A q_i = (I − UUᵀ) dA v_i,    q_i σ_i − Aᵀp_i = (I − VVᵀ) dAᵀu_i.

    The map dA ↦ dA_k is its own transpose (A_k is the gradient of ½ Σ_{i≤k} σ_i²), so reverse mode
    is the same formula.  It grows like ``σ_k/(σ_k − σ_{k+1})``; where the two are equal there is no
    derivative, and taking one gives a :class:`~bulkedge.DegenerateWarning` or raises a
    :class:`~bulkedge.ConvergenceError`.

    Cost: that of :func:`singular_triplet`, and the m×n result; a derivative is one linear system
    a triplet.  With k = min(m, n) the result is A itself, with the derivative of A.

    Args:
        A: A tensor of shape ``(..., m, n)`` or a ``LinearMap``, which gets gradients for its
            tensors: W0, B and A of W0 + s·B·A.
        k: The rank, ``1 ≤ k ≤ min(m, n)``.
        solver: The forward method; ``Auto()`` if None.
        adjoint: The backward method; ``DeflatedCG()`` if None.
        generator: Source of the random start; None takes a fixed seed.
        strict: Raise when the tolerance is not reached.

    Returns:
        Shape ``(..., m, n)``, of the dtype of A.

    Raises:
        InputError: As :func:`singular_triplet`; and from a derivative in reverse mode, if the rank
            of A is below k < min(m, n), zero included.  In forward mode the tangent is then NaN,
            with a :class:`~bulkedge.DegenerateWarning`.
        ConvergenceError: As :func:`singular_triplet`.

    Example:
        >>> A = torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64)).requires_grad_()
        >>> low = truncate(A, 2)
        >>> low.diagonal().tolist()
        [2.0, 2.0, 0.0]
        >>> (low * torch.arange(9.0).view(3, 3)).sum().backward()  # no warning: the cut is clear
        >>> [round(x, 9) for x in A.grad[2].tolist()]
        [9.333333333, 12.666666667, 0.0]
    """
    k = as_whole(k) or k
    options = {"solver": solver, "adjoint": adjoint, "generator": generator, "strict": strict}
    if isinstance(A, Tensor) and A.ndim > 2 and A.numel():
        require_strided("the matrices", A)
        parts = [truncate(matrix, k, **options) for matrix in A.flatten(0, -3)]
        return torch.stack(parts).unflatten(0, A.shape[:-2])
    given = as_map(A)
    A = checked(given, k)
    check_methods(solver, adjoint, generator)
    low = finite("A", A.to_dense()) if k == min(A.shape) else _product(A, k, **options)
    return _narrowed(low, given.dtype)


def _narrowed(low: Tensor, dtype: torch.dtype) -> Tensor:
    """The result in the dtype of the matrix, whose largest entry it may exceed."""
    narrow = low.to(dtype)
    if dtype != low.dtype and not torch.compiler.is_compiling() and not all_finite(narrow):
        raise InputError(
            f"expected an approximation whose entries {dtype} can hold, got larger ones; convert "
            "the matrix to float32"
        )
    return narrow


def _product(
    A: LinearMap,
    k: int,
    *,
    solver: Solver | None,
    adjoint: AdjointSolver | None,
    generator: torch.Generator | None,
    strict: bool,
) -> Tensor:
    """``U S Vᵀ`` with S = UᵀA V, where U and V may be any bases: equal values do not matter."""
    found = solve_from(
        A,
        k,
        None,
        solver=solver,
        adjoint=adjoint,
        generator=generator,
        strict=strict,
        spaces_only=True,
    )
    with full_precision(A.device):
        return found.u @ found.sigma @ found.v.mT
