"""All updates of a fine-tune, moved away from the inputs that the base is used on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._linmap import LowRank
from bulkedge._precision import one_thread
from bulkedge.checkpoint import Correctable, infer_rule
from bulkedge.comparison import Comparison, Pair, Plan, load
from bulkedge.moments import Layer as LayerMoments
from bulkedge.moments import Moments, Sketch, alike, sample, to_dense, width
from bulkedge.records import Matrix, Recipe

from .layers import Layer, Stored
from .matrix import Selection, norm_of_update
from .output import Output, module_of
from .protect import Protect, drift, protected
from .work import Row, Work

EXPERTS = "experts: the tokens of each are not measured apart; it is left as it is"
DORA = "DoRA: its magnitudes depend on all inputs; merge it into the model first"


class Protection(Work):
    """The updates of a fine-tune that are protected.

    Args:
        plan: Both inputs.
        recipe: Of the audits.
        method: The moments, and how strongly they count.
    """

    def __init__(self, plan: Plan, recipe: Recipe, method: Protect) -> None:
        super().__init__(plan, recipe, Selection())
        self.protect = method
        self._base = names_of(method.moments, plan)
        task = method.task_moments
        self._task = None if task is None else names_of(task, plan)
        self._layers: dict[str, tuple[Layer, Stored]] = {}
        self._sharing: dict[str, list[Comparison]] = {}  # by the first tensor of their factors
        for comparison in plan.comparisons:
            if comparison.factors is not None:
                first, *_ = comparison.factors.infos
                self._sharing.setdefault(first.name, []).append(comparison)

    @property
    def settings(self) -> dict[str, Any]:
        """See :attr:`Work.settings`."""
        task = self.protect.task_moments is not None
        return {"name": "protect", "strength": self.protect.strength, "task_moments": task}

    def _concerns(self, row: Matrix) -> bool:
        """See :meth:`Work._concerns`: every matrix that the fine-tune has changed."""
        return row.status == "audited"

    def _treat(self, row: Row, output: Output | None) -> None:
        """Protect one matrix."""
        if self.protect.strength == 0:
            row.status = "left"
            return
        try:
            with one_thread():
                self._protect(row, output)
        except InputError as error:
            row.note = str(error)

    def _protect(self, row: Row, output: Output | None) -> None:
        comparison = row.comparison
        base, task = self._moments(comparison)
        pair = load(comparison, torch.device(self.recipe.device))
        if pair.magnitude is not None:
            raise InputError(DORA)
        before = _update(pair)
        row.update_norm, row.drift = norm_of_update(pair), _drift(before, pair.base, base)
        update = None if comparison.factors is None else comparison.factors.correctable()
        if isinstance(update, str):
            raise InputError(update)
        if update is None or pair.replaced is not None:
            after, row.error = self._dense(pair, base, task)
            if output is not None and comparison.tuned is not None:
                output.write_matrix(comparison.tuned, after.start.cpu())
        else:
            after, row.error = self._factors(pair, comparison, update, base, task)
        now = _update(after)
        row.change = float(torch.linalg.vector_norm(now - before))
        row.energy = 1 - (norm_of_update(after) / row.update_norm) ** 2
        row.status, row.rounds, row.drift_after = "repaired", 1, _drift(now, pair.base, base)

    def _dense(self, pair: Pair, base: Tensor, task: Tensor | None) -> tuple[Pair, float]:
        """A full matrix with its difference protected, and what its dtype leaves out."""
        if pair.replaced is None or pair.factors is not None:
            raise InputError("expected a full matrix or factors, got both; merge them first")
        difference = pair.replaced.double() - pair.base.double()
        found = _on_inputs(difference, base, task, self.protect.strength)
        meant = pair.base.double() + found
        stored = meant.to(pair.replaced.dtype)
        return replace(pair, replaced=stored), float((stored.double() - meant).norm())

    def _factors(
        self,
        pair: Pair,
        comparison: Comparison,
        update: Correctable,
        base: Tensor,
        task: Tensor | None,
    ) -> tuple[Pair, float]:
        """The same of stored factors: the one on the input side alone is new."""
        if update.experts > 1:
            raise InputError(EXPERTS)
        for other in self._sharing[update.infos[0].name]:
            if other.base.name not in self.chosen:
                raise InputError(
                    f"shares its factor with {other.base.name}, which is not chosen; choose all"
                )
            if other is not comparison:
                self._moments(other)
        whole = update.whole()
        B, A, scale = whole.read()
        if base.ndim == 1:
            B = _on_inputs(B, base, task, self.protect.strength)
        else:
            A = _on_inputs(A, base, task, self.protect.strength)
        stored = whole.stored([(B, A)], None)
        if not all(bool(tensor.isfinite().all()) for tensor in stored.values()):
            raise InputError("the protected factor is beyond the numbers of its dtype; scale it")
        self._layers[module_of(comparison.tuned_name)] = (
            Layer(whole, []),
            Stored(stored, whole.rank, []),
        )
        rows = slice(None) if update.rows is None else slice(*update.rows)
        meant = LowRank(B[rows], A, scale).to_dense()
        B, A, _ = whole.rounded(B, A, None)
        held = LowRank(B[rows].double(), A.double(), scale)
        device = pair.base.device
        after = replace(pair, factors=LowRank(held.B.to(device), held.A.to(device), scale))
        return after, float((held.to_dense() - meant).norm())

    def _store(self, output: Output | None) -> None:
        """Write the factors of all layers."""
        if output is not None and self._layers:
            output.write_factors(self._layers)

    def _moments(self, comparison: Comparison) -> tuple[Tensor, Tensor | None]:
        """The moments of one layer's inputs, for the base and for the task."""
        if comparison.base.expert is not None:
            raise InputError(EXPERTS)
        name, columns = comparison.base.info.name, comparison.base.acts_as
        weight = replace(comparison.base, rows=None).read()
        stored = weight.mT if comparison.base.transposed else weight

        def found(known: Mapping[str, LayerMoments], what: Literal["base", "task"]) -> Tensor:
            layer = known.get(name)
            if layer is None:
                raise InputError(f"no inputs of this layer in the {what} moments: it did not run")
            if not alike(layer.sample, sample(stored)):
                raise InputError(f"the {what} moments are of another model; measure this one")
            moment = to_dense(layer.moment) if isinstance(layer.moment, Sketch) else layer.moment
            fits = moment.ndim == 1 or len(moment) == columns[1]
            if not fits or (moment.ndim == 1 and len(moment) != len(stored)):
                raise InputError(f"the {what} moments have another width than this layer")
            return moment.to(self.recipe.device)

        base = found(self._base, "base")
        return base, None if self._task is None else found(self._task, "task")


