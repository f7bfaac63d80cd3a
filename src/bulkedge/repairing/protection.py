"""All updates of a fine-tune, moved away from the inputs that the base is used on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bulkedge._errors import InputError, OutputError
from bulkedge._linmap import LowRank
from bulkedge._precision import exact, exact_device, one_thread
from bulkedge.checkpoint import Correctable
from bulkedge.comparison import EXPERTS, Comparison, Pair, Plan, load
from bulkedge.moments import Moments
from bulkedge.records import Matrix, Recipe, Record

from .both import Both, why_one_sided
from .curve import curve, response, strength_for
from .inputs import Inputs, Known
from .layers import Layer, Stored
from .measured_on import check_fine_tune
from .output import Output, key_of
from .protect import DEFAULT_STRENGTH, Protect
from .solve import Pairs, difference, moved, pair_of, solver
from .updates import (
    Update,
    base_of,
    drift_of,
    norm_of,
    on_columns,
    one_sided,
    power_of,
    task_change,
    update_of,
)
from .work import Options, Row, Work, covers, why_not

DORA = "DoRA: its magnitudes depend on all inputs; merge it into the model first"
BOTH = "expected a full matrix or factors, got both; merge them first"
UNTRAINED = "its base looks untrained: there is nothing to give back (--only '*' protects it too)"
BEYOND = "the protected numbers exceed the range of its dtype; scale the update down first"

Solution = Callable[[Update], Update]
"""``ΔW ↦ D'``, in the form in which it is given."""


@dataclass(frozen=True)
class Protected:
    """The protected factors ``(B, A)`` of a layer as ``(out, in)``, s divided out, in float64.

    Attributes:
        meant: As they were computed.
        held: As their dtype holds them.
    """

    meant: tuple[Tensor, Tensor]
    held: tuple[Tensor, Tensor]


