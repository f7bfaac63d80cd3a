"""The secular equation beyond σ₁(W0), from linear systems with ``s²I − W0 W0ᵀ`` alone.

With ``Z = (s²I − W0W0ᵀ)⁻¹ [P, W0 Q]`` and the update ``P Qᵀ``, the three blocks are

    PᵀG₁₁P = s PᵀZ_P,   PᵀG₁₂Q = PᵀZ_Q,   QᵀG₂₂Q = (QᵀQ + (W0Q)ᵀZ_Q)/s.

There M decreases with s, so that each outlier is the one zero of one eigenvalue of M.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bulkedge._errors import ConvergenceError, InputError
from bulkedge._fields import TOLERANCE, check_fields, whole
from bulkedge._linmap import Dense, LinearMap, Scaled
from bulkedge.intruder import Scores
from bulkedge.triplet import singular_triplet

from ._update_svd import UpdateSVD, power_of_two, tie_groups

EPS = torch.finfo(torch.float64).eps
MARGIN = 1e-6
"""Values are looked for from this relative distance beyond σ₁(W0) on, if no edge is given."""
MAX_STEPS = 60
"""Steps of the root finder at most."""
TIED = 1e-12
"""Roots closer than this, in units of the norms, get their vectors together."""

Solve = Callable[[Tensor, Tensor], Tensor]
"""``(s²I − W0W0ᵀ)⁻¹ R`` for s² of shape ``(q,)`` and R of ``(m, b)``: shape ``(q, m, b)``."""


class SystemSolver(Protocol):
    """A way to solve with ``s²I − W0 W0ᵀ``, m ≤ n."""

    def prepare(self, W0: LinearMap) -> Solve:
        """What solves for any s and right-hand sides."""
        ...


@dataclass(frozen=True)
class Cholesky:
    """A Cholesky factor of ``s²I − W0 W0ᵀ`` on the shorter side, formed.

    Cost: O(m²n) once, O(m³/3) for each s; four m×m matrices in float64.
    """

    def prepare(self, W0: LinearMap) -> Solve:
        """See :class:`SystemSolver`."""
        matrix = W0.to_dense()
        gram = matrix @ matrix.mT
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)

        def solve(squares: Tensor, R: Tensor) -> Tensor:
            out = [R.new_zeros(0, *R.shape)]
            for square in squares:
                factor, info = torch.linalg.cholesky_ex(square * eye - gram)
                if int(info):
                    raise _not_beyond()
                out.append(torch.cholesky_solve(R, factor)[None])
            return torch.cat(out)

        return solve


@dataclass(frozen=True)
class ConjugateGradients:
    """Conjugate gradients, all s and all right-hand sides in one block; W0 by its products alone.

    Cost: two passes over W0 a step, with 2rq columns; about ``√(σ₁/(s − σ₁))·ln(1/rtol)`` steps,
    fewer where few base values are near s.

    Attributes:
        rtol: Stop when every residual is below ``rtol`` times its right-hand side.
        max_steps: Steps before giving up.
    """

    rtol: float = 1e-13
    max_steps: int = 5000

    def __post_init__(self) -> None:
        check_fields(self, rtol=TOLERANCE, max_steps=whole(1))

    def prepare(self, W0: LinearMap) -> Solve:
        """See :class:`SystemSolver`."""

        def solve(squares: Tensor, R: Tensor) -> Tensor:
            columns = R.repeat(1, len(squares))
            Z = self._solved(W0, squares.repeat_interleave(R.shape[1]), columns)
            return Z.reshape(len(R), len(squares), R.shape[1]).movedim(1, 0)

        return solve

    def _solved(self, W0: LinearMap, squares: Tensor, rhs: Tensor) -> Tensor:
        """One system a column."""
        Z, R, D = torch.zeros_like(rhs), rhs, rhs
        energy = (R * R).sum(dim=0)
        target = self.rtol**2 * energy
        for _ in range(self.max_steps):
            active = energy > target
            if not bool(active.any()):
                return Z
            HD = squares * D - W0.matmat(W0.rmatmat(D))
            curvature = (D * HD).sum(dim=0)
            if bool((active & (curvature <= 0)).any()):
                raise _not_beyond()
            alpha = torch.where(active, energy / curvature, 0.0)
            Z, R = Z + alpha * D, R - alpha * HD
            energy, before = (R * R).sum(dim=0), energy
            D = torch.where(active, R + (energy / before) * D, 0.0)
        left = float((energy / (rhs * rhs).sum(dim=0)).nan_to_num().max().sqrt())
        raise ConvergenceError(
            f"ConjugateGradients: relative residual {left:.1e} after {self.max_steps} steps; raise "
            "max_steps, stay further from σ₁(W0), or use Cholesky() or the form of an SVD",
            Z,
        )


@dataclass(frozen=True)
class BySolves:
    """A base known by linear systems, and an update; all divided by ``size``.

    Attributes:
        W0: The base, in float64.
        factors: The update.
        size: The power of two that ``solve`` works in units of.
        norm: σ₁(W0).
        solve: Systems with the base over ``size``, on its shorter side.
    """

    W0: LinearMap
    factors: UpdateSVD
    size: float
    norm: float
    solve: Solve

    @classmethod
    def of(
        cls, W0: LinearMap, factors: UpdateSVD, norm: float | None, solver: SystemSolver | None
    ) -> BySolves:
        """Find σ₁(W0) if it is not given, and prepare the solver."""
        if norm is None:
            norm = float(singular_triplet(W0).sigma)
        size = power_of_two(norm + factors.norm)
        if solver is None:
            moderate = isinstance(W0, Dense) and min(W0.shape) <= 4096
            solver = Cholesky() if moderate else ConjugateGradients()
        flat = W0 if W0.shape[0] <= W0.shape[1] else W0.T
        return cls(W0, factors, size, norm, solver.prepare(Scaled(flat, 1 / size)))

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self.W0.shape

    def matrix(self, s: Tensor) -> Tensor:
        """M(s), shape ``(q, 2r, 2r)``; one system each."""
        self._require_beyond(s)
        M = self._flat.matrix(s / self.size)[0]
        if self._is_flat:
            return M
        r = self.factors.rank
        return M.roll((r, r), dims=(1, 2))  # the matrix of the transpose has its halves exchanged

    def count(self, s: Tensor) -> Tensor:
        """``#{σ(W) > s}``, shape ``(q,)``."""
        positive = torch.linalg.eigvalsh(self.matrix(s)) > 0
        return positive.sum(dim=1) - self.factors.rank

    def values(self, k: int) -> Tensor:
        """The k largest singular values, all beyond σ₁(W0)."""
        return self.vectors(k)[0]

    def vectors(self, k: int, above: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """σ, u and v of the k largest, all beyond σ₁(W0); ``above``, if given, is known to be."""
        gamma = self.factors.gamma
        if k == 0:
            m, n = self.shape
            return gamma.new_zeros(0), gamma.new_zeros(m, 0), gamma.new_zeros(n, 0)
        if not above:
            above = self.norm * (1 + MARGIN) + MARGIN**2 * self.factors.norm
            self._require(k, int(self.count(gamma.new_full((1,), above))) if above else 0)
        roots = self._flat.roots(k, above / self.size, self._ceilings(k))
        u, v = self._flat.eigenvectors(roots)
        u, v = (torch.linalg.qr(x).Q for x in ((u, v) if self._is_flat else (v, u)))
        Y, sigma, Zt = torch.linalg.svd(u.mT @ self.product(v))
        return sigma, u @ Y, v @ Zt.mT

    def product(self, v: Tensor) -> Tensor:
        """``W v``."""
        return self.W0.matmat(v) + self.factors.P @ (self.factors.Q.mT @ v)

    def transposed_product(self, u: Tensor) -> Tensor:
        """``Wᵀ u``."""
        return self.W0.rmatmat(u) + self.factors.Q @ (self.factors.P.mT @ u)

    def scores(self, u: Tensor, v: Tensor) -> tuple[Scores, Scores] | None:
        """None: the score needs every base vector, and this form has none."""
        return None

    @property
    def _is_flat(self) -> bool:
        return self.shape[0] <= self.shape[1]

    @property
    def _flat(self) -> Flat:
        factors = self.factors.divided_by(self.size)
        W0 = Scaled(self.W0, 1 / self.size)
        if self._is_flat:
            return Flat(W0, factors.P, factors.Q, self.solve)
        return Flat(W0.T, factors.Q, factors.P, self.solve)

    def _ceilings(self, k: int) -> Tensor:
        """Weyl's ``σ_j(W) ≤ σ₁(W0) + γ_j``, and a little, over ``size``."""
        return (self.norm + self.factors.gamma[:k]) / self.size * (1 + 1e-9)

    def _require(self, k: int, found: int) -> None:
        if k > found:
            raise InputError(
                f"expected k ≤ {found}, the number of singular values beyond σ₁(W0) = "
                f"{self.norm:.6g}, got k={k}; those inside need Secular.from_svd"
            )

    def _require_beyond(self, s: Tensor) -> None:
        if bool((s <= self.norm).any()):
            raise InputError(
                f"expected s > σ₁(W0) = {self.norm:.6g}, got s={float(s.min()):.6g}; values inside "
                "the base's spectrum need Secular.from_svd"
            )


@dataclass(frozen=True)
class Flat:
    """A base with m ≤ n, of the order of one, and an update ``P Qᵀ``."""

    W0: LinearMap
    P: Tensor
    Q: Tensor
    solve: Solve

    def matrix(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """M(s), shape ``(q, 2r, 2r)``, and Z, shape ``(q, m, 2r)``."""
        P, Q, r = self.P, self.Q, self.P.shape[1]
        W0Q = self.W0.matmat(Q)
        Z = self.solve(s.square(), torch.cat([P, W0Q], dim=1))
        s = s[:, None, None]
        eye = torch.eye(r, dtype=P.dtype, device=P.device)
        top = s * (P.mT @ Z[:, :, :r])
        side = P.mT @ Z[:, :, r:] - eye
        low = (Q.mT @ Q + W0Q.mT @ Z[:, :, r:]) / s
        M = torch.cat([torch.cat([top, side], dim=2), torch.cat([side.mT, low], dim=2)], dim=1)
        return (M + M.mT) / 2, Z

    def roots(self, k: int, low: float, high: Tensor) -> Tensor:
        """The k largest values, given that they lie above ``low``: Rayleigh steps in a bracket.

        With ``M y = μ y`` and ``x = (s − H₀)⁻¹E y`` the Rayleigh quotient of x is
        ``s + μ(1 + μ yᵀJy)/‖x‖²``: a Newton step, to second order.

        Returns:
            Shape ``(k,)``.
        """
        lows, highs = torch.full_like(high, low), high
        s = highs
        for _ in range(MAX_STEPS):
            mu, y, x = self._pairs(s)
            lows, highs = torch.where(mu > 0, s, lows), torch.where(mu > 0, highs, s)
            exchange = (y * y.roll(y.shape[1] // 2, dims=1)).sum(dim=1)  # yᵀJy
            step = mu * (1 + mu * exchange) / x.square().sum(dim=0)
            new = s + step
            new = torch.where((new > lows) & (new < highs), new, (lows + highs) / 2)
            small = (step.abs() <= 4 * EPS * s) | (highs - lows <= 4 * EPS * s)
            if bool(small.all()):
                break
            s = torch.where(small, s, new)
        return s

    def eigenvectors(self, roots: Tensor) -> tuple[Tensor, Tensor]:
        """Left and right vectors of the roots; equal roots share one s, so that theirs differ."""
        for i, j in tie_groups(roots, TIED):
            roots = torch.cat([roots[:i], roots[i:j].mean().expand(j - i), roots[j:]])
        x = self._pairs(roots)[2]
        return x[: len(self.P)], x[len(self.P) :]

    def _pairs(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The eigenvalue of M that vanishes at the j-th root, its y, and x = [û; v̂] in columns."""
        M, Z = self.matrix(s)
        r, j = self.P.shape[1], torch.arange(len(s), device=s.device)
        values, Y = torch.linalg.eigh(M)
        mu, y = values[j, r - 1 - j], Y[j, :, r - 1 - j]
        alpha, beta = y[:, :r, None], y[:, r:, None]
        u = (s[:, None, None] * Z[:, :, :r] @ alpha + Z[:, :, r:] @ beta)[:, :, 0].mT
        v = (self.Q @ beta[:, :, 0].mT + self.W0.rmatmat(u)) / s
        return mu, y, torch.cat([u, v])


def _not_beyond() -> InputError:
    return InputError(
        "expected s > σ₁(W0), got an s for which s²I − W0W0ᵀ is not positive definite: the norm "
        "given is too small; leave it None"
    )
