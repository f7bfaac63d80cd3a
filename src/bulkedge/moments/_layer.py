"""What is known of the inputs of one layer, and how its weight is recognised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._precision import exact

from ._sketch import Moment

SAMPLE = 64
"""Number of entries of each weight that are kept to distinguish models."""
ALIKE = 0.9
"""Cosine of two samples from which on they are of one model, fine-tuned or not."""


@dataclass(frozen=True)
class Layer:
    """What is known about the inputs of one layer.

    Attributes:
        moment: ``E[x xᵀ]``, shape ``(n, n)``; of an embedding the share of each index, ``(n,)``;
            or a :class:`Sketch`.
        count: Number of inputs.
        sample: Some entries of the layer's weight, to recognise the model by.
        output: ``tr(W C Wᵀ) = E‖W x‖²`` for the weight W that was run: of a layer that an adapter
            wraps the layer's own.  Of an embedding ``Σ pᵢ ‖Wᵢ‖²``.
        curvature: ``G = E[g gᵀ]``, g the gradient of a loss by the layer's outputs, shape
            ``(m, m)`` or a :class:`Sketch`; None where no gradients were collected.
        gradients: Number of gradients.
        tuned_sample: The same entries of the fine-tune's weight, to recognise it by; None of a
            base, and where it is not known.
    """

    moment: Moment
    count: int
    sample: Tensor
    output: float
    curvature: Moment | None = None
    gradients: int = 0
    tuned_sample: Tensor | None = None


def sample_places(size: int) -> range:
    """Which entries of a flattened weight :func:`sample` takes.

    Args:
        size: How many entries it has.

    Returns:
        Their positions.

    Example:
        >>> list(sample_places(3))
        [0, 1, 2]
    """
    return range(0, size, max(1, size // SAMPLE))[:SAMPLE]


def sample(weight: Tensor) -> Tensor:
    """Some entries of a weight, spread over it, to recognise it by.

    Args:
        weight: As the model, or its file, stores it.

    Returns:
        At most 64 entries, float32.
    """
    flat = weight.detach().reshape(-1)
    places = sample_places(len(flat))
    return (
        flat[places.start : places.stop : places.step]
        .float()
        .cpu()
        .clone(memory_format=torch.contiguous_format)
    )


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two samples are of one weight, before or after some training."""
    if one.shape != other.shape or torch.equal(one, other):
        return one.shape == other.shape
    return float(torch.nn.functional.cosine_similarity(exact(one), exact(other), dim=0)) > ALIKE
