"""An update and its base as one small matrix: the base's leading triplets, a chain for the rest.

What decides on the leading directions of ``W0 + s P Qᵀ`` is how P and Q lie to the leading vectors
U, V of the base, and how strong they are outside of them:

    P = U b + X R,      Q = V a + Y T,      X, Y orthonormal, outside U and V.

To the rest of the base, whose values are many and close, X and Y look isotropic: it answers them by
the traces φ_u, φ_v of its bulk alone, each column for itself, and left and right apart.  That
answer is the one of a short bidiagonal chain per column, the Golub–Kahan process of the rest from a
vector that is spread evenly over its singular vectors.  L of its steps have the first 2L moments of
the rest, and what they leave out falls like (σ_{q+1}/σ)^{4L} at a value σ.  So

    W(s) = diag(σ₁, …, σ_q) ⊕ (C_u ⊗ I) ⊕ (C_vᵀ ⊗ I) + s [b; R; 0] [a; 0; T]ᵀ

has the leading values and scores of ``W0 + s P Qᵀ``, with all its mixing and repulsion, for the
price of a matrix of some 40 to 160 rows, and no product with W0.

The traces are those of Benaych-Georges and Nadakuditi, arXiv:1103.2221; the chain is Gauss
quadrature for them (Golub and Meurant, Matrices, Moments and Quadrature, 2010).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._precision import exact
from bulkedge.triplet import resolution

from ._update_svd import UpdateSVD

KNOWN = 32
"""Leading triplets of the base that are kept, where so many are known; more for a large k."""
FEW_SPIKES = 16
"""Up to this many spikes each has a chain of two steps, beyond it of one."""
SPIKES = 64
"""This many of the strongest spikes are kept."""


@dataclass(frozen=True)
class Reduced:
    """``core + s left rightᵀ``; all divided by σ₁ of the base and ``‖ΔW‖₂``.

    Attributes:
        known: q, how many leading base vectors are rows of their own, the first ones.
        sigma_k: The k-th value of the base over the first, or what rounding leaves of it if that is
            more.
        rounding: That rounding error of the base's values over the first.
        core: The base, shape ``(d, e)``.
        left: The update's left factor, shape ``(..., d, r)``: several where they are drawn.
        right: Its right factor, shape ``(..., e, r)``.
    """

    known: int
    sigma_k: Tensor
    rounding: float
    core: Tensor
    left: Tensor
    right: Tensor

    @property
    def T(self) -> Reduced:
        """The transposed problem, whose left vectors are the right ones."""
        return Reduced(self.known, self.sigma_k, self.rounding, self.core.mT, self.right, self.left)

    def scores(self, s: Tensor, k: int) -> Tensor:
        """The scores of the k leading left directions.

        Args:
            s: Scales, in units of ``σ₁(W0)/‖ΔW‖₂``, a shape that goes with that of the factors.
            k: How many directions.

        Returns:
            Shaped like the scales, and k more, the strongest direction last.
        """
        moved = self.core + s[..., None, None] * (self.left @ self.right.mT)
        vectors = torch.linalg.eigh(moved @ moved.mT).eigenvectors
        return vectors[..., : self.known, -k:].abs().amax(-2)

    def lowest_score(self, s: Tensor, k: int) -> Tensor:
        """The lowest of :meth:`scores`, shaped like the scales."""
        return self.scores(s, k).amin(-1)


def how_many(values: Tensor, top_k: int) -> int:
    """How many leading triplets of a base are worth keeping for k directions."""
    return min(len(values), max(KNOWN, top_k + KNOWN // 2))


def measured(
    base: tuple[Tensor, Tensor, Tensor],
    values: Tensor,
    shape: tuple[int, int],
    update: UpdateSVD,
    top_k: int,
) -> Reduced:
    """The small matrix of an update that is known.

    Args:
        base: Leading left vectors, values and right vectors of the base: U ``(m, q)``, ``(q,)``,
            V ``(n, q)``.
        values: All singular values of the base, descending, or a quadrature of them.
        shape: ``(m, n)``.
        update: Its spikes.
        top_k: How many directions count.

    Returns:
        The reduced problem.
    """
    q = min(how_many(values, top_k), len(base[1]))
    U, V = (exact(x[:, :q]).cpu() for x in (base[0], base[2]))
    P, Q = (x[:, :SPIKES].cpu() for x in (update.P, update.Q))
    gamma = update.gamma[:SPIKES].cpu()
    return _assembled(values, shape, q, top_k, gamma, U.mT @ P, V.mT @ Q)


def drawn(
    values: Tensor,
    shape: tuple[int, int],
    gamma: Tensor,
    top_k: int,
    draws: int,
    seed: int,
) -> Reduced:
    """The small matrices of updates of known strengths whose vectors are drawn.

    Args:
        values: All singular values of the base, descending.
        shape: ``(m, n)``.
        gamma: Strengths, descending, positive.
        top_k: How many directions count.
        draws: How many updates.
        seed: Of their components on the leading base vectors.

    Returns:
        The reduced problems, one a draw.
    """
    q, gamma = how_many(values, top_k), gamma[:FEW_SPIKES]
    generator = torch.Generator().manual_seed(seed)
    b, a = (
        torch.randn(draws, q, len(gamma), generator=generator, dtype=torch.float64)
        * (gamma / size).sqrt()
        for size in shape
    )
    return _assembled(values, shape, q, top_k, gamma, b, a)


def _assembled(
    values: Tensor,
    shape: tuple[int, int],
    q: int,
    top_k: int,
    gamma: Tensor,
    b: Tensor,
    a: Tensor,
) -> Reduced:
    """Core and factors from the components b, a of the update on the q leading base vectors."""
    values = values / values[0]
    levels, r, p = (2 if len(gamma) <= FEW_SPIKES else 1), len(gamma), len(values)
    b, a, gamma = b / gamma[0].sqrt(), a / gamma[0].sqrt(), gamma / gamma[0]
    C_u, C_v = (_chain(values[q:], size - p, levels) for size in shape)
    eye = torch.eye(r, dtype=torch.float64)
    core = torch.block_diag(
        values[:q].diag(), torch.kron(C_u, eye), torch.kron(C_v.mT.contiguous(), eye)
    )
    R, T = (_outside(x, gamma, len(C)) for x, C in ((b, C_u), (a, C_v)))
    left, right = (
        torch.cat([x, *parts], dim=-2)
        for x, parts in (
            (b, (R, b.new_zeros(*b.shape[:-2], C_v.shape[1] * r, r))),
            (a, (a.new_zeros(*a.shape[:-2], C_u.shape[1] * r, r), T)),
        )
    )
    rounding = float(resolution(values, shape))
    sigma_k = values[min(top_k, p) - 1].clamp_min(rounding)
    return Reduced(q, sigma_k, rounding, core, left, right)


def _outside(inside: Tensor, gamma: Tensor, levels: int) -> Tensor:
    """A root R of ``diag(γ) − bᵀb``, what a factor has outside, at the head of its chains."""
    gram = gamma.diag() - inside.mT @ inside
    sizes, X = torch.linalg.eigh(gram)
    root = sizes.clamp_min(0).sqrt()[..., :, None] * X.mT
    return torch.nn.functional.pad(root, (0, 0, 0, (levels - 1) * len(gamma)))


def _chain(values: Tensor, zeros: int, levels: int) -> Tensor:
    """The Golub–Kahan matrix of a rest from a vector that is spread evenly over its vectors.

    Args:
        values: Of the rest.
        zeros: How many vectors of the side have the value 0.
        levels: L.

    Returns:
        Lower bidiagonal, shape ``(L, L)``; less where the process ends before: a row for each
        vector of the side that it has reached, a column for each of the other side.
    """
    count = len(values) + zeros
    out = torch.zeros(levels, levels, dtype=torch.float64)
    if count == 0:
        return out[:1, :0]
    spread = torch.cat([values, values.new_zeros(1)])
    x = torch.full_like(spread, count**-0.5)
    x[-1] *= zeros**0.5
    before = torch.zeros_like(x)
    for level in range(levels):
        y = spread * x - (0.0 if level == 0 else out[level, level - 1]) * before
        if not float(size := torch.linalg.vector_norm(y)) > 1e-12:
            return out[: level + 1, :level]
        out[level, level], before = size, y / size
        x = spread * before - size * x
        if level + 1 == levels or not float(size := torch.linalg.vector_norm(x)) > 1e-12:
            return out[: level + 1, : level + 1]
        out[level + 1, level], x = size, x / size
    return out
