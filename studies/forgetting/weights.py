"""What is to be told of weights: new directions, spikes over their thresholds, norms, drift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from material import settings
from torch import Tensor

import bulkedge
from bulkedge.intruder import COUNTED, DEFAULT_EPSILON, BaseVectors, base_vectors, scores, verdict
from bulkedge.rmt import BulkFit, fit_bulk

SPIKES = 1e-6
"""Singular values of an update below this part of the largest are rounding."""


@dataclass
class Layer:
    """A base matrix, what is known of it, and what the base is used on.

    Attributes:
        W0: In float64.
        C: The second moment of its inputs on the kept texts.
    """

    W0: Tensor
    C: Tensor

    @cached_property
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, σ and V of the base."""
        U, S, Vh = torch.linalg.svd(self.W0, full_matrices=False)
        return U, S, Vh.mT

    @cached_property
    def fit(self) -> BulkFit:
        """The bulk of the base."""
        return fit_bulk(self.svd[1], (self.W0.shape[0], self.W0.shape[1]))

    @cached_property
    def edge(self) -> float:
        """θ_c."""
        return float(self.fit.bulk.threshold)

    @cached_property
    def leading(self) -> float:
        """θ_k: the strength at which a generic spike is among the leading k."""
        value = float(self.svd[1][settings()["leading"] - 1])
        return max(self.edge, float(self.fit.bulk.strength(max(value, self.fit.edge))))

    @cached_property
    def output(self) -> float:
        """``tr(W0 C W0ᵀ)``."""
        return _moved(self.W0, self.C)

    @cached_property
    def vectors(self) -> BaseVectors:
        """The left singular vectors of the base, as far as they are determined."""
        return base_vectors(*self.svd[:2], tuple(self.W0.shape))

    def leading_of(self, D: Tensor) -> tuple[Tensor, Tensor]:
        """The leading values of W0 + D and their left vectors, by a Gram matrix in float64."""
        W, k = self.W0 + D, settings()["leading"]
        wide = W.shape[0] <= W.shape[1]
        squares, found = torch.linalg.eigh(W @ W.mT if wide else W.mT @ W)
        sigma, found = squares[-k:].flip(0).sqrt(), found[:, -k:].flip(1)
        return sigma, found if wide else (W @ found) / sigma

    def new_directions(self, U: Tensor) -> list[int]:
        """The places of those left vectors of a tuned matrix that an audit counts as new."""
        found = scores(U, self.vectors, 2 * settings()["leading"])
        pairs = zip(found.score.tolist(), found.subspace_overlap.tolist(), strict=True)
        return [i for i, of in enumerate(pairs) if _counts(*of)]

    def drift(self, D: Tensor) -> float:
        """``tr(D C Dᵀ)/tr(W0 C W0ᵀ)``."""
        return _moved(D, self.C) / self.output


def _moved(D: Tensor, C: Tensor) -> float:
    D, C = D.float(), C.float()
    return float((D @ C * D).sum())


def base_layers(weights: Mapping[str, Tensor], moments: bulkedge.Moments) -> dict[str, Layer]:
    """All layers of the base."""
    return {n: Layer(W.double(), torch.as_tensor(moments[n].moment)) for n, W in weights.items()}


def statistics(layers: Mapping[str, Layer], updates: Mapping[str, Tensor]) -> dict[str, Any]:
    """The statistics of the plan, over all matrices."""
    rows = [_matrix(layers[name], D) for name, D in updates.items()]
    total = {key: sum(row[key] for row in rows) for key in rows[0]}
    n = len(rows)
    found = {
        "count": total["count"],
        "energy": total["new_energy"] / total["leading_energy"],
        "excess": total["excess"],
        "frobenius": total["square"] ** 0.5,
        "spectral": total["spectral"] / n,
        "moved": total["moved"] / n,
        "drift": total["drift"] / n,
        "over_edge": max(row["over_edge"] for row in rows),
        "crossing": sum(row["excess"] > 0 for row in rows),
        "layers_with_new": sum(row["count"] > 0 for row in rows),
    }
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def _matrix(layer: Layer, D: Tensor) -> dict[str, float]:
    sigma, U = layer.leading_of(D)
    new, sigma = layer.new_directions(U), sigma.square()
    spikes = torch.linalg.eigvalsh(D.mT @ D if D.shape[0] >= D.shape[1] else D @ D.mT)
    spikes = spikes.clamp_min(0).sqrt()
    k = settings()["leading"]
    inside = layer.svd[0][:, :k].mT @ U
    return {
        "count": len(new),
        "new_energy": float(sigma[new].sum()),
        "leading_energy": float(sigma.sum()),
        "excess": float((spikes / layer.leading - 1).clamp_min(0).sum()),
        "square": float(D.square().sum()),
        "spectral": float(spikes.max()) / float(layer.svd[1][0]),
        "over_edge": float(spikes.max()) / layer.edge,
        "moved": 1 - float(inside.square().sum()) / k,
        "drift": layer.drift(D),
    }


def _counts(score: float, overlap: float) -> bool:
    return verdict(score, overlap, epsilon=DEFAULT_EPSILON) in COUNTED
