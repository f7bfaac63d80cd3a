"""The thin SVD of an update, with which every form of the secular equation works."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._guard import finite
from bulkedge._precision import exact

ROUNDING = 4.0
"""The rounding error of a product of factors, in √max(m, n)·eps of their norms."""


@dataclass(frozen=True)
class UpdateSVD:
    """``s·B·A = U diag(γ) Vᵀ = P Qᵀ`` with ``P = U √diag(γ)`` and ``Q = V √diag(γ)``.

    γ has the true rank of the product, and ``PᵀP = QᵀQ = diag(γ)``: neither factor is larger.

    Attributes:
        P: Shape ``(m, r)``, float64.
        Q: Shape ``(n, r)``, float64.
        gamma: The singular values of the update above rounding, descending, shape ``(r,)``.
    """

    P: Tensor
    Q: Tensor
    gamma: Tensor

    @property
    def rank(self) -> int:
        """The rank r of the product."""
        return len(self.gamma)

    @property
    def u(self) -> Tensor:
        """Left singular vectors of the update, shape ``(m, r)``."""
        return self.P / self.gamma.sqrt()

    @property
    def v(self) -> Tensor:
        """Right singular vectors of the update, shape ``(n, r)``."""
        return self.Q / self.gamma.sqrt()

    @property
    def norm(self) -> float:
        """``‖s·B·A‖₂``."""
        return float(self.gamma[:1].sum())

    @property
    def T(self) -> UpdateSVD:
        """The transposed update."""
        return UpdateSVD(self.Q, self.P, self.gamma)

    def divided_by(self, size: float) -> UpdateSVD:
        """The update divided by ``size``."""
        root = math.sqrt(size)
        return UpdateSVD(self.P / root, self.Q / root, self.gamma / size)


def update_svd(B: Tensor, A: Tensor, scale: float, shape: tuple[int, int]) -> UpdateSVD:
    """The thin SVD of ``scale·B·A`` by two thin QR and one r×r SVD, in O((m+n)r²).

    LoRA factors may be of very different size and of lower rank than they have columns: an
    untrained B is zero.  The result depends on the product alone.

    Args:
        B: Shape ``(m, r)``.
        A: Shape ``(r, n)``.
        scale: The number in front.
        shape: ``(m, n)`` of the base.

    Returns:
        The spikes of the update: their strengths γ and their vectors.

    Raises:
        InputError: If the factors are not real, not finite, or do not fit the shape of the base.

    Example:
        >>> update = update_svd(torch.ones(4, 2), torch.ones(2, 9), 0.5, (4, 9))
        >>> update.rank, round(update.norm, 12)
        (1, 6.0)
    """
    fits = B.ndim == A.ndim == 2 and B.shape[1] == A.shape[0]
    if not fits or (B.shape[0], A.shape[1]) != shape:
        raise InputError(
            f"expected factors B ({shape[0]}, r) and A (r, {shape[1]}), got {tuple(B.shape)} and "
            f"{tuple(A.shape)}; PEFT stores them so"
        )
    B, A = require_real("B", B), require_real("A", A)
    if isinstance(scale, Tensor) or not math.isfinite(scale):
        raise InputError(f"expected a finite number as scale, got {scale!r}; pass float(scale)")
    Q_B, R_B = torch.linalg.qr(scale * B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    X, gamma, Yt = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    # QR and the product leave rounding relative to the norms of the factors, which may be larger
    # than that of their product.
    norms = torch.linalg.vector_norm(R_B) * torch.linalg.vector_norm(R_A)
    keep = gamma > ROUNDING * max(shape) ** 0.5 * torch.finfo(gamma.dtype).eps * norms
    X, gamma, Y = X[:, keep], gamma[keep], Yt.mT[:, keep]
    root = gamma.sqrt()
    return UpdateSVD(Q_B @ X * root, Q_A @ Y * root, gamma)


def effective_rank(gamma: Tensor) -> float:
    """``exp(−Σ p_j log p_j)`` with ``p = γ / Σγ``: r for r equal spikes, 0 for none.

    Args:
        gamma: Singular values, shape ``(r,)``.

    Returns:
        Between 1 and r.

    Raises:
        InputError: If they are not real and finite.

    References:
        Roy and Vetterli, EUSIPCO 2007: The effective rank.

    Example:
        >>> effective_rank(torch.tensor([1.0, 1.0, 0.0]))
        2.0
    """
    if gamma.is_complex():
        raise InputError(f"expected real singular values, got {gamma.dtype}")
    total = float(finite("the singular values", gamma).sum())
    if total <= 0:
        return 0.0
    p = exact(gamma) / total
    return float(torch.exp(-torch.xlogy(p, p).sum()))


def require_real(name: str, x: Tensor) -> Tensor:
    """``x`` in float64, without its history; InputError unless it is real and finite."""
    if not isinstance(x, Tensor) or x.is_complex():
        raise InputError(f"expected {name} to be a real torch tensor, got {_kind(x)}; convert it")
    return finite(name, exact(x.detach()))


def power_of_two(x: float) -> float:
    """The largest power of two that is at most x, 1 for 0: dividing by it rounds nothing."""
    return 2.0 ** (math.frexp(x)[1] - 1) if x else 1.0


def tie_groups(values: Tensor, width: float) -> list[tuple[int, int]]:
    """Ranges ``[first, end)`` of descending values in which neighbours differ by up to width."""
    cuts = ((values[:-1] - values[1:]) > width).nonzero().flatten() + 1
    edges = [0, *cuts.tolist(), len(values)]
    return [(a, b) for a, b in pairwise(edges) if b > a]


def _kind(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
