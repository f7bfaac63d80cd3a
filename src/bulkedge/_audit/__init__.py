"""The audit: plan, compute, record."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from bulkedge import __version__
from bulkedge._errors import InputError

from .engine import Engine, LocalEngine, RayEngine
from .inputs import Watch, keep_out_of_inputs
from .journal import Journal, open_journal, row_keys
from .lock import JOURNAL_NAME, hold, refuse_held
from .plan import Comparison, Plan, make_plan
from .recipe import Recipe, make_recipe, read_recipe
from .record import Counts, Part, Record, Run, Skipped, Summary, Tool, summarise
from .rows import Matrix
from .shard import RECORD_NAME, Shard, merge_shards

__all__ = [
    "JOURNAL_NAME",
    "RECORD_NAME",
    "Comparison",
    "Counts",
    "Engine",
    "LocalEngine",
    "Matrix",
    "Plan",
    "RayEngine",
    "Recipe",
    "Record",
    "Shard",
    "Skipped",
    "Summary",
    "audit",
    "hold",
    "keep_out_of_inputs",
    "make_plan",
    "make_recipe",
    "merge_shards",
    "read_recipe",
    "refuse_held",
    "run_plan",
]

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what was finished, how many so far, how many in all)``."""

Notice = Callable[[str], None]
"""Called with a line that someone should see."""


def audit(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    recipe: Recipe | Mapping[str, Any] | None = None,
    jobs: int = 1,
    engine: Engine | None = None,
    shard: Shard | None = None,
    journal: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> Record:
    """Find the intruder dimensions that a fine-tune wrote into a model.

    For each weight matrix, the ``top_k`` leading singular vectors of the tuned matrix are compared
    with all singular vectors of the base: ``score = max_i |⟨y, u_i⟩|``.  Tensors are read from the
    files one matrix at a time; no model is built, nothing is unpickled, no network is used.

    Args:
        base: A ``.safetensors`` file, a model folder, or a sharded one.
        tuned: The same, or a PEFT LoRA adapter folder.
        recipe: What to measure, a ``Recipe`` or its fields; ``Recipe()`` if None.
        jobs: Worker processes of one thread each.  With more than one, a script needs the usual
            ``if __name__ == "__main__":`` guard.
        engine: Where to compute; ``LocalEngine(jobs)`` if None.  On processors of one kind the
            record is the same but for ``run``; see docs/audit.md for others.
        shard: The part to compute; see :func:`merge_shards`.
        journal: A file that each row is added to as soon as it is finished.
        resume: Whether to take the rows that are in the journal, if they were computed from the
            same files by the same recipe and versions; else a new journal takes its place.
        progress: Called after each matrix.
        notice: Called with what was found in the journal.

    Returns:
        The record: one row a matrix, one a direction, and every tensor that was skipped and why.

    Raises:
        CheckpointError: If an input cannot be read or does not fit the other.
        AdapterError: The same, for an adapter.
        NothingAuditedError: If the two have no matrix to compare.
        RecipeError: If the recipe has an unknown field, a bad value, or an idle glob.
        InputError: If ``jobs`` or the device is not to be had.
        OutputError: If the journal cannot be written.
        BulkedgeError: If a worker process died.

    References:
        Shuttleworth et al., arXiv:2410.21228.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> W0 = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
        >>> update = 50 * torch.eye(32)[:, :1] @ torch.eye(32)[:1]
        >>> save_file({"layer.weight": W0}, folder / "base.safetensors")
        >>> save_file({"layer.weight": W0 + update}, folder / "tuned.safetensors")
        >>> audit(folder / "base.safetensors", folder / "tuned.safetensors").summary.intruders
        1
    """
    settled = recipe if isinstance(recipe, Recipe) else make_recipe(recipe or {})
    plan = make_plan(os.fspath(base), os.fspath(tuned), settled)
    return run_plan(
        plan,
        settled,
        engine=engine,
        jobs=jobs,
        shard=shard,
        journal=journal,
        resume=resume,
        progress=progress,
        notice=notice,
    )


def run_plan(
    plan: Plan,
    recipe: Recipe,
    *,
    engine: Engine | None = None,
    jobs: int = 1,
    shard: Shard | None = None,
    journal: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> Record:
    """Compute every row of a plan, or of one part of it.

    Args:
        plan: From :func:`make_plan`.
        recipe: The recipe that the plan was made for.
        engine: See :func:`audit`.
        jobs: See :func:`audit`.
        shard: See :func:`audit`.
        journal: See :func:`audit`.
        resume: See :func:`audit`.
        progress: See :func:`audit`.
        notice: See :func:`audit`.

    Returns:
        The record.

    Raises:
        InputError: If there is a journal to resume from, but its path is not given.
    """
    import torch

    engine = engine or LocalEngine(jobs)
    engine.check(recipe)
    if resume and journal is None:
        raise InputError("expected the journal to resume from, got none; give journal=PATH")
    if journal is not None:
        keep_out_of_inputs(os.fspath(journal), plan)
    started, clock = datetime.datetime.now(datetime.timezone.utc), time.perf_counter()
    positions = (shard or Shard(1, 1)).positions(plan.comparisons)
    work = _Work(recipe, [plan.comparisons[i] for i in positions], Watch(plan))
    with open_journal(journal, resume=resume) as book:
        taken = work.resume(book, notice) if book and resume else 0
        work.compute(engine, book, progress)
    matrices = [work.rows[i] for i in range(len(positions))]
    skipped = list(plan.skipped)
    return Record(
        tool=Tool(version=__version__, torch=torch.__version__),
        inputs=work.watch.inputs,
        recipe=recipe,
        shard=_part(shard, positions, len(plan.comparisons)),
        summary=summarise(matrices, skipped, None if shard else list(plan.tensors)),
        skipped=skipped,
        tensors=list(plan.tensors),
        matrices=matrices,
        run=Run(
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.perf_counter() - clock, 3),
            engine=engine.name,
            jobs=engine.jobs,
            resumed=taken,
        ),
    )


class _Work:
    """What is to be computed, and the rows so far by their position in it."""

    def __init__(self, recipe: Recipe, comparisons: list[Comparison], watch: Watch) -> None:
        self.recipe, self.comparisons, self.watch = recipe, comparisons, watch
        self.keys = row_keys(comparisons, recipe, watch.inputs, watch.digests)
        self.rows: dict[int, Matrix] = {}

    def resume(self, book: Journal, notice: Notice | None) -> int:
        """Take what the journal has, and say so; how many that is."""
        self.rows = book.take(self.keys)
        if notice is not None:
            for note in book.notes:
                notice(f"{book.path}: {note}")
        return len(self.rows)

    def compute(self, engine: Engine, book: Journal | None, progress: Progress | None) -> None:
        """Compute the others, each on disk before it counts."""
        left = [i for i in range(len(self.comparisons)) if i not in self.rows]
        todo = [self.comparisons[i] for i in left]
        with closing(engine.rows(todo, self.recipe)) as found:  # ends the workers at once
            for position, row in found:
                self.watch.check()  # a row of what was read meanwhile must not be kept
                if book is not None:
                    book.append(self.keys[left[position]], row)
                self.rows[left[position]] = row
                if progress is not None:
                    progress(row.name, len(self.rows), len(self.comparisons))
        self.watch.check()


def _part(shard: Shard | None, positions: list[int], matrices: int) -> Part | None:
    """What a record says of the part that it has."""
    if shard is None:
        return None
    return Part(index=shard.index, count=shard.count, positions=positions, matrices=matrices)