def names_of(moments: Moments, plan: Plan) -> dict[str, LayerMoments]:
    """What is known of the inputs of each weight of a base.

    Args:
        moments: Of a model, whose layers may have a prefix more or less than the base's weights.
        plan: What the base is.

    Returns:
        The moments by the names of the base's tensors.

    Raises:
        InputError: If no layer is one of the base's.
    """
    layers = {f"{name}.weight": layer for name, layer in moments.layers.items()}
    shapes = {name: info.shape for name, info in plan.base.tensors.items()}
    rule = infer_rule(layers, shapes, lambda name, shape: width(layers[name].moment) in shape)
    found = {rule.find(name): layer for name, layer in layers.items()}
    known = {name: layer for name, layer in found.items() if name is not None}
    if not known:
        first = next(iter(layers), "nothing")
        raise InputError(
            f"{plan.base.path}: none of its weights is in the moments, whose first is {first!r}; "
            "measure this model"
        )
    return {plan.base.tensors[name].name: layer for name, layer in known.items()}


def _on_inputs(update: Tensor, base: Tensor, task: Tensor | None, strength: float) -> Tensor:
    """An update, or its factor on the input side, protected; an embedding's inputs are its rows."""
    if base.ndim == 1:
        return protected(update.mT, base, task, strength).mT
    return protected(update, base, task, strength)


def _update(pair: Pair) -> Tensor:
    """``W − W0`` in float64; zeros without a difference."""
    update = pair.update_map()
    return torch.zeros_like(pair.base, dtype=torch.float64) if update is None else update.to_dense()


def _drift(update: Tensor, W0: Tensor, moment: Tensor) -> float | None:
    """The part of a layer's output on the base's inputs that an update changes; None of zeros."""
    if moment.ndim == 1:
        update, W0 = update.mT, W0.mT
    found = drift(update, W0, moment)
    return found if math.isfinite(found) else None
