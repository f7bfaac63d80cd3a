"""What has converged: of the base's leading Ritz vectors, and of the tuned vectors themselves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from bulkedge.triplet import Ritz, SingularTriplets
from bulkedge.triplet._rounding import Rounding

CLOSE = 0.3
"""A gap counts as one while ``residual / gap`` is below this."""
APART = 0.05
"""Tuned vectors are told apart while ``residual / gap`` is below this."""
TINY = 1e-300


@dataclass(frozen=True)
class Space:
    """The Ritz vectors between two cuts of the spectrum.

    Attributes:
        first: The first of them.
        last: One past the last.
        low: The lower cut, an upper bound on the next singular value.
        high: The upper cut, infinite above the first.
        error: Bound on the sine between any of their span and the base vectors between the cuts.
        total: The same for all Ritz vectors above the lower cut.
    """

    first: int
    last: int
    low: float
    high: float
    error: float
    total: float


@dataclass(frozen=True)
class Heads:
    """The leading Ritz vectors as far as they are reliable, cut where there is a gap.

    Attributes:
        spaces: What lies between two cuts, from the top.
        whole: For which of them it is proved that the base has no more vectors there.
        probes: How many random vectors the process began with.
        ceiling: No singular value lies beyond.
    """

    spaces: list[Space]
    whole: list[bool]
    probes: int
    ceiling: float

    @property
    def leading(self) -> list[Space]:
        """The spaces of which all above are whole, too."""
        return [space for i, space in enumerate(self.spaces) if all(self.whole[: i + 1])]

    @property
    def likely(self) -> list[Space]:
        """Those that are whole unless the probes have missed one so far."""
        small = [space.last - space.first < max(self.probes, 1) for space in self.spaces]
        return [space for i, space in enumerate(self.spaces) if all(small[: i + 1])]


def ties(tuned: SingularTriplets) -> tuple[Tensor, Tensor]:
    """Which tuned vectors are known one by one, and which as a space only.

    Args:
        tuned: Leading triplets; ``gaps`` counts what may lie below the last one.

    Returns:
        ``groups`` and ``errors`` for :func:`certify`: neighbours whose gap their residuals fill
        are of one group, whose error is ``‖residuals‖ / gap`` (Wedin), at most 1.  The gap is that
        between the values of the group and what the neighbours' true values may be.
    """
    sigma, rho = tuned.sigma.double().cpu(), tuned.residuals.double().cpu()
    k = len(sigma)
    below = sigma[:-1] - sigma[1:]
    last = tuned.near[0][:1].double().cpu() if tuned.near is not None else sigma.new_zeros(1)
    below = torch.cat([below, (sigma[-1:] - last) if len(last) else sigma[-1:]])
    # the value after the last need not have converged: the solver's own gap knows by how much
    if k == 1 or bool(tuned.gaps[-1] < below[-2]):
        below[-1] = torch.minimum(below[-1], tuned.gaps[-1].double().cpu())
    joined = torch.hypot(rho[:-1], rho[1:]) > APART * below[:-1]
    groups = torch.cat([torch.zeros(1, dtype=torch.long), (~joined).long().cumsum(0)])
    errors = torch.ones(k, dtype=torch.float64)
    for g in range(int(groups[-1]) + 1):
        member = (groups == g).nonzero().flatten()
        first, end = int(member[0]), int(member[-1])
        above = float(below[first - 1] - rho[first - 1]) if first else float("inf")
        gap = min(above, float(below[end] - (rho[end + 1] if end + 1 < k else 0.0)))
        if gap > 0:
            errors[member] = min(float(torch.linalg.vector_norm(rho[member])) / gap, 1.0)
    return groups, errors


def find_spaces(ritz: Ritz, rounding: Rounding) -> list[Space]:
    """Where the leading Ritz values leave a gap that their residuals do not fill."""
    pairs = min(len(ritz.left), len(ritz.right))
    s = ritz.sigma[:pairs]
    rho = (ritz.residuals + 2 * rounding.of_vectors(pairs)) * (1 + rounding.defect)
    # a Ritz value is at most the true one, which lies within the residual above, or within that of
    # one further down that has not found its place
    highest = (s + rho).flip(0).cummax(0).values.flip(0)
    reach = torch.cat([highest[1:], rho.new_zeros(1)])
    middle = ((s.square() + torch.cat([s[1:], s.new_zeros(1)]).square()) / 2).sqrt()
    cuts = torch.maximum(reach, middle)
    spaces: list[Space] = []
    first, above = 0, float("inf")
    for i in range(pairs if len(ritz.lacking) == 0 else pairs - 1):
        cut, end = float(cuts[i]), i + 1
        total = _sine(s[:end], rho[:end], cut, float("inf"))
        if total > CLOSE:
            continue
        inside = _sine(s[first:end], rho[first:end], cut, above)
        spaces.append(Space(first, end, cut, above, inside, total))
        first, above = end, cut
    return spaces


def _sine(s: Tensor, rho: Tensor, low: float, high: float) -> float:
    """Bound on the sine between Ritz vectors and all u whose σ is in ``(low, high]``."""
    # For any triplet σ⟨u, û⟩ = s⟨v, v̂⟩ and σ⟨v, v̂⟩ = s⟨u, û⟩ + ⟨u, r⟩ to rounding, so that
    # ⟨u, û⟩ = s⟨u, r⟩ / (σ² − s²): summed over the u outside, and over the û.
    if low >= float(s[-1]) or high <= float(s[0]):
        return float("inf")
    beneath = s / (s.square() - low**2)
    beyond = high / (high**2 - s.square()) if high < float("inf") else torch.zeros_like(s)
    return float(torch.linalg.vector_norm(rho * torch.maximum(beneath, beyond)))


def guess_spectrum(
    ritz: Ritz, known: int, shape: tuple[int, int], k: int, start: int, frobenius: float
) -> Tensor:
    """All singular values: the ``known`` first, the others where Gauss quadrature puts them."""
    # The Ritz vectors' components on the start block are the weights of a quadrature of its
    # spectral measure: the k directions count for themselves, the random ones for all that is left.
    m, p = shape[0], min(shape)
    share = (m - k) / (start - k) if start > k else 0.0
    weight = torch.full((start,), share, dtype=torch.float64)
    weight[:k] = 1.0
    counts = weight @ ritz.left[:start].square()
    sigma, counts = ritz.sigma[known : len(counts)].numpy(), counts[known:].numpy()
    if p == known or counts.sum() == 0:
        return ritz.sigma[:p]
    counts = counts * ((m - known) / counts.sum())
    above = numpy.cumsum(counts) - counts / 2
    if len(sigma) > 1:  # half a node further at either end
        ends = 1.5 * sigma[[0, -1]] - 0.5 * sigma[[1, -2]]
        sigma = numpy.concatenate([ends[:1], sigma, ends[1:].clip(0.0)])
        above = numpy.concatenate([[0.0], above, [m - known]])
    rest = torch.from_numpy(numpy.interp(numpy.arange(p - known) + 0.5, above, sigma))
    # the sum of the squares is known
    left = frobenius**2 - float(ritz.sigma[:known].square().sum())
    rest *= (max(left, 0.0) / max(float(rest.square().sum()), TINY)) ** 0.5
    return torch.cat([ritz.sigma[:known], rest.clamp_max(float(ritz.sigma[max(known - 1, 0)]))])
