"""What is known of the inputs of the matrices of a plan, or why it cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._precision import exact
from bulkedge.checkpoint import Checkpoint
from bulkedge.checkpoint.model import is_input, is_output, ties
from bulkedge.comparison import Comparison, Plan, by_weight, check_inputs, find_inputs
from bulkedge.moments import Layer, Moment, Moments, diagonal, width

from .measured_on import ran_with
from .solve import moved

NEITHER = (
    "the task moments are of another model, neither the base nor this fine-tune; measure this one, "
    "with `bulkedge moments BASE TEXTS --tuned TUNED`"
)


@dataclass(frozen=True)
class Inputs:
    """The moments of the inputs of one matrix.

    Attributes:
        base: ``C_b``, and how many inputs it is of.
        task: ``C_t`` likewise; None where none was measured.
        output: ``tr(W0 C_b W0ᵀ)`` where it was computed when the model ran; else None.
    """

    base: Layer
    task: Layer | None
    output: float | None = None

    @property
    def moments(self) -> tuple[Moment, Moment | None]:
        """Both moments alone."""
        return self.base.moment, None if self.task is None else self.task.moment

    @property
    def curvatures(self) -> tuple[Moment | None, Moment | None]:
        """``G_b`` and ``G_t`` of the layer's outputs, where they were collected."""
        return self.base.curvature, None if self.task is None else self.task.curvature

    @property
    def rows(self) -> bool:
        """Whether they are those of an embedding: indices of the rows of the weight as stored."""
        return isinstance(self.base.moment, Tensor) and self.base.moment.ndim == 1

    def same(self, other: Inputs) -> bool:
        """Whether they are the moments of the same inputs."""
        pairs = zip(self.moments, other.moments, strict=True)
        return all(one is two or _equal(one, two) for one, two in pairs)

    def doubt(self, *, outputs: bool = False) -> str | None:
        """What to know of moments of few inputs; None of enough.

        Args:
            outputs: Whether to ask of curvatures of few gradients, too.

        Returns:
            The first of these.
        """
        for what, layer in self._each() if outputs else ():
            m = 0 if layer.curvature is None else width(layer.curvature)
            if layer.gradients < m:
                return (
                    f"the {what} curvatures have {layer.gradients} gradients for a width of {m}: "
                    "the ridge decides in the remaining directions; measure more texts"
                )
        for what, layer in self._each():
            n = width(layer.moment)
            if not self.rows and layer.count < n:
                return (
                    f"the {what} moments have {layer.count} inputs for a width of {n}: the ridge "
                    "decides in the remaining directions; measure more texts"
                )
        return None

    def check_rank(self, rank: int) -> None:
        """Raise if they are of fewer inputs than an update has ranks.

        Args:
            rank: Of the update.

        Raises:
            InputError: If so.
        """
        for what, layer in self._each():
            if layer.count < rank:
                raise InputError(
                    f"the {what} moments have {layer.count} inputs, fewer than the rank {rank} "
                    "that the update may have; measure more texts"
                )

    def _each(self) -> list[tuple[str, Layer]]:
        found = [("base", self.base)]
        return found if self.task is None else [*found, ("task", self.task)]


