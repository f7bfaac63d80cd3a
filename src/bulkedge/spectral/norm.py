"""‖A‖₂ with its derivative, and a matrix scaled by it."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import as_real
from bulkedge._linmap import MatrixLike, as_map
from bulkedge.triplet import Solver, singular_triplet

from .certificate import Certificate, NormBound, Rigorous


@overload
def spectral_norm(
    A: MatrixLike,
    *,
    solver: Solver | None = ...,
    init: tuple[Tensor, Tensor] | None = ...,
    generator: torch.Generator | None = ...,
    certified: Literal[False] | None = ...,
) -> Tensor: ...
@overload
def spectral_norm(
    A: MatrixLike,
    *,
    solver: Solver | None = ...,
    init: tuple[Tensor, Tensor] | None = ...,
    generator: torch.Generator | None = ...,
    certified: Certificate | Literal[True],
) -> NormBound: ...
def spectral_norm(
    A: MatrixLike,
    *,
    solver: Solver | None = None,
    init: tuple[Tensor, Tensor] | None = None,
    generator: torch.Generator | None = None,
    certified: Certificate | bool | None = None,
) -> Tensor | NormBound:
    """The largest singular value of A, differentiable, or a certified interval that contains it.

    The gradient is ``u vᵀ``; if σ₁ = σ₂ or A = 0 that is a subgradient, and there is no warning.
    Second derivatives need one linear solve, see :func:`~bulkedge.singular_triplet`.

    An iteration only bounds a norm from below.  With ``certified`` the result is an interval whose
    upper end is proved (:class:`Rigorous`) or holds with a given probability (:class:`Probable`),
    without a gradient.

    Args:
        A: Shape ``(..., m, n)``, or a ``LinearMap``.  **The kernel of a convolution is a batch
            here**: take ``kernel.flatten(1)``, or ``Convolution.of(layer, input_size)``.
        solver: The method; ``Auto()`` if None.
        init: A guess (u, v).
        generator: Source of the random start; None takes a fixed seed, or for :class:`Probable`
            one that depends on all of A.
        certified: The certificate wanted, for one matrix; True is :class:`Rigorous`.

    Returns:
        Shape ``(...)``, or the interval.

    Raises:
        InputError: As :func:`~bulkedge.singular_triplet`; or a certificate for a batch is asked.
        ConvergenceError: If the tolerance is not reached.

    Example:
        >>> from bulkedge.spectral import Rigorous
        >>> A = torch.tensor([[0.0, 3.0], [2.0, 0.0]], requires_grad=True)
        >>> norm = spectral_norm(A)
        >>> norm.backward()
        >>> A.grad.abs().tolist()
        [[0.0, 1.0], [0.0, 0.0]]
        >>> interval = spectral_norm(A, certified=Rigorous())
        >>> interval.lower <= 3.0 <= interval.upper < 3.0000001
        True
    """
    certificate = Rigorous() if certified is True else certified or None
    if certificate is not None and not hasattr(certificate, "bound"):
        raise InputError(f"expected certified to be True or a certificate, got {certified!r}")
    if certificate is not None and isinstance(A, Tensor) and A.ndim != 2:
        raise InputError(
            f"expected one matrix to certify, got shape {tuple(A.shape)}; certify one at a time"
        )
    triplet = singular_triplet(A, solver=solver, init=init, generator=generator)
    if certificate is None:
        return triplet.sigma.squeeze(-1)
    with torch.no_grad():
        return certificate.bound(as_map(A), triplet.v.detach(), generator)


def normalize(A: Tensor, *, init: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """``A / ‖A‖₂``, with the derivative of the norm included: ``Ā = V/σ − (⟨V, A⟩/σ²) u vᵀ``.

    Args:
        A: Shape ``(..., m, n)``; flatten the kernel of a convolution first.
        init: A guess (u, v).

    Returns:
        Shape ``(..., m, n)``, of the dtype of A.

    Raises:
        InputError: If a matrix is zero, or its norm subnormal.

    Example:
        >>> normalize(torch.diag(torch.tensor([4.0, 2.0]))).tolist()
        [[1.0, 0.0], [0.0, 0.5]]
    """
    norm = spectral_norm(A, init=init)[..., None, None]
    if not torch.compiler.is_compiling():
        if not _all(norm > 0):
            raise InputError(
                "expected a matrix other than zero, whose norm nothing can be scaled by"
            )
        if not _all(norm >= torch.finfo(norm.dtype).tiny):
            raise InputError(
                f"expected a norm that {norm.dtype} knows to all its digits, got a subnormal one; "
                "multiply the matrix by a large number, which changes nothing here"
            )
    return (A / norm).to(A.dtype)


def cap(A: Tensor, bound: float = 1.0, *, init: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """``min(1, bound/‖A‖₂) · A``: the radial projection onto the spectral ball.

    Inside the ball it is the identity, bit by bit.

    Args:
        A: Shape ``(..., m, n)``; flatten the kernel of a convolution first.
        bound: The largest norm allowed, positive.
        init: A guess (u, v).

    Returns:
        Shape ``(..., m, n)``, of the dtype of A.

    Raises:
        InputError: If the bound is not positive.

    Example:
        >>> cap(torch.diag(torch.tensor([4.0, 2.0])), 2.0).tolist()
        [[2.0, 0.0], [0.0, 1.0]]
    """
    norm = spectral_norm(A, init=init)[..., None, None]
    return (A * cap_factor(norm, bound)).to(A.dtype)


def cap_factor(norm: Tensor, bound: float) -> Tensor:
    """``min(1, bound/norm)``, differentiable at zero too."""
    require_bound(bound)
    ceiling = torch.full_like(norm, bound)
    return ceiling / torch.maximum(norm, ceiling)


def require_bound(bound: float) -> None:
    """Raise InputError unless the bound is positive and finite."""
    if not 0 < (as_real(bound) or 0.0) < float("inf"):
        raise InputError(f"expected a positive finite bound, got {bound!r}")


def _all(condition: Tensor) -> bool:
    """Whether it holds everywhere; True inside vmap, which does not allow to read values."""
    try:
        return bool(condition.all())
    except RuntimeError:
        return True
