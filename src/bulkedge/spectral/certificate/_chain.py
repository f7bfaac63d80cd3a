"""Golub-Kahan vectors one product at a time, and the leading Ritz pair of the chain."""

from __future__ import annotations

import torch
from torch import Tensor

from bulkedge._linmap import Dense, LinearMap
from bulkedge.triplet.solver._start import fixed_seed, gaussian

EPS = 2.0**-52
"""The relative spacing of float64 numbers."""
GRAIN = 16 * EPS
"""The amount by which rounding may change one component of a unit vector."""


class Chain:
    """Golub-Kahan vectors v₁, u₁, v₂, u₂, … of 2⁻ᵉW, W of shape (q, p), from ``start``, (p, 1)."""

    def __init__(self, W: LinearMap, start: Tensor, exponent: int = 0) -> None:
        self.W = W
        self.norms: list[float] = []  # ρ₁, ρ₂, …, one a product
        self.bases = [start / torch.linalg.vector_norm(start), start.new_empty(W.shape[0], 0)]
        # half of the scaling before a product and half after: none of it under- or overflows
        self.before, self.after = 2.0 ** -(exponent // 2), 2.0 ** (exponent // 2 - exponent)

    def advance(self) -> None:
        """One product, with the newest vector; the result is orthogonalised, twice is enough."""
        side = len(self.norms) % 2
        newest, basis = self.bases[side][:, -1:], self.bases[1 - side]
        product = self.W.rmatmat if side else self.W.matmat
        new = product(newest * self.before) * self.after
        for _ in range(2):
            new = new - basis @ (basis.mT @ new)
        norm = float(torch.linalg.vector_norm(new))
        self.norms.append(norm)
        self.bases[1 - side] = torch.cat([basis, new / max(norm, 1e-300)], dim=1)

    @property
    def complete(self) -> bool:
        """Whether the v's span everything: then the chain holds all of W."""
        return len(self.norms) >= 2 * self.W.shape[1] - 1

    def ended(self, noise: float) -> bool:
        """Whether the next vector would be rounding only."""
        return self.complete or self.norms[-1] <= noise * max(self.norms)

    def ritz(self) -> tuple[float, Tensor]:
        """The largest Ritz value and the coordinates of its vector in v₁, u₁, v₂, and so on."""
        # the chain is the Lanczos process of [[0, Wᵀ], [W, 0]], whose diagonal is 0 in this basis
        off_diagonal = torch.tensor(self.norms, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(torch.diag(off_diagonal, -1))  # reads the lower half
        return float(values[-1]), vectors[:, -1]

    def leading_vector(self) -> Tensor:
        """The Ritz vector on the v side, shape ``(p,)``."""
        coordinates = self.ritz()[1][::2].to(self.bases[0])
        return self.bases[0] @ coordinates


def leading_vector(W: Tensor, rtol: float, generator: torch.Generator | None) -> tuple[Tensor, int]:
    """A vector x, shape ``(p,)``, with ‖Wx‖ ≳ (1 − rtol)σ₁‖x‖ most likely, and its passes."""
    start = gaussian(W.shape[1], 1, generator or fixed_seed()).to(W)
    chain, due = Chain(Dense(W), start), 1
    while True:
        chain.advance()
        passes = len(chain.norms)
        last = passes >= 200 or chain.ended(GRAIN)
        if passes < due and not last:
            continue
        # the square of the last coordinate is about the relative error of the Ritz value
        if last or float(chain.ritz()[1][-1]) ** 2 <= rtol / 1000:
            return chain.leading_vector(), passes
        due = passes + 1 + passes // 10