class Known:
    """The moments of a model by the names of a plan's matrices.

    Args:
        plan: What the base is.
        base: Moments of the base.
        task: Moments of the fine-tune; None without.

    Raises:
        InputError: If no layer of either is one of the base's.
    """

    def __init__(self, plan: Plan, base: Moments, task: Moments | None) -> None:
        self._base = _Measured("base", base, plan)
        self._task = None if task is None else _Measured("task", task, plan)
        # a fine-tune that stores the output layer apart from the embedding has untied them
        self._apart = {c.base.info.name for c in plan.comparisons if c.base.alias is not None}
        self._tied = _tied(self._base, plan)
        self._found: dict[str, Inputs | str] = {}

    def of(self, comparison: Comparison) -> Inputs:
        """The moments of one matrix's inputs.

        Args:
            comparison: The matrix.

        Returns:
            The moments.

        Raises:
            InputError: If they are not known, not of this model, or of too few inputs.
        """
        name = comparison.base.name
        if name not in self._found:
            try:
                self._found[name] = self._look_up(comparison)
            except InputError as error:
                self._found[name] = str(error)
        found = self._found[name]
        if isinstance(found, str):
            raise InputError(found)
        return found

    def exchange(self, parts: Sequence[Comparison]) -> float:
        """``tr(W0 C_t W0ᵀ) / tr(W0 C_b W0ᵀ)``, both moments with mean diagonal 1.

        Cost: one product ``W0 C_t``.

        Args:
            parts: Matrices whose updates have their factor on the input side in common, or one.

        Returns:
            The ratio; 1 where one of them is zero.
        """
        base = task = 0.0
        for comparison in {part.base.info.name: part for part in parts}.values():
            found = self.of(comparison)
            W0 = replace(comparison.base, rows=None).read()
            W0 = exact(W0.mT if found.rows else W0)
            base += found.base.output / _mean_square(found.base)
            if found.task is None:
                task += float(W0.square().sum())
            else:
                task += moved(W0, found.task.moment) / _mean_square(found.task)
        return task / base if base > 0 and task > 0 else 1.0

    def scales(self, comparison: Comparison) -> float:
        """The mean square of the base's inputs over that of the task's; 1 without a task's.

        Args:
            comparison: A matrix.

        Returns:
            What undoes the scaling of both moments to mean diagonal 1.
        """
        found = self.of(comparison)
        if found.task is None:
            return 1.0
        return _mean_square(found.base) / _mean_square(found.task)

    def _look_up(self, comparison: Comparison) -> Inputs:
        task = None if self._task is None else self._task.of(comparison)[0]
        base, same = self._base.of(comparison)
        whole = same and comparison.base.rows is None
        found = Inputs(base, task, base.output if whole else None)
        name = comparison.base.info.name
        tied = self._tied.get(name)
        if tied and comparison.factors is None and name not in self._apart:
            raise InputError(
                f"{' and '.join(tied)} share this tensor and have different inputs; it is left as "
                "it is"
            )
        if comparison.factors is None and not found.rows:
            found.check_rank(min(replace(comparison.base, rows=None).acts_as))
        elif comparison.factors is not None and comparison.factors.rank is not None:
            found.check_rank(comparison.factors.rank)
        return found


class _Measured:
    """The moments of the base, or of the task, by the names of the base's tensors."""

    def __init__(self, what: str, moments: Moments, plan: Plan) -> None:
        self.what = what
        self.known, self.rest = by_weight(moments.layers, plan, tuned=what == "task")

    def of(self, comparison: Comparison) -> tuple[Layer, bool]:
        """The moments of one layer, and whether its weight was the very one that was run."""
        matrix = replace(comparison.base, rows=None)
        layer = find_inputs(self.known, matrix, self.what, self.rest)
        try:
            return layer, check_inputs(layer, matrix, self.what, matrix.read())
        except InputError:
            if self.what != "task":
                raise
        # measured in one's own loop, on a model that was loaded with the weights of the fine-tune
        if not ran_with(layer, comparison):
            raise InputError(NEITHER)
        return layer, False


def _tied(measured: _Measured, plan: Plan) -> dict[str, list[str]]:
    """Layers that share a tensor and not their inputs, by the name of the tensor."""
    # equal numbers alone do not make two layers one: those of a copy, or of one start, are two
    groups: dict[bytes, list[tuple[str, Layer]]] = {}
    for name, layer in (*measured.known.items(), *measured.rest.items()):
        if bool((layer.sample != layer.sample[0]).any()):  # weights that are all zero show nothing
            groups.setdefault(_bytes(layer), []).append((name, layer))
    found = {}
    for group in groups.values():
        for name, layer in group:
            others = [
                other
                for other, its in group
                if its.moment is not layer.moment and _one_tensor(name, other, measured, plan)
            ]
            if name in measured.known and others:
                found[name] = [x.removesuffix(".weight") for x in (name, *others)]
    return found


def _one_tensor(name: str, other: str, measured: _Measured, plan: Plan) -> bool:
    """Whether two layers of equal weights are one tensor of the fine-tune."""
    if other not in measured.known:  # no tensor of the base's: it runs with that of the first
        return True
    config = (isinstance(plan.tuned, Checkpoint) and plan.tuned.config) or plan.base.config
    ends = (is_input(name) and is_output(other)) or (is_output(name) and is_input(other))
    if ends and ties(config):
        return True
    stored = {c.base.info.name: c.tuned.info.name for c in plan.comparisons if c.tuned is not None}
    return name in stored and stored.get(name) == stored.get(other)


def _mean_square(layer: Layer) -> float:
    """The mean of the diagonal of a moment; 1 of zeros, which are refused where they are used."""
    return float(exact(diagonal(layer.moment)).mean()) or 1.0


def _bytes(layer: Layer) -> bytes:
    return layer.sample.numpy().tobytes()


def _equal(one: Moment | None, other: Moment | None) -> bool:
    """Whether two plain moments are the same numbers; of sketches only themselves."""
    return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
