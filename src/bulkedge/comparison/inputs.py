"""Which moments belong to which matrix of a base: by name and shape, then by the weight itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from bulkedge._errors import InputError
from bulkedge.checkpoint import StoredMatrix, read_tensor
from bulkedge.checkpoint.header import TensorInfo
from bulkedge.checkpoint.of_base import OfBase
from bulkedge.moments import (
    Layer,
    StoredLayer,
    alike,
    is_of_tuned,
    match_weights,
    sample,
    stored_layers,
    width,
)

from .comparison import Comparison, Vector
from .drift import of_indices
from .plan import Plan

EXPERTS = "experts: the tokens of each are not measured separately"
UNSEEN = "no inputs of this layer in the {} moments: it did not run"
OTHER_MODEL = "the {} moments are of another model; measure this one"
OTHER_WIDTH = "the {} moments have another width than this layer"
Known = TypeVar("Known", Layer, StoredLayer)


def by_weight(
    layers: Mapping[str, Known], plan: Plan, *, tuned: bool = False
) -> tuple[dict[str, Known], dict[str, Known]]:
    """What is known about the inputs of each weight of a base.

    Args:
        layers: Of a model, whose paths may have a prefix more or less than the base's weights.
        plan: The plan with the base.
        tuned: Whether they may have run with the weights of the plan's fine-tune.

    Returns:
        The layers by the names of the base's tensors; and those that are no tensor of the base, by
        their paths.

    Raises:
        InputError: If no layer is one of the base's, or several are one.
    """
    widths = {path: _extent(layer)[0] for path, layer in layers.items()}
    own = {c.base.info: c.tuned.info for c in plan.comparisons if tuned and c.tuned is not None}

    def samples_in(info: TensorInfo) -> list[Tensor]:
        found = [info, *([own[info]] if info in own else [])]
        return [sample(read_tensor(one)) for one in found]

    try:
        names = match_weights(
            widths, plan.base.tensors, lambda path: _sample(layers[path]), samples_in
        )
    except InputError as error:
        raise InputError(f"{plan.base.path}: {error}") from None
    known = {plan.base.tensors[name].name: layers[path] for name, path in names.items()}
    return known, {path: layers[path] for path in layers.keys() - set(names.values())}


def with_moments(plan: Plan, path: str | os.PathLike[str]) -> Plan:
    """A plan whose comparisons know where the moments of their inputs lie.

    Args:
        plan: What is compared.
        path: A file of moments of the base; only its header is read.

    Returns:
        The plan.  A comparison whose inputs are not known says why.  Vectors, such as biases, are
        read: one that differs from the base's is marked changed, and bounded if it is the bias of a
        layer with known inputs.  Its comparison then has it.

    Raises:
        CheckpointError: If the file is none, or damaged.
        InputError: If no layer is one of the base's, or several are one.
    """
    file = Path(path)
    if is_of_tuned(file):
        raise InputError(
            f"{file}: moments of a fine-tune's inputs; drift is on the base's: measure the base, "
            "without --tuned"
        )
    known, rest = by_weight(stored_layers(file), plan)
    changed = [vector for vector in plan.vectors if _differs(vector)]
    biases = {_weight_of(vector.name): vector for vector in changed if vector.base is not None}
    found = []
    for comparison in plan.comparisons:
        try:
            inputs = find_inputs(known, comparison.base, "base", rest)
        except InputError as error:
            inputs = str(error)
        inputs = _scaled_bias(comparison, plan) or inputs
        comparison = replace(comparison, inputs=inputs)
        bias = biases.get(comparison.base.codec.name)
        found.append(replace(comparison, bias=bias if _has(comparison, bias) else None))
    names = {vector.tuned.name for vector in changed}
    bounded = {comparison.bias.tuned.name for comparison in found if comparison.bias is not None}
    skipped = tuple(
        row.model_copy(update={"changed": row.name in names, "bounded": row.name in bounded})
        if row.side == "tuned"
        else row
        for row in plan.skipped
    )
    return replace(plan, comparisons=tuple(found), skipped=skipped, moments=file)


def _weight_of(bias: str) -> str | None:
    """The name of the weight that a bias belongs to; None of a vector that is called otherwise."""
    return f"{bias.removesuffix('bias')}weight" if bias.endswith("bias") else None


def _has(comparison: Comparison, bias: Vector | None) -> bool:
    """Whether a bias is that of the layer whose inputs are known: a number for each output."""
    matrix = comparison.base
    if bias is None or matrix.alias is not None or not isinstance(comparison.inputs, StoredLayer):
        return False
    outputs, _ = replace(matrix, rows=None).acts_as
    return bias.tuned.shape == (outputs,) and not comparison.inputs.of_indices


def _scaled_bias(comparison: Comparison, plan: Plan) -> str | None:
    """Why the drift of a layer is not known: its bias is scaled, too; None of any other."""
    update, name = comparison.factors, comparison.base.codec.name
    if not isinstance(update, OfBase) or update.scaled_outputs is None:
        return None
    bias = f"{name.removesuffix('weight')}bias"
    return f"{bias} is also scaled, which drift leaves out" if bias in plan.base.tensors else None


def _differs(vector: Vector) -> bool:
    """Whether a vector is not that of the base, rounded to the dtype of the tuned file."""
    found = read_tensor(vector.tuned)
    if vector.base is None:  # it is added to the model
        return bool(found.any())
    before = read_tensor(vector.base)
    return before.shape != found.shape or bool((before.to(found.dtype) != found).any())


def find_inputs(
    known: Mapping[str, Known],
    matrix: StoredMatrix,
    what: str,
    rest: Mapping[str, Known] | None = None,
) -> Known:
    """What is known about the inputs of a matrix, by names and shapes alone.

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


def _sample(known: Layer | StoredLayer) -> Tensor:
    """The entries of its weight that are kept to recognise it by."""
    return known.sample() if isinstance(known, StoredLayer) else known.sample
