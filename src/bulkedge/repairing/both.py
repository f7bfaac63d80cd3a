"""Which layers of a fine-tune are protected on both sides, and how."""

from __future__ import annotations

import torch

from bulkedge.comparison import Comparison
from bulkedge.moments import Moment, Moments, Sketch, diagonal, width

from .curve import Basis
from .inputs import Inputs
from .sides import Sides
from .solve import Pairs


class Both:
    """The layers of a model in the bases in which inputs and outputs of both texts are diagonal.

    Both losses are counted in units in which the mean of their curvatures over the layers is 1.

    Args:
        base: Moments of the base.
        task: Of the fine-tune.
        ridge: Of all four matrices.
        device: Where to compute.
    """

    def __init__(self, base: Moments, task: Moments, ridge: float, device: torch.device) -> None:
        self._unit = _mean_curvature(task) / _mean_curvature(base)
        self._inputs = Pairs(Basis.of, device, ridge)
        self._outputs = Pairs(Basis.of, device, ridge)

    def layer(self, inputs: Inputs, *, alone: bool) -> Sides:
        """One layer.

        Args:
            inputs: Its moments, of which :func:`why_one_sided` has nothing to say.
            alone: Whether each layer counts for itself, whatever its scales.

        Returns:
            The layer; at a strength λ its losses count ``λ · unit``.

        Raises:
            InputError: If a moment is zero or not positive.
            TypeError: If one of them is not known.
        """
        (C_b, C_t), (G_b, G_t) = inputs.moments, inputs.curvatures
        if C_t is None or G_b is None or G_t is None:
            raise TypeError("expected moments and curvatures of both texts")
        unit = _mean(C_b) * _mean(G_b) / (_mean(C_t) * _mean(G_t)) * self._unit
        return Sides(self._inputs(C_b, C_t), self._outputs(G_b, G_t), 1.0 if alone else unit)


def why_one_sided(comparison: Comparison, inputs: Inputs, sharing: int) -> str | None:
    """Why a matrix is protected by its inputs alone; None if its outputs count, too.

    Args:
        comparison: The matrix.
        inputs: Its moments.
        sharing: Number of matrices that have the factor on the input side in common.

    Returns:
        The reason.
    """
    if inputs.task is None or any(G is None for G in inputs.curvatures):
        why = "no curvatures of its outputs were collected"
    elif any(isinstance(x, Sketch) for x in (*inputs.moments, *inputs.curvatures)):
        why = "two sides do not work with sketches"  # it would take matrices, and 15 n³
    elif sharing > 1 or comparison.base.rows is not None:
        why = "its outputs are those of several matrices"
    elif any(width(G) != comparison.base.acts_as[0] for G in inputs.curvatures if G is not None):
        why = "the curvatures are of another number of outputs"
    else:
        return None
    return f"protected by its inputs alone: {why}"


def has_curvatures(moments: Moments | None) -> bool:
    """Whether any layer of moments has curvatures.

    Args:
        moments: Of either text, or none.

    Returns:
        Whether one has.
    """
    layers = {} if moments is None else moments.layers
    return any(layer.curvature is not None for layer in layers.values())


def _mean_curvature(moments: Moments) -> float:
    """The mean over all layers that have one."""
    known = [x.curvature for x in moments.layers.values() if x.curvature is not None]
    return sum(map(_mean, known)) / len(known)


def _mean(moment: Moment) -> float:
    return float(diagonal(moment).mean())
