"""Clusters of converged Ritz vectors: where the leading ones are cut, and which are complete.

A cluster holds the Ritz vectors between two cuts of the spectrum.  It is *complete* if the base has
no further singular value between the cuts; then the span of the Ritz vectors is near to that of all
base vectors there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from bulkedge.triplet import Ritz
from bulkedge.triplet._rounding import Rounding

MAX_SINE = 0.3
"""The spectrum is cut only where the Ritz vectors above the cut have converged to this sine."""


@dataclass(frozen=True)
class Cluster:
    """The Ritz vectors between two cuts of the spectrum.

    Attributes:
        first: The index of the first of them.
        end: One past the index of the last.
        low: The lower cut: no Ritz value below it can become a singular value above it.
        high: The upper cut, infinite for the first cluster.
        error: Bound on the sine between any of their span and the base vectors between the cuts.
        total_error: The same for all Ritz vectors above the lower cut.
    """

    first: int
    end: int
    low: float
    high: float
    error: float
    total_error: float

    @property
    def size(self) -> int:
        """How many Ritz vectors there are in it."""
        return self.end - self.first


@dataclass(frozen=True)
class Clusters:
    """The clusters that have converged, from the top, and what is known to be complete.

    Attributes:
        found: The clusters.
        complete: For each whether the base is taken to have no more vectors between its cuts.
        norm_bound: No singular value is larger.
    """

    found: Sequence[Cluster]
    complete: Sequence[bool]
    norm_bound: float

    @property
    def leading(self) -> list[Cluster]:
        """The complete clusters above which all are complete, too."""
        return [each for i, each in enumerate(self.found) if all(self.complete[: i + 1])]


def presumed_complete(clusters: Sequence[Cluster], probes: int) -> list[Cluster]:
    """The leading clusters that are probably complete.

    A start block with p random vectors finds up to p vectors of a cluster at once.  A cluster that
    has fewer Ritz vectors than p has probably no more singular vectors.

    Args:
        clusters: From the top.
        probes: How many random vectors the process began with.

    Returns:
        Those before the first that is too large.
    """
    small = [each.size < max(probes, 1) for each in clusters]
    return [each for i, each in enumerate(clusters) if all(small[: i + 1])]


def find_clusters(ritz: Ritz, rounding: Rounding) -> list[Cluster]:
    """Cut the leading Ritz values where they leave a gap that their residuals do not fill.

    Args:
        ritz: The Ritz vectors.
        rounding: How far the recurrences are from exact.

    Returns:
        The clusters, from the top; none where nothing has converged.
    """
    pairs = min(len(ritz.left), len(ritz.right))
    s = ritz.sigma[:pairs]
    rho = (ritz.residuals + 2 * rounding.of_vectors(pairs)) * (1 + rounding.defect)
    # A singular value that a Ritz value converges to lies at most its residual above it.  A Ritz
    # value further down with a large residual may belong higher up.
    highest = (s + rho).flip(0).cummax(0).values.flip(0)
    reach = torch.cat([highest[1:], rho.new_zeros(1)])
    middle = ((s.square() + torch.cat([s[1:], s.new_zeros(1)]).square()) / 2).sqrt()
    cuts = torch.maximum(reach, middle)
    clusters: list[Cluster] = []
    first, above = 0, float("inf")
    possible = pairs if len(ritz.lacking) == 0 else pairs - 1
    totals = _total_sines(s, rho, cuts)[:possible]
    places, sines = cuts.tolist(), totals.tolist()
    values, residuals = s.numpy(), rho.numpy()  # a few numbers each, for which NumPy is quicker
    for i in (totals <= MAX_SINE).nonzero().flatten().tolist():
        cut, end = places[i], i + 1
        error = sines[i]  # the first cluster's is that of all above its cut
        if first:
            error = _sine(values[first:end], residuals[first:end], cut, above)
        clusters.append(Cluster(first, end, cut, above, error, sines[i]))
        first, above = end, cut
    return clusters


def _total_sines(s: Tensor, rho: Tensor, cuts: Tensor) -> Tensor:
    """:func:`sine_bound` of all Ritz vectors above each of the cuts below them, ``(d,)``."""
    over = (s - cuts[:, None]) * (s + cuts[:, None])
    terms = (rho * s / over).square().tril()  # row i: the first i + 1 Ritz vectors, down to cut i
    return terms.sum(dim=1).sqrt().masked_fill(cuts >= s, torch.inf)


def sine_bound(s: Tensor, rho: Tensor, low: float, high: float) -> float:
    """Bound on the sine between Ritz vectors and the span of all u whose σ is in ``(low, high]``.

    For any singular triplet ``σ⟨u, û⟩ = s⟨v, v̂⟩`` and ``σ⟨v, v̂⟩ = s⟨u, û⟩ + ⟨u, r⟩`` to rounding,
    so that ``⟨u, û⟩ = s⟨u, r⟩ / (σ² − s²)``, which is summed over all u outside and over the û.

    Args:
        s: Ritz values, descending, shape ``(d,)``.
        rho: Norms ``‖r‖`` of their residuals, rounding included, shape ``(d,)``.
        low: The lower cut.
        high: The upper cut, maybe infinite.

    Returns:
        The bound, infinite if a Ritz value is not between the cuts.
    """
    return _sine(s.numpy(), rho.numpy(), low, high)


def _sine(s: numpy.ndarray, rho: numpy.ndarray, low: float, high: float) -> float:
    """:func:`sine_bound` of arrays."""
    if low >= s[-1] or high <= s[0]:
        return float("inf")
    steep = s / ((s - low) * (s + low))
    if high < float("inf"):
        steep = numpy.maximum(steep, high / ((high - s) * (high + s)))
    return float(numpy.linalg.norm(rho * steep))
