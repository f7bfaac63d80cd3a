"""Random bases and updates, and their comparison, in units of the threshold.

Noise has entries of standard deviation τ = (mn)^(−¼), so that θ_c = τ(mn)^¼ = 1: the strength of
a spike is its strength over the threshold.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._fields import DEFAULT_EPSILON
from bulkedge.intruder import BaseVectors, Scores, Verdict, base_vectors, scores, verdict
from bulkedge.rmt import WhiteBulk, edge_test
from bulkedge.triplet import LowRank, thin_svd
from bulkedge.update import Secular

EPSILON = DEFAULT_EPSILON
"""The score below which the paper counts a direction as new."""
LEVEL = 0.05
"""The chance that noise alone has a value beyond :func:`noise_line`."""

Shape = tuple[int, int]
"""Rows and columns (m, n)."""
Factors = tuple[Tensor, Tensor]
"""B of shape (m, r) and A of shape (r, n)."""


def gaussian(shape: Shape, generator: torch.Generator) -> Tensor:
    """Independent standard normal entries in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def white_bulk(shape: Shape) -> WhiteBulk:
    """The bulk of noise with threshold 1."""
    return WhiteBulk(shape, (shape[0] * shape[1]) ** -0.25)


def noise(shape: Shape, generator: torch.Generator) -> Tensor:
    """Gaussian noise with threshold 1."""
    return gaussian(shape, generator) * white_bulk(shape).sigma


def haar(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Uniformly distributed orthonormal columns, shape ``(size, count)``."""
    Q, R = torch.linalg.qr(gaussian((size, count), generator))
    return Q * R.diagonal().sign()


def spiked_update(shape: Shape, theta: Tensor, generator: torch.Generator) -> Factors:
    """An update with these singular values and uniformly random singular vectors."""
    left, right = (haar(size, len(theta), generator) for size in shape)
    return left * theta.double(), right.mT


def gaussian_factors(shape: Shape, rank: int, norm: float, generator: torch.Generator) -> Factors:
    """An update of independent Gaussian factors, of Frobenius norm ``norm``."""
    B, A = gaussian((shape[0], rank), generator), gaussian((rank, shape[1]), generator)
    return B * (norm / LowRank(B, A).singular_values().norm()), A


def dense_update(shape: Shape, norm: float, generator: torch.Generator) -> Tensor:
    """An update of independent Gaussian entries, of Frobenius norm ``norm``."""
    G = gaussian(shape, generator)
    return G * (norm / G.norm())


def noise_with_signals(
    shape: Shape, signals: int, strongest: float, generator: torch.Generator
) -> Tensor:
    """Noise plus spikes from ``strongest`` down to 2 in equal steps, like trained weights."""
    B, A = spiked_update(shape, torch.linspace(strongest, 2.0, signals), generator)
    return noise(shape, generator) + B @ A


@functools.lru_cache(maxsize=256)
def noise_quantile(shape: Shape, sigma: float) -> float:
    """The value that the largest singular value of noise exceeds with a chance of 5 %."""
    low, high = (WhiteBulk(shape, sigma).edge * factor for factor in (0.8, 2.0))
    for _ in range(40):
        middle = (low + high) / 2
        is_rare = edge_test(middle, shape, sigma=sigma) < LEVEL
        low, high = (low, middle) if is_rare else (middle, high)
    return high


@dataclass(frozen=True)
class Judged:
    """The k leading left directions of a tuned matrix, compared with its base.

    Attributes:
        sigma: All singular values of the tuned matrix.
        u: The directions, shape ``(m, k)``.
        scores: Their scores, with overlaps with the space of the 2k leading base vectors.
    """

    sigma: Tensor
    u: Tensor
    scores: Scores

    @property
    def counted(self) -> int:
        """The number of new directions: score < ε."""
        return int((self.scores.score < EPSILON).sum())

    def verdicts(self, kind: Verdict) -> int:
        """How many directions have this verdict."""
        both = zip(self.scores.score.tolist(), self.scores.subspace_overlap.tolist(), strict=True)
        return sum(verdict(score, overlap, epsilon=EPSILON) == kind for score, overlap in both)


@dataclass(frozen=True)
class Base:
    """A base matrix with its thin SVD."""

    matrix: Tensor
    U: Tensor
    S: Tensor
    V: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Base:
        """The base with its SVD."""
        return cls(matrix, *thin_svd(matrix))

    @functools.cached_property
    def left(self) -> BaseVectors:
        """Its left singular vectors."""
        return base_vectors(self.U, self.S, tuple(self.matrix.shape))

    def secular(self, update: Factors) -> Secular:
        """The secular equation of the base and a low-rank update."""
        return Secular.from_svd(self.U, self.S, self.V, *update)

    def judge(self, tuned: Tensor, k: int) -> Judged:
        """Compare the k leading left directions of a tuned matrix with all of the base."""
        U, S, _ = thin_svd(tuned)
        return Judged(S, U[:, :k], scores(U[:, :k], self.left, 2 * k))

    def scores(self, u: Tensor) -> Scores:
        """Scores of left directions, with overlaps with as many leading base vectors."""
        return scores(u, self.left, u.shape[1])
