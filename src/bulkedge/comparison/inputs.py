"""Which moments belong to which matrix of a base: by name and shape, then by the weight itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from bulkedge._errors import InputError
from bulkedge.checkpoint import StoredMatrix
from bulkedge.moments import (
    Layer,
    Moments,
    StoredLayer,
    alike,
    match_weights,
    sample,
    stored_layers,
    width,
)

from .drift import of_indices
from .plan import Plan

EXPERTS = "experts: the tokens of each are not measured apart"
UNSEEN = "no inputs of this layer in the {} moments: it did not run"
OTHER_MODEL = "the {} moments are of another model; measure this one"
OTHER_WIDTH = "the {} moments have another width than this layer"
Known = TypeVar("Known", Layer, StoredLayer)


def names_of(moments: Moments, plan: Plan) -> dict[str, Layer]:
    """What is known of the inputs of each weight of a base.

    Args:
        moments: Of a model, whose layers may have a prefix more or less than the base's weights.
        plan: What the base is.

    Returns:
        The moments by the names of the base's tensors.

    Raises:
        InputError: If no layer is one of the base's, or several are one.
    """
    layers = moments.layers
    widths = {name: width(layer.moment) for name, layer in layers.items()}
    found = _matched(widths, lambda path: layers[path].sample, plan)
    return {name: layers[path] for name, path in found.items()}


def with_moments(plan: Plan, path: str | os.PathLike[str]) -> Plan:
    """A plan whose comparisons know where the moments of their inputs lie.

    Args:
        plan: What is compared.
        path: A file of moments of the base; only its header is read.

    Returns:
        The plan.  A comparison whose inputs are not known says why.

    Raises:
        CheckpointError: If the file is none, or damaged.
        InputError: If no layer is one of the base's, or several are one.
    """
    file = Path(path)
    layers = stored_layers(file)
    widths = {name: layer.width for name, layer in layers.items()}
    names = _matched(widths, lambda name: layers[name].sample(), plan)
    known = {name: layers[path] for name, path in names.items()}
    rest = {name: layer for name, layer in layers.items() if name not in names.values()}
    found = []
    for comparison in plan.comparisons:
        try:
            inputs = find_inputs(known, comparison.base, "base", rest)
        except InputError as error:
            inputs = str(error)
        found.append(replace(comparison, inputs=inputs))
    return replace(plan, comparisons=tuple(found), moments=file)


def find_inputs(
    known: Mapping[str, Known],
    matrix: StoredMatrix,
    what: str,
    rest: Mapping[str, Known] | None = None,
) -> Known:
    """What is known of the inputs of a matrix, by names and shapes alone.

    Args:
        known: By the names of the base's tensors.
        matrix: A matrix of the base.
        what: Whose moments they are, for a message.
        rest: Layers that are no tensor of the base, by their paths: an output layer whose weight
            is the embedding's is one of these.

    Returns:
        The moments of its layer.

    Raises:
        InputError: If there are none, or of another width.
    """
    if matrix.expert is not None:
        raise InputError(EXPERTS)
    found = known.get(matrix.info.name)
    if matrix.alias is not None:
        end = matrix.alias.rpartition(".")[2]
        ending = [layer for name, layer in (rest or {}).items() if name.rpartition(".")[2] == end]
        found = ending[0] if len(ending) == 1 else None
    if found is None:
        raise InputError(UNSEEN.format(what))
    rows, columns = replace(matrix, rows=None).acts_as
    size, indices = _extent(found)
    if size != (rows if indices else columns):
        raise InputError(OTHER_WIDTH.format(what))
    return found


def check_inputs(layer: Layer, matrix: StoredMatrix, what: str, weight: Tensor) -> bool:
    """Check that moments are of the model that a matrix belongs to.

    Args:
        layer: The moments.
        matrix: A matrix of the base.
        what: Whose moments they are, for a message.
        weight: The matrix as it was read.

    Returns:
        Whether the weight that was run is the same in each entry that was kept; else it is one
        before or after some training.

    Raises:
        InputError: If they are of another model.
    """
    if matrix.rows is not None:
        weight = replace(matrix, rows=None).read()
    own = sample(weight.mT if matrix.transposed else weight)
    if not alike(layer.sample, own):
        raise InputError(OTHER_MODEL.format(what))
    return bool((layer.sample == own).all())


def _extent(known: Layer | StoredLayer) -> tuple[int, bool]:
    """The width of inputs, and whether they are indices: those of an embedding."""
    if isinstance(known, StoredLayer):
        return known.width, known.of_indices
    return width(known.moment), of_indices(known.moment)


def _matched(
    widths: Mapping[str, int], sample_of: Callable[[str], Tensor], plan: Plan
) -> dict[str, str]:
    """The layer of each weight of a base, by the weight's name in its file."""
    try:
        found = match_weights(widths, plan.base.tensors, sample_of)
    except InputError as error:
        raise InputError(f"{plan.base.path}: {error}") from None
    return {plan.base.tensors[name].name: path for name, path in found.items()}
