"""What is known of the base and the tuned directions from a Krylov space, frozen after a step.

Everything that turns evidence into intervals is a pure function of these dataclasses, so that it
can be tested on evidence made by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from bulkedge._precision import exact
from bulkedge.triplet import Bidiagonalization, Ritz, Unseen
from bulkedge.triplet._rounding import Rounding
from bulkedge.triplet._unseen import Between

from ._clusters import Cluster, Clusters, find_clusters, presumed_complete
from ._component_bound import ComponentBound


@dataclass(frozen=True)
class Question:
    """What is asked of k tuned directions.

    Attributes:
        epsilon: The threshold of the score.
        errors: Bound on ``sin ∠`` between each direction and the true tuned vector, shape ``(k,)``.
        groups: The number of the group of each, ascending from 0, shape ``(k,)``: the directions of
            a group are known as a space only.
        subspace: How many leading base vectors span the space of the overlap.
    """

    epsilon: float
    errors: Tensor
    groups: Tensor
    subspace: int

    @property
    def group_count(self) -> int:
        """How many groups there are."""
        return int(self.groups[-1]) + 1


class CountBound(NamedTuple):
    """At most ``number`` singular values exceed ``cut``."""

    number: int
    cut: float


@dataclass(frozen=True)
class Proofs:
    """What Cholesky factorisations have proved of the singular values of the base.

    Attributes:
        min_sigma: Every singular value exceeds this, if it is not 0.
        counts: Bounds on how many exceed a cut.
    """

    min_sigma: float = 0.0
    counts: tuple[CountBound, ...] = ()

    def complete_vectors(self, clusters: Sequence[Cluster]) -> int:
        """How many leading Ritz vectors form complete clusters, by the counts.

        If at most n singular values exceed x and n Ritz values do, then each cluster above x is
        complete.

        Args:
            clusters: From the top.

        Returns:
            The number of Ritz vectors, 0 if nothing is proved.
        """
        proved = (
            cluster.end
            for cluster in clusters
            for number, cut in self.counts
            if cluster.end == number and cluster.low >= cut
        )
        return max(proved, default=0)

    def norm_bound(self, frobenius: float) -> float:
        """The lowest cut that no singular value exceeds; ``‖W0‖_F`` without one."""
        return min((cut for number, cut in self.counts if number == 0), default=frobenius)


@dataclass(frozen=True)
class Evidence:
    """The state of a Krylov space that began with the directions and some probes.

    Attributes:
        unseen: What the probes prove of singular vectors that were not found; with it the Ritz
            vectors, the rounding of the recurrences and ``‖W0‖_F``.
        coordinates: Of the directions in the left Ritz vectors, shape ``(d, k)``.
        shape: ``(m, n)`` of the base.
        start_size: How many vectors the process began with.
        exhausted: Whether the Ritz vectors are all the singular vectors of the base.
        proofs: What factorisations have proved.
    """

    unseen: Unseen
    coordinates: Tensor
    shape: tuple[int, int]
    start_size: int
    exhausted: bool = False
    proofs: Proofs = field(default_factory=Proofs)

    @property
    def ritz(self) -> Ritz:
        """The Ritz vectors."""
        return self.unseen.ritz

    @property
    def rounding(self) -> Rounding:
        """How far the space is from exact recurrences and orthonormal bases."""
        return self.unseen.rounding

    @property
    def frobenius(self) -> float:
        """``‖W0‖_F``, or more."""
        return self.unseen.frobenius

    @property
    def probes(self) -> int:
        """How many random vectors the process began with."""
        return self.unseen.coordinates.shape[1]

    @property
    def values(self) -> Tensor:
        """The Ritz values that have a pair of vectors, descending."""
        return self.ritz.sigma[: len(self.ritz.residuals)]

    @property
    def largest_seen(self) -> float:
        """What the largest singular value seems to be, by the Ritz values and their residuals."""
        return max((self.values + self.ritz.residuals).tolist(), default=0.0) + self.rounding.noise

    @cached_property
    def component_bound(self) -> ComponentBound:
        """The bound from above on the component of each direction on any base vector."""
        return ComponentBound(self.ritz, self.coordinates, self.rounding.noise)


class Inside:
    """The coordinates of vectors in the left basis as it grows: each product is taken once.

    Args:
        process: The Krylov space.
        Y: The vectors, shape ``(m, k)``.
    """

    def __init__(self, process: Bidiagonalization, Y: Tensor) -> None:
        self.process, self.Y = process, exact(Y.to(process.map.device))
        self.known = torch.zeros(0, Y.shape[1], dtype=torch.float64)

    def coordinates(self) -> Tensor:
        """``PᵀY`` in float64, shape ``(d, k)``."""
        new = exact(self.process.left[:, len(self.known) :].mT) @ self.Y
        self.known = torch.cat([self.known, new.cpu()])
        return self.known


def collect(
    process: Bidiagonalization,
    inside: Inside,
    probes: Tensor,
    *,
    ritz: Ritz,
    rounding: Rounding,
    proofs: Proofs,
    frobenius: float,
    failure_probability: float,
) -> Evidence:
    """The evidence of a process as it is now.

    Args:
        process: The Krylov space.
        inside: The directions in its left basis.
        probes: The Gaussian vectors that it began with, besides those, float64, shape ``(m, p)``.
        ritz: Its Ritz vectors.
        rounding: How far it is from exact recurrences and orthonormal bases.
        proofs: What factorisations have proved.
        frobenius: ``‖W0‖_F``, or more.
        failure_probability: The probability, over the probes, that a statement about vectors that
            were not found is wrong.

    Returns:
        The evidence.
    """
    unseen = Unseen.of(process, ritz, probes, frobenius, failure_probability, rounding)
    coordinates = ritz.left.mT @ inside.coordinates()
    shape = process.map.shape
    exhausted = process.closed and min(shape) == len(ritz.residuals)
    return Evidence(unseen, coordinates, shape, process.start_size, exhausted, proofs)


def known_clusters(evidence: Evidence, *, assume_complete: bool = False) -> Clusters:
    """The converged clusters of the base, and which of them are complete.

    Args:
        evidence: The evidence.
        assume_complete: For planning: take clusters for complete that probably are, and the
            largest singular value seen for the norm.  False accepts proofs alone.

    Returns:
        The clusters.
    """
    clusters = find_clusters(evidence.ritz, evidence.rounding)
    if evidence.exhausted:
        return Clusters(clusters, [True] * len(clusters), evidence.largest_seen)
    if assume_complete:
        presumed = presumed_complete(clusters, evidence.probes)
        complete = [i < len(presumed) for i in range(len(clusters))]
        return Clusters(clusters, complete, evidence.largest_seen)
    counted, unseen = evidence.proofs.complete_vectors(clusters), evidence.unseen
    parts = [Between(c.first, c.end, c.low, c.high) for c in clusters if c.end > counted]
    complete = [True] * (len(clusters) - len(parts)) + unseen.nothing_missed_each(parts)
    norm_bound = evidence.proofs.norm_bound(evidence.frobenius)
    return Clusters(clusters, complete, min(norm_bound, unseen.norm_bound))
