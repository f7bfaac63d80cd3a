"""The secular equation from all singular triplets of the base: poles, and what couples to them.

The Hermitisation ``H₀ = [[0, W0], [W0ᵀ, 0]]`` has the eigenvalues ±σ_i and 0.  In its eigenbasis
the update is ``E J Eᵀ``, J the exchange of the two halves, and with one row e_j of E per eigenvalue

    M(s) = Σ_j e_j e_jᵀ / (s − λ_j) − J.

Close to a pole the largest term of that sum exceeds all others by so much that they are lost.  So
the few nearest poles, N, are not summed: they border the sum over the rest,

    K(s) = [[diag(s − λ_N), E_N], [E_Nᵀ, −M_far(s)]],
    #{σ(W) > s} = #{λ_far > s} + n₋(K(s)) − r,

which is regular at the poles themselves, and whose null vectors are those of ``sI − H_W``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge.intruder import Scores, base_vectors, scores
from bulkedge.triplet import resolution
from bulkedge.triplet.solver._start import generic

from ._update_svd import UpdateSVD, power_of_two, tie_groups

EPS = torch.finfo(torch.float64).eps
NEAR = 1e-3
"""Poles closer than this, in units of the norms, border the sum, up to two full clusters."""
TIED = 1e-12
"""Roots closer than this, in units of the norms, get their vectors together."""
BLOCK_SIZE = 2**22
"""Numbers in one block of the sum over poles at most: this bounds the memory."""


@dataclass(frozen=True)
class BySVD:
    """``W0 = U Σ Vᵀ`` and an update, in the base's own coordinates; all divided by ``size``.

    Attributes:
        base: U, σ and V as they were given.
        factors: The update.
        size: The power of two that everything below is divided by.
        left: Orthonormal columns, shape ``(m, p + l)``: base vectors, those of equal values
            rotated so that few of them couple, then the part of the update outside their span.
        right: The same, shape ``(n, p + q)``.
        sigma: Base values, shape ``(p,)``, zeros left out.
        b: The left factor in these coordinates, shape ``(p + l, r)``.
        a: The right factor, shape ``(p + q, r)``.
    """

    base: tuple[Tensor, Tensor, Tensor]
    factors: UpdateSVD
    size: float
    left: Tensor
    right: Tensor
    sigma: Tensor
    b: Tensor
    a: Tensor

    @classmethod
    def of(cls, U: Tensor, S: Tensor, V: Tensor, factors: UpdateSVD) -> BySVD:
        """Compress; O((m + n) p r)."""
        shape = (len(U), len(V))
        size = power_of_two(float(S[:1].sum()) + factors.norm)
        small = factors.divided_by(size)
        p = int((resolution(S, shape) < S).sum())
        U1, V1, sigma, kept = _decoupled(U[:, :p], V[:, :p], S[:p] / size, small)
        left, b = _extended(U1, small.P, kept)
        right, a = _extended(V1, small.Q, kept)
        return cls((U, S, V), factors, size, left, right, sigma, b, a)

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return len(self.left), len(self.right)

    @property
    def poles(self) -> Tensor:
        """σ, −σ and zeros: one for each row of :attr:`coupling`."""
        outside = self.sigma.new_zeros(len(self.b) + len(self.a) - 2 * len(self.sigma))
        return torch.cat([self.sigma, -self.sigma, outside])

    @property
    def coupling(self) -> Tensor:
        """The rows e_j, shape ``(2p + l + q, 2r)``."""
        p = len(self.sigma)
        b, a = self.b[:p] / math.sqrt(2), self.a[:p] / math.sqrt(2)
        b1, a1 = self.b[p:], self.a[p:]
        rows = [
            torch.cat([b, a], dim=1),
            torch.cat([b, -a], dim=1),
            torch.cat([b1, torch.zeros_like(b1)], dim=1),
            torch.cat([torch.zeros_like(a1), a1], dim=1),
        ]
        return torch.cat(rows)

    def matrix(self, s: Tensor) -> Tensor:
        """M(s), shape ``(q, 2r, 2r)``; O(p r²) each."""
        E = self.coupling
        coupled = (E != 0).any(dim=1)
        distance = torch.where(coupled, s[:, None] / self.size - self.poles, torch.inf)
        if bool((distance == 0).any()):
            raise InputError(
                "expected no s that is a singular value of W0, where M(s) has a pole; count() is "
                "regular there"
            )
        return _weighted_gram(E, 1 / distance) - _exchange(E)

    def count(self, s: Tensor) -> Tensor:
        """``#{σ(W) > s}``, shape ``(q,)``."""
        return self._problem.count(s / self.size)

    def values(self, k: int) -> Tensor:
        """The k largest singular values, by bisection between interlacing and Weyl's bounds."""
        return self._roots(self._problem, k) * self.size

    def vectors(self, k: int, above: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """σ, u and v of the k largest, refined by one Rayleigh–Ritz step for all."""
        problem = self._problem
        roots = self._roots(problem, k)
        X = roots.new_zeros(len(problem.poles), 0)
        for i, j in tie_groups(roots, TIED):
            X = torch.cat([X, problem.eigenvectors(roots[i:j], X)], dim=1)
        p, split = len(self.sigma), len(self.b) - len(self.sigma)
        plus, minus, outside = X[:p], X[p : 2 * p], math.sqrt(2) * X[2 * p :]
        u = torch.linalg.qr(torch.cat([plus + minus, outside[:split]])).Q
        v = torch.linalg.qr(torch.cat([plus - minus, outside[split:]])).Q
        Y, sigma, Zt = torch.linalg.svd(u.mT @ self._core(v))
        return sigma * self.size, self.left @ (u @ Y), self.right @ (v @ Zt.mT)

    def product(self, v: Tensor) -> Tensor:
        """``W v``."""
        U, S, V = self.base
        return U @ (S[:, None] * (V.mT @ v)) + self.factors.P @ (self.factors.Q.mT @ v)

    def transposed_product(self, u: Tensor) -> Tensor:
        """``Wᵀ u``."""
        U, S, V = self.base
        return V @ (S[:, None] * (U.mT @ u)) + self.factors.Q @ (self.factors.P.mT @ u)

    def scores(self, u: Tensor, v: Tensor) -> tuple[Scores, Scores] | None:
        """The scores of both sides against all base vectors."""
        U, S, V = self.base
        left, right = base_vectors(U, S, self.shape), base_vectors(V, S, self.shape)
        return scores(u, left, 2 * u.shape[1]), scores(v, right, 2 * v.shape[1])

    @property
    def _problem(self) -> Bordered:
        return Bordered(self.poles, self.coupling)

    def _core(self, v: Tensor) -> Tensor:
        """The product with W in the compressed coordinates."""
        p = len(self.sigma)
        out = self.b @ (self.a.mT @ v)
        out[:p] += self.sigma[:, None] * v[:p]
        return out

    def _roots(self, problem: Bordered, k: int) -> Tensor:
        """The k largest values over ``size``, to a few units in the last place of the norm."""
        r, norm = self.factors.rank, self.factors.norm / self.size
        S = self.base[1] / self.size
        S = torch.cat([S, S.new_zeros(min(self.shape) - len(S))])
        above, below = S.new_full((r,), float(S[:1].sum()) + norm), S.new_zeros(r)
        slack = 4 * float(resolution(S, self.shape))
        low = torch.maximum(torch.cat([S, below])[r : r + k], S[:k] - norm) - slack
        high = torch.minimum(torch.cat([above, S])[:k], S[:k] + norm) + slack
        low, high, index = low.clamp_min(0), high + EPS, torch.arange(1, k + 1, device=S.device)
        while bool((high - low > 2 * EPS).any()):
            middle = (low + high) / 2
            more = problem.count(middle) >= index
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        return ((low + high) / 2).cummin(dim=0).values


@dataclass(frozen=True)
class Bordered:
    """``H_W = diag(λ) + E J Eᵀ``: how many eigenvalues exceed s, and the vectors of some.

    Attributes:
        poles: λ, shape ``(P,)``, of the order of one.
        coupling: E, shape ``(P, 2r)``; a row of zeros is an eigenvector as it stands.
    """

    poles: Tensor
    coupling: Tensor

    def count(self, s: Tensor) -> Tensor:
        """Eigenvalues greater than each s, shape ``(q,)``."""
        rows = max(1, BLOCK_SIZE // max(1, self.coupling.numel()))
        parts = [self._count(part) for part in s.split(rows)] if len(s) else [s.long()]
        return torch.cat(parts)

    def eigenvectors(self, values: Tensor, known: Tensor) -> Tensor:
        """Orthonormal eigenvectors of a few eigenvalues that lie together, orthogonal to ``known``.

        Block inverse iteration.  The results are orthogonal to the known vectors, so that all
        together span the right space although single ones of close neighbours may be mixed.

        Returns:
            Shape ``(P, g)``.
        """
        shift, g = values.mean(), len(values)
        size, found = known.shape
        X, solve = generic(size, min(g, size - found), known), self._solver(shift)
        for _ in range(3):
            Z = solve(X)
            # Where many poles are close the solve loses digits; one refinement recovers them.
            X = torch.linalg.qr(Z + solve(X - shift * Z + self._image(Z))).Q
            X = torch.linalg.qr(X - known @ (known.mT @ X)).Q
        theta, Y = torch.linalg.eigh(X.mT @ self._image(X))
        return X @ Y[:, (theta - shift).abs().argsort()]

    def _count(self, s: Tensor) -> Tensor:
        K, near, _, _ = self._bordered(s)
        greater = self.poles > s[:, None]
        far = greater.sum(dim=1) - greater.gather(1, near).sum(dim=1)
        negative = (torch.linalg.eigvalsh(K) < 0).sum(dim=1)
        return far + negative - self.coupling.shape[1] // 2

    def _bordered(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """K(s), the indices of the near poles, 1/(s − λ) of the far ones, and the units of y.

        The border is in units in which M_far is of the order of one; otherwise its rounding would
        be larger than the near poles.

        Returns:
            Shapes ``(q, c + 2r, c + 2r)``, ``(q, c)``, ``(q, P)`` and ``(q, 2r, 1)``.
        """
        E = self.coupling
        coupled = (E != 0).any(dim=1)
        distance = s[:, None] - self.poles
        reach = torch.where(coupled, distance.abs(), torch.inf)
        within = int((reach < NEAR).sum(dim=1).max())
        c = min(int(coupled.sum()), max(2, min(within, 2 * E.shape[1] + 2)))
        near = reach.topk(c, dim=1, largest=False).indices
        weights = torch.where(coupled, 1 / torch.where(distance == 0, EPS, distance), 0.0)
        weights = weights.scatter(1, near, 0.0)
        corner = _exchange(E) - _weighted_gram(E, weights)
        units = corner.diagonal(dim1=1, dim2=2).abs().clamp_min(1.0).rsqrt()[:, :, None]
        border = E[near] * units.mT
        top = torch.cat([torch.diag_embed(distance.gather(1, near)), border], dim=2)
        low = torch.cat([border.mT, units * corner * units.mT], dim=2)
        return torch.cat([top, low], dim=1), near, weights, units

    def _image(self, X: Tensor) -> Tensor:
        """``H_W X``."""
        return self.poles[:, None] * X + self.coupling @ _swapped(self.coupling.mT @ X)

    def _solver(self, s: Tensor) -> Callable[[Tensor], Tensor]:
        """``X ↦ (sI − H_W)⁻¹ X``; where that is singular to rounding, very large instead."""
        K, near, weights, units = (x[0] for x in self._bordered(s[None]))
        L, Q = torch.linalg.eigh(K)
        L = torch.where(L.abs() < EPS, EPS, L)[:, None]
        distance = s - self.poles
        distance = torch.where(distance.abs() < EPS, EPS, distance)[:, None]

        def solve(X: Tensor) -> Tensor:
            known = -units * ((self.coupling.mT * weights) @ X)
            solution = Q @ ((Q.mT @ torch.cat([X[near], known])) / L)
            out = (X - self.coupling @ (units * solution[len(near) :])) / distance
            out[near] = solution[: len(near)]
            return out

        return solve


def _decoupled(
    U: Tensor, V: Tensor, sigma: Tensor, factors: UpdateSVD
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotate the basis of each large eigenspace so that only 2r of its vectors couple.

    Values count as equal within the rounding of an SVD of matrices of this size and norm one.

    Returns:
        U, V, σ, and which of the vectors couple.
    """
    kept = torch.ones_like(sigma, dtype=torch.bool)
    coupled = 2 * factors.rank
    spaces = _equal(sigma, 2 * max(len(U), len(V)) ** 0.5 * EPS)
    large = [(i, j) for i, j in spaces if j - i > coupled > 0]
    if large:
        U, V, sigma = U.clone(), V.clone(), sigma.clone()
    for i, j in large:
        rows = torch.cat([U[:, i:j].mT @ factors.P, V[:, i:j].mT @ factors.Q], dim=1)
        Q = torch.linalg.qr(rows, mode="complete").Q
        U[:, i:j], V[:, i:j] = U[:, i:j] @ Q, V[:, i:j] @ Q
        sigma[i:j] = sigma[i:j].mean()
        kept[i + coupled : j] = False
    return U, V, sigma, kept


def _equal(sigma: Tensor, width: float) -> list[tuple[int, int]]:
    """Ranges ``[first, end)`` of descending values within ``width`` of the first of each."""
    values, starts = sigma.tolist(), []
    for i, value in enumerate(values):
        if not starts or values[starts[-1]] - value > width:
            starts.append(i)
    return list(pairwise([*starts, len(values)]))


def _extended(basis: Tensor, factor: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The basis completed so that it spans the factor, and the factor in its coordinates."""
    inside = torch.where(kept[:, None], basis.mT @ factor, 0.0)
    rest = factor - basis @ (basis.mT @ factor)
    X, sizes, _ = torch.linalg.svd(rest, full_matrices=False)
    room = len(basis) - basis.shape[1]
    # What rounding leaves of a factor inside the span is no direction of the factor.
    rounding = 64 * EPS * torch.linalg.vector_norm(factor)
    X = X[:, :room][:, sizes[:room] > rounding]
    X = torch.linalg.qr(X - basis @ (basis.mT @ X)).Q
    return torch.cat([basis, X], dim=1), torch.cat([inside, X.mT @ factor])


def _weighted_gram(E: Tensor, weights: Tensor) -> Tensor:
    """``Eᵀ diag(w) E`` for each row of weights."""
    return (E.mT * weights[:, None, :]) @ E


def _exchange(E: Tensor) -> Tensor:
    """J: zero blocks on the diagonal, identities off it."""
    eye = torch.eye(E.shape[1], dtype=E.dtype, device=E.device)
    return _swapped(eye)


def _swapped(Y: Tensor) -> Tensor:
    """``J Y``."""
    return Y.roll(len(Y) // 2, dims=0) if len(Y) else Y
