"""The drift of one matrix: how far its update moves the outputs on the base's inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._precision import exact
from bulkedge.checkpoint import StoredMatrix, read_tensor
from bulkedge.comparison import Comparison, Pair, check_inputs
from bulkedge.comparison.drift import Parts, change_along, change_of, of_indices, parts_of
from bulkedge.moments import Layer, StoredLayer, output_power
from bulkedge.records import Recipe
from bulkedge.records.rows import DriftPart
from bulkedge.triplet import SingularTriplets

ZERO = "the base's outputs are zero on the inputs of the moments: run it on other texts"


@dataclass(frozen=True)
class Drift:
    """The drift of one matrix.

    Attributes:
        change: ``tr(ΔW C ΔWᵀ)``.
        power: ``tr(W0 C W0ᵀ)``.
        parts: Of the directions of the update that carry most of it.
        side: That of the outputs: right of an embedding, left of every other weight.
        along: The part along each leading tuned direction of that side, over ``power``.
        inputs: How many inputs the moments are of; None of an embedding, whose shares need not be
            many.
        of_bias: ``‖δb‖``, of the change of the layer's bias; None where it has none.
    """

    change: float
    power: float
    parts: list[DriftPart]
    side: Literal["left", "right"]
    along: list[float]
    inputs: int | None
    of_bias: float | None = None

    @property
    def fields(self) -> dict[str, object]:
        """What a row says of it."""
        return {
            "drift": self.change / self.power,
            "drift_inputs": self.inputs,
            "output_change": self.change,
            "output_power": self.power,
            "drift_parts": self.parts,
            "drift_bound": None if self.of_bias is None else self.bound,
        }

    @property
    def bound(self) -> float:
        """The most that ``E‖ΔW x + δb‖² / E‖W0 x‖²`` can be, by Minkowski's inequality."""
        return max((self.change**0.5 + (self.of_bias or 0.0)) ** 2, self.change) / self.power


def drift_of(
    comparison: Comparison,
    stored: StoredLayer,
    pair: Pair,
    tuned: SingularTriplets,
    recipe: Recipe,
) -> Drift:
    """The drift of a changed matrix on the inputs of its moments, and what carries it.

    Cost: of a low-rank update thin products; of a dense one ``m n²``.  The power of the base's
    outputs is stored with the moments; that of a part of a weight is computed here, ``m n²``.

    Args:
        comparison: What is compared, and the bias of its layer where that has changed.
        stored: The moments of its inputs.
        pair: The tensors of both.
        tuned: The leading triplets of the tuned matrix.
        recipe: How many parts are reported.

    Returns:
        The drift.

    Raises:
        InputError: If the moments are of another model, or leave the base's outputs zero.
        CheckpointError: If the moments cannot be read.
    """
    layer, power = _inputs(stored, comparison.base, pair)
    outputs_right = of_indices(layer.moment)
    found = parts_of(pair, layer.moment, recipe.top_k, recipe.seed)
    along = change_along(pair, layer.moment, tuned.v if outputs_right else tuned.u)
    change = 0.0 if found.whole else change_of(pair, layer.moment)
    # moments are stored in single precision: a part that should be zero may be above it
    change = max(change, float(found.change.sum()), float(along.sum()))
    parts = _strongest(found, recipe.top_k, power)
    side = "right" if outputs_right else "left"
    inputs = None if outputs_right else layer.count
    of_bias = change_of_bias(comparison)
    return Drift(change, power, parts, side, (along / power).tolist(), inputs, of_bias)


def drift_of_bias(comparison: Comparison, stored: StoredLayer, pair: Pair) -> dict[str, object]:
    """What a row says of a layer of which the bias alone has changed.

    Args:
        comparison: What is compared, with the bias.
        stored: The moments of its inputs.
        pair: The tensors of both.

    Returns:
        A drift of 0 of the matrix, and the bound of the layer's.

    Raises:
        InputError: If the moments are of another model, or leave the base's outputs zero.
        CheckpointError: If the moments cannot be read.
    """
    _, power = _inputs(stored, comparison.base, pair)
    moved = Drift(0.0, power, [], "left", [], None, change_of_bias(comparison))
    return {"drift": 0.0, "drift_bound": moved.bound}


def change_of_bias(comparison: Comparison) -> float | None:
    """``‖δb‖`` of the outputs that a matrix has; None where their bias has not changed.

    Args:
        comparison: What is compared.

    Returns:
        The norm; None of a bias that is not finite, too, which counts as lost.
    """
    bias = comparison.bias
    if bias is None or bias.base is None:
        return None
    change = exact(read_tensor(bias.tuned)) - exact(read_tensor(bias.base))
    norm = float(change[slice(*(comparison.base.rows or (None,)))].norm())
    return norm if math.isfinite(norm) else None


def _inputs(stored: StoredLayer, base: StoredMatrix, pair: Pair) -> tuple[Layer, float]:
    """The moments of a matrix, checked, and the mean square of the base's outputs."""
    layer = stored.read()
    same = check_inputs(layer, base, "base", pair.base)
    power = layer.output if same and base.rows is None else output_power(pair.base, layer.moment)
    if not power:
        raise InputError(ZERO)
    return layer, power


def _strongest(found: Parts, most: int, power: float) -> list[DriftPart]:
    """The parts that are largest."""
    shares: Tensor = found.change / power
    order = shares.argsort(descending=True, stable=True)[:most].tolist()
    return [DriftPart(index=i, sigma=float(found.sigma[i]), drift=float(shares[i])) for i in order]
