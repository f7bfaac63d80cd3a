"""The matrices of a fine-tune that are to be treated, and what came of each."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Literal

from bulkedge._errors import InputError
from bulkedge._globs import matches
from bulkedge._precision import one_thread
from bulkedge.checkpoint import Adapter
from bulkedge.comparison import Comparison, Plan
from bulkedge.records import Matrix, Recipe, Record

from .corrected import rounding
from .layers import Layer, Part, Stored, grouped
from .matrix import Selection, norm_of_change, norm_of_update, treat
from .method import METHODS, Method
from .output import Output, key_of
from .record import RepairedMatrix, Treated


@dataclass
class Row:
    """One matrix that was to be treated, as far as its record is known."""

    comparison: Comparison
    counted: int
    status: Literal["repaired", "left", "refused"] = "refused"
    note: str | None = None
    rounds: int = 0
    treated: list[Treated] = field(default_factory=list)
    part: Part | None = None
    rank: int | None = None
    update_norm: float = 0.0
    change: float = 0.0
    energy: float = 0.0
    error: float = 0.0
    strength: float | None = None
    drift: float | None = None
    drift_after: float | None = None
    task_change: float | None = None

    def for_record(self, after: int | None) -> RepairedMatrix:
        """The row of the record.

        Args:
            after: How many directions the audit of the output would have treated.

        Returns:
            The row.
        """
        factors = self.comparison.factors
        rank, norm = (None if factors is None else factors.rank), self.update_norm or 1.0
        return RepairedMatrix(
            name=self.comparison.base.name,
            tuned_name=self.comparison.tuned_name,
            shape=self.comparison.base.acts_as,
            status=self.status,
            note=self.note,
            rounds=self.rounds,
            directions=self.treated,
            intruders_before=self.counted,
            intruders_after=after,
            rank_before=rank,
            rank_after=rank if self.rank is None else self.rank,
            update_norm=self.update_norm,
            change=self.change / norm,
            energy_removed=self.energy,
            loss=self.error / norm,
            strength=self.strength,
            drift_before=self.drift,
            drift_after=self.drift_after,
            task_change=self.task_change,
        )


@dataclass(frozen=True)
class Options:
    """What may be asked for beside a method.

    Attributes:
        selection: Which directions are treated.
        max_rank: The largest rank of a repaired update; None for any.
    """

    selection: Selection = field(default_factory=Selection)
    max_rank: int | None = None

    def refuse_beside(self, method: object) -> None:
        """Raise if anything is asked for beside a method that changes every update and no rank.

        Args:
            method: That method.

        Raises:
            InputError: If so.
        """
        if self != Options():
            raise InputError(
                f"expected no select, significance or max_rank with {type(method).__name__}, "
                "which changes every update and no rank; leave them out"
            )


class Work(ABC):
    """The matrices to be treated by a method of one kind.

    Args:
        plan: Both inputs.
        recipe: Of the audits.
        options: What is asked for beside the method.

    Attributes:
        rows: What came of each matrix.
        chosen: Names of the matrices that may be touched.
    """

    def __init__(self, plan: Plan, recipe: Recipe, options: Options) -> None:
        self.plan, self.recipe, self.options = plan, recipe, options
        self.rows: list[Row] = []
        self.chosen: set[str] = set()

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The method's name and settings, for the record."""

    @abstractmethod
    def _concerns(self, row: Matrix) -> bool:
        """Whether there is anything to do about a matrix that may be touched."""

    @abstractmethod
    def _treat(self, row: Row, output: Output | None) -> None:
        """Treat one matrix; its tensors are let go of at once, but for factors."""

    @abstractmethod
    def _store(self, output: Output | None) -> None:
        """Write what could not be written matrix by matrix."""

    def affected(self, before: Record, only: tuple[str, ...]) -> list[Row]:
        """What there is to treat.

        Args:
            before: The audit of the input.
            only: Globs over names of either side; empty for all.

        Returns:
            A row for each matrix, yet to be filled.
        """
        found = []
        for comparison, row in zip(self.plan.comparisons, before.matrices, strict=True):
            names = (comparison.base.name, comparison.base.info.name, comparison.tuned_name)
            if only and not matches(names, only):
                continue
            self.chosen.add(comparison.base.name)
            if self._concerns(row):
                found.append(Row(comparison, self.counted(row)))
        return found

    def counted(self, row: Matrix) -> int:
        """How many directions of a matrix have a verdict that is to be treated."""
        return sum(
            self.options.selection.by_verdict(direction.verdict) for direction in row.directions
        )

    def treat(
        self,
        todo: list[Row],
        output: Output | None,
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        """Treat each matrix, and write what is changed.

        Args:
            todo: From :meth:`affected`.
            output: The copy to be changed; nothing is written if None.
            progress: Called after each matrix.
        """
        for row in todo:
            row.note = why_not(row.comparison, self.plan.tuned)
            if row.note is None:
                self._treat(row, output)
            self.rows.append(row)
            if progress is not None:
                progress(row.comparison.base.name, len(self.rows), len(todo))
        self._store(output)


class Corrections(Work):
    """The matrices with intruders, corrected by a method.

    Args:
        plan: Both inputs.
        recipe: Of the audits.
        method: What to do.
        options: Which directions to treat, and the largest rank.

    Raises:
        InputError: If a rank is asked for of a checkpoint.
    """

    def __init__(self, plan: Plan, recipe: Recipe, method: Method, options: Options) -> None:
        super().__init__(plan, recipe, options)
        if options.max_rank is not None and not isinstance(plan.tuned, Adapter):
            raise InputError(
                "expected an adapter for max_rank, got a checkpoint, which has no ranks"
            )
        self.method = method

    @property
    def settings(self) -> dict[str, Any]:
        """See :attr:`Work.settings`."""
        names = {kind: name for name, kind in METHODS.items()}
        name = {"name": names.get(type(self.method), type(self.method).__name__)}
        if is_dataclass(self.method) and not isinstance(self.method, type):
            return name | asdict(self.method)
        return name | {"rounds": self.method.rounds}

    def _concerns(self, row: Matrix) -> bool:
        """See :meth:`Work._concerns`."""
        return self.counted(row) > 0

    def _treat(self, row: Row, output: Output | None) -> None:
        """See :meth:`Work._treat`."""
        comparison = row.comparison
        try:
            with one_thread():
                found = treat(comparison, self.method, self.options.selection, self.recipe)
        except InputError as error:
            row.note = str(error)
            return
        row.status, row.rounds, row.treated = "left", found.rounds, found.treated
        if not found.correction.changes:
            return
        row.status, row.update_norm = "repaired", norm_of_update(found.pair)
        row.change = norm_of_change(found.pair, found.correction)
        row.energy = 1 - (norm_of_update(found.after) / row.update_norm) ** 2
        update = None if comparison.factors is None else comparison.factors.correctable()
        if update is not None and not isinstance(update, str):
            meant = found.after if found.after.magnitude is not None else None
            row.part = Part(update, found.in_factors.cpu(), meant)
            return
        row.error = rounding(found.pair, found.after, found.correction)
        if output is not None and comparison.tuned is not None:
            output.write_matrix(comparison.tuned, found.after.dense_part.cpu())

    @property
    def _even(self) -> bool:
        """Whether PEFT loads the adapter with even ranks alone: it repeats the initialisation."""
        tuned = self.plan.tuned
        return isinstance(tuned, Adapter) and tuned.config.init_lora_weights == "orthogonal"

    def _store(self, output: Output | None) -> None:
        """Write the factors of all corrected layers."""
        owners = {id(row.part): row for row in self.rows if row.part is not None}
        layers: dict[str, tuple[Layer, Stored]] = {}
        for layer in grouped(row.part for row in owners.values() if row.part is not None):
            stored = layer.store(self.options.max_rank, even=self._even)
            mine = [owners[id(part)] for part in layer.parts]
            for row, error in zip(mine, stored.errors, strict=True):
                row.rank, row.error = stored.rank, error
            layers[key_of(mine[0].comparison.tuned_name, self.plan.tuned)] = layer, stored
        if output is not None and layers:
            output.write_factors(layers)


def covers(parts: Sequence[Comparison]) -> bool:
    """Whether matrices whose updates are parts of one stored product are all that it updates.

    A fused projection, or a stack of experts, has one pair of factors and one α for several
    matrices; those that a recipe excludes are not in a plan.

    Args:
        parts: Comparisons with the same factors.

    Returns:
        Whether no other matrix has them, too.
    """
    update = None if parts[0].factors is None else parts[0].factors.correctable()
    if update is None or isinstance(update, str):
        return True  # refused for a reason of its own
    whole = update.whole()
    known = sum(math.prod(part.factors.shape) for part in parts if part.factors is not None)
    return known >= math.prod(whole.shape) * max(1, whole.experts)


def why_not(comparison: Comparison, tuned: object) -> str | None:
    """Why a matrix cannot be written back, None if it can.

    Args:
        comparison: The matrix.
        tuned: The fine-tune that it belongs to.

    Returns:
        The reason.
    """
    update = comparison.factors
    ties = isinstance(tuned, Adapter) and tuned.config.ensure_weight_tying
    if ties and update is not None and update.embedding:
        return "ensure_weight_tying: the same update is stored once more for the output layer"
    return comparison.read_only
