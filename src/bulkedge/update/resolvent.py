"""The resolvent ``G(z) = (zI − W)⁻¹`` of a square matrix after a low-rank update of W.

    rank one:  (z − W − θuvᵀ)⁻¹ = G + θ G u vᵀ G / (1 − θ vᵀG u),
    rank r:    (z − W − sBA)⁻¹  = G + s G B (I − s A G B)⁻¹ A G.

So z is an eigenvalue of the updated matrix, and none of W, exactly where ``1 − θ vᵀG(z)u`` is zero.
The signs are those of ``z − W``; for the inverse of W + θuvᵀ itself they are the opposite ones.
All of it is computed and returned in float64, or complex128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._guard import finite


def secular_function(G: Tensor, u: Tensor, v: Tensor, theta: complex) -> Tensor:
    """``1 − θ vᵀG u``, zero where z is an eigenvalue of ``W + θuvᵀ``.

    Cost: O(n²).

    Args:
        G: The resolvent ``(zI − W)⁻¹`` at one or more z, shape ``(..., n, n)``, real or complex.
        u: Shape ``(n,)``.
        v: Shape ``(n,)``; transposed, never conjugated.
        theta: The strength θ.

    Returns:
        Shape ``(...)``.

    Raises:
        InputError: If the shapes do not fit.

    References:
        Benaych-Georges and Nadakuditi, arXiv:0910.2120, where it decides on outliers.

    Example:
        >>> W, e = torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([1.0, 0.0])
        >>> G = torch.linalg.inv(5.0 * torch.eye(2) - W)
        >>> secular_function(G, e, e, 4.0).item()  # 5 is an eigenvalue of W + 4eeᵀ
        0.0
    """
    _require_vectors(u, v)
    G, B, A = _alike(G, u[:, None], v[None, :], theta)
    return 1 - theta * (A @ (G @ B))[..., 0, 0]


def resolvent_update(G: Tensor, u: Tensor, v: Tensor, theta: complex) -> Tensor:
    """``(z − W − θuvᵀ)⁻¹ = G + θ G u vᵀ G / (1 − θ vᵀG u)`` (Sherman–Morrison).

    Cost: O(n²).

    Args:
        G: The resolvent ``(zI − W)⁻¹``, shape ``(..., n, n)``, real or complex.
        u: Shape ``(n,)``.
        v: Shape ``(n,)``; transposed, never conjugated.
        theta: The strength θ.

    Returns:
        The resolvent of ``W + θuvᵀ`` at the same z, shape ``(..., n, n)``.

    Raises:
        InputError: If the shapes do not fit, or z is an eigenvalue of ``W + θuvᵀ`` to rounding.

    Example:
        >>> G = torch.linalg.inv(5.0 * torch.eye(2) - torch.diag(torch.tensor([1.0, 3.0])))
        >>> e = torch.tensor([1.0, 0.0])
        >>> resolvent_update(G, e, e, 2.0).diagonal().tolist()
        [0.5, 0.5]
    """
    _require_vectors(u, v)
    return resolvent_update_low_rank(G, u[:, None], v[None, :], theta)


def resolvent_update_low_rank(G: Tensor, B: Tensor, A: Tensor, scale: complex = 1.0) -> Tensor:
    """``(z − W − sBA)⁻¹ = G + s G B (I − s A G B)⁻¹ A G`` (Woodbury).

    Cost: O(n²r).

    Args:
        G: The resolvent ``(zI − W)⁻¹``, shape ``(..., n, n)``, real or complex.
        B: Shape ``(n, r)``.
        A: Shape ``(r, n)``.
        scale: The number s.

    Returns:
        The resolvent of ``W + sBA`` at the same z, shape ``(..., n, n)``.

    Raises:
        InputError: If the shapes do not fit, or z is an eigenvalue of ``W + sBA`` to rounding.

    References:
        Hager, Updating the inverse of a matrix, 1989, doi:10.1137/1031049.

    Example:
        >>> G = torch.linalg.inv(5.0 * torch.eye(2) - torch.diag(torch.tensor([1.0, 3.0])))
        >>> resolvent_update_low_rank(G, torch.eye(2), torch.eye(2), 3.0).diagonal().tolist()
        [1.0, -1.0]
    """
    G, B, A = _alike(G, B, A, scale)
    GB, AG = scale * (G @ B), A @ G
    inner = A @ GB
    core = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device) - inner
    _require_regular(core, inner)
    return G + GB @ torch.linalg.solve(core, AG)


def _require_regular(core: Tensor, inner: Tensor) -> None:
    """InputError where ``I − sAGB`` is singular to the rounding of its entries."""
    smallest = torch.linalg.svdvals(core)[..., -1:]
    size = 1 + torch.linalg.matrix_norm(inner)
    rounding = 8 * core.shape[-1] * torch.finfo(smallest.dtype).eps * size
    if bool((smallest <= rounding[..., None]).any()):
        raise InputError(
            "expected z off the spectrum of the updated matrix, got one where 1 − θ vᵀG u, or "
            "I − s A G B, is singular to rounding: z is an eigenvalue there; move it"
        )


def _require_vectors(u: Tensor, v: Tensor) -> None:
    if u.ndim != 1 or v.ndim != 1:
        raise InputError(
            f"expected vectors u and v, got shapes {tuple(u.shape)} and {tuple(v.shape)}; "
            "resolvent_update_low_rank takes factors"
        )


def _alike(G: Tensor, B: Tensor, A: Tensor, scale: complex) -> list[Tensor]:
    """All in float64, or complex128 if one is complex; InputError where the shapes do not fit."""
    n = G.shape[-1] if G.ndim and G.numel() else 0
    square = G.ndim >= 2 and G.shape[-2] == n
    if not square or not n or B.ndim != 2 or (B.shape[0], *A.shape) != (n, B.shape[1], n):
        raise InputError(
            f"expected a square resolvent G (..., n, n) and factors (n, r), (r, n) or vectors "
            f"(n,), got {tuple(G.shape)}, {tuple(B.shape)} and {tuple(A.shape)}"
        )
    is_complex = isinstance(scale, complex) or any(x.is_complex() for x in (G, B, A))
    for name, x in (("G", G), ("the left factor", B), ("the right factor", A)):
        finite(name, x)
    return [x.to(torch.complex128 if is_complex else torch.float64) for x in (G, B, A)]