class Protection(Work):
    """The updates of a fine-tune that are protected.

    Args:
        plan: Both inputs.
        recipe: Of the audits.
        method: The moments, and how strongly they count.
        options: What else was asked for.

    Raises:
        InputError: If the moments know no layer of the base, or the options are for others.
    """

    def __init__(self, plan: Plan, recipe: Recipe, method: Protect, options: Options) -> None:
        super().__init__(plan, recipe, options)
        options.refuse_beside(method)
        self.method = method
        self.strength = DEFAULT_STRENGTH if method.strength is None else method.strength
        self._known = Known(plan, method.moments, method.task_moments)
        device = exact_device(torch.device(recipe.device))
        self._solvers = Pairs(solver, device, method.ridge)
        self._responses = Pairs(response, device, method.ridge)
        self._both: Both | None = None
        self._done: dict[str, Protected] = {}  # by the first tensor of the factors
        self._layers: dict[str, tuple[Layer, Stored]] = {}
        self._aside: set[str] = set()  # names of matrices that stay as they are
        self._sharing: dict[str, list[Comparison]] = {}  # by the first tensor of the factors
        for comparison in plan.comparisons:
            if comparison.factors is not None:
                self._sharing.setdefault(_first(comparison), []).append(comparison)

    @property
    def settings(self) -> dict[str, Any]:
        """See :attr:`Work.settings`."""
        return {
            "name": "protect",
            "strength": self.strength,
            "target_drift": self.method.target_drift,
            "balance": self.method.balance,
            "task_moments": self.method.task_moments is not None,
            "ridge": self.method.ridge,
            "sides": self.method.sides,
            "rounds": self.method.rounds,
        }

    def _concerns(self, row: Matrix) -> bool:
        """See :meth:`Work._concerns`: every matrix that the fine-tune has changed."""
        return row.status == "audited"

    def affected(self, before: Record, only: tuple[str, ...]) -> list[Row]:
        """See :meth:`Work.affected`; remembers the matrices that have nothing to give back.

        Their bases look untrained.  There are none where all do, or where some were asked for.

        Args:
            before: The audit of the input.
            only: Globs over names of either side; empty for all.

        Returns:
            A row for each matrix, those included.
        """
        found = super().affected(before, only)
        noise = {row.name for row in before.matrices if row.looks_untrained}
        if only or all(row.comparison.base.name in noise for row in found):
            return found
        for comparison in (row.comparison for row in found):
            # one pair of factors is changed for all matrices that share it
            parts = self._sharing.get(_first(comparison), [comparison])
            if all(part.base.name in noise for part in parts):
                self._aside.add(comparison.base.name)
        return found

    def treat(
        self,
        todo: list[Row],
        output: Output | None,
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        """See :meth:`Work.treat`; the strength is found first, if a drift is asked for."""
        aside = [row for row in todo if row.comparison.base.name in self._aside]
        todo = [row for row in todo if row.comparison.base.name not in self._aside]
        if todo and self.strength:
            task = self._task(todo, output, progress)
            self._known = Known(self.plan, self.method.moments, task)
            if self.method.sides == "two" and task is not None:
                device = exact_device(torch.device(self.recipe.device))
                self._both = Both(self.method.moments, task, self.method.ridge, device)
        if self.method.target_drift is not None:
            with one_thread():
                self.strength = self._strength_for(self.method.target_drift, todo)
        super().treat(todo, output, progress)
        for row in aside:
            row.status, row.note = "left", UNTRAINED
        self.rows += aside

    def _task(
        self,
        todo: list[Row],
        output: Output | None,
        progress: Callable[[str, int, int], None] | None,
    ) -> Moments | None:
        """The task's moments of the last round: on what the round before has made."""
        recollect, method = self.method.recollect, replace(self.method, rounds=1)
        if recollect is None:
            return method.task_moments
        for _ in range(self.method.rounds - 1):
            trial = Protection(self.plan, self.recipe, method, self.options)
            trial.chosen = self.chosen
            with _round_folder(output) as folder:
                copy = Output.copy(self.plan.tuned, folder)
                trial.treat([Row(row.comparison, row.counted) for row in todo], copy, progress)
                task = recollect(copy.path)
            if not isinstance(task, Moments):
                raise InputError(f"expected recollect to return Moments, got {task!r:.60}")
            method = replace(method, task_moments=task)
        return method.task_moments

    def _strength_for(self, target: float, todo: list[Row]) -> float:
        """The strength that gives a mean drift; what is refused later is left out here."""
        found = []
        for row in todo:
            if why_not(row.comparison, self.plan.tuned) is None:
                with suppress(InputError):  # refused by name when its turn comes
                    found += self._curve(row.comparison)
        if not found:
            return self.strength
        return strength_for(target, *zip(*found, strict=True))

    def _curve(self, comparison: Comparison) -> list[tuple[Tensor, float, float]]:
        """The drift of a layer at every strength and before, and its factor; none without drift."""
        inputs, pair = self._read(comparison)
        update, power = update_of(pair, inputs), power_of(pair, inputs)
        if not power > 0 or norm_of(update) == 0:
            return []
        basis = self._responses(*inputs.moments)
        base, task = inputs.moments
        device = exact_device(pair.base.device)
        base, task = base.to(device), None if task is None else task.to(device)
        drifts = curve(update, *pair_of(base, task, self.method.ridge), basis, power)
        return [(drifts, moved(update, base) / power, self._exchange(comparison))]

    def _exchange(self, comparison: Comparison) -> float:
        """What the strength is multiplied with in a layer."""
        if self.method.balance == "layer":
            return 1.0
        if self.method.balance == "output":
            return self._known.scales(comparison)
        return self._known.exchange(self._sharing.get(_first(comparison), [comparison]))

    def _treat(self, row: Row, output: Output | None) -> None:
        """Protect one matrix."""
        if self.strength == 0:
            row.status = "left"
            return
        try:
            with one_thread():
                self._protect(row, output)
        except InputError as error:
            row.note = str(error)

    def _read(self, comparison: Comparison) -> tuple[Inputs, Pair]:
        """A matrix and the moments of its inputs, or why it cannot be protected."""
        inputs = self._known.of(comparison)
        pair = load(comparison, torch.device(self.recipe.device))
        if pair.magnitude is not None:
            raise InputError(DORA)
        if pair.replaced is not None and pair.factors is not None:
            raise InputError(BOTH)
        if comparison.factors is None:
            return inputs, pair
        if _correctable(comparison).experts > 1:
            raise InputError(EXPERTS)
        if not covers(self._sharing[_first(comparison)]):
            raise InputError("shares its factor with a matrix that is excluded; include all of it")
        for other in self._sharing[_first(comparison)]:
            if other.base.name not in self.chosen:
                raise InputError(
                    f"shares its factor with {other.base.name}, which is not chosen; choose all"
                )
            if other is not comparison and not self._known.of(other).same(inputs):
                raise InputError(
                    f"shares its factor with {other.base.name}, which has other inputs; measure "
                    "both on the same"
                )
        return inputs, pair

    def _protect(self, row: Row, output: Output | None) -> None:
        comparison = row.comparison
        inputs, pair = self._read(comparison)
        before, power = update_of(pair, inputs), power_of(pair, inputs)
        row.update_norm = norm_of(before)
        row.drift = drift_of(before, power, inputs)
        if row.update_norm == 0:
            row.status = "left"
            return
        unknown = self._check_fine_tune(comparison, inputs, pair)
        row.strength, solve, note = self._solution(comparison, inputs)
        if isinstance(before, LowRank):
            now, row.error = self._factors(comparison, inputs, solve)
        else:
            now, row.error = self._full(
                comparison, inputs, pair, cast("Tensor", solve(before)), output
            )
        changed = difference(now, before)
        row.change = norm_of(changed)
        row.energy = 1 - (norm_of(now) / row.update_norm) ** 2
        row.status, row.rounds = "repaired", self.method.rounds
        row.note = "; ".join(filter(None, (unknown, note))) or None
        row.drift_after = drift_of(now, power, inputs)
        row.task_change = task_change(changed, before, inputs)

    def _check_fine_tune(self, comparison: Comparison, inputs: Inputs, pair: Pair) -> str | None:
        """What is not known of the fine-tune that the task's moments are of; another is refused."""
        task = self.method.task_moments
        # what is read again is measured on this fine-tune first, on copies of it later
        if inputs.task is None or self.method.recollect is not None:
            return None
        return check_fine_tune(inputs.task, comparison, pair) if task and task.tuned else None

    def _solution(
        self, comparison: Comparison, inputs: Inputs
    ) -> tuple[float, Solution, str | None]:
        """The strength of a layer for scaled moments, what solves it, and what to know of it."""
        note = None
        if self._both is not None:
            note = why_one_sided(comparison, inputs, len(self._sharing.get(_first(comparison), ())))
            if note is None:
                layer = self._both.layer(inputs, alone=self.method.balance == "layer")
                solution = partial(layer.solved, strength=self.strength)
                return self.strength * layer.unit, solution, inputs.doubt(outputs=True)
        strength = self.strength * self._exchange(comparison)
        solve = self._solvers(*inputs.moments, strength)
        return strength, partial(one_sided, solve), inputs.doubt() or note

    def _full(
        self,
        comparison: Comparison,
        inputs: Inputs,
        pair: Pair,
        update: Tensor,
        output: Output | None,
    ) -> tuple[Tensor, float]:
        """The protected difference as it is stored, and what its dtype leaves out."""
        W0 = exact(base_of(pair, inputs))
        meant = W0 + update
        stored = meant.to(pair.dense_part.dtype)
        if not bool(stored.isfinite().all()):
            raise InputError(BEYOND)
        if output is not None and comparison.tuned is not None:
            output.write_matrix(comparison.tuned, (stored.mT if inputs.rows else stored).cpu())
        return exact(stored) - W0, norm_of(exact(stored) - meant)

    def _factors(
        self, comparison: Comparison, inputs: Inputs, solve: Solution
    ) -> tuple[LowRank, float]:
        """The same of factors; of one side the one on the input side alone is new."""
        update = _correctable(comparison)
        first = _first(comparison)
        done = self._done.get(first) or self._whole(comparison, update, inputs, solve)
        if len(self._sharing[first]) > 1:
            self._done[first] = done
        rows = slice(None) if update.rows is None else slice(*update.rows)
        meant, held = (
            on_columns(LowRank(B[rows], A, update.scale), inputs)
            for B, A in (done.meant, done.held)
        )
        return held, norm_of(difference(held, meant))

    def _whole(
        self, comparison: Comparison, update: Correctable, inputs: Inputs, solve: Solution
    ) -> Protected:
        """The factors of a layer, protected once for all matrices that share them."""
        whole = update.whole()
        B, A, scale = whole.read()
        device = exact_device(torch.device(self.recipe.device))
        found = solve(on_columns(LowRank(B.to(device), A.to(device), scale), inputs))
        B, A = (x.cpu() for x in on_columns(cast("LowRank", found), inputs).tensors)
        tensors = whole.stored([(B, A)], None)
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise InputError(BEYOND)
        stored = Stored(tensors, whole.rank, [])
        self._layers[key_of(comparison.tuned_name, self.plan.tuned)] = Layer(whole, []), stored
        held = whole.rounded(B, A, None)
        return Protected((B, A), (exact(held[0]), exact(held[1])))

    def _store(self, output: Output | None) -> None:
        """Write the factors of all layers."""
        if output is not None and self._layers:
            output.write_factors(self._layers)


@contextmanager
def _round_folder(output: Output | None) -> Iterator[Path]:
    """A folder for the copy of one round, beside the output, that is removed afterwards."""
    beside = None if output is None else output.folder.parent
    try:
        with tempfile.TemporaryDirectory(dir=beside, prefix=".bulkedge-round-") as folder:
            yield Path(folder)
    except OSError as error:
        raise OutputError(
            f"the copy of a round cannot be written or read ({error}); make room, or name another "
            "folder to write to"
        ) from None


def _first(comparison: Comparison) -> str:
    """The first tensor of the factors of a matrix: others that have it share the factors."""
    return comparison.factors.infos[0].name if comparison.factors is not None else ""


def _correctable(comparison: Comparison) -> Correctable:
    """The stored factors of a matrix whose factors can be written."""
    update = None if comparison.factors is None else comparison.factors.correctable()
    if update is None or isinstance(update, str):
        raise InputError(update or "expected factors, got none")
    return update
