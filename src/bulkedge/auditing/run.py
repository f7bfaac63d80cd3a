"""All matrices of a plan: computed, kept in a journal, recorded."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from contextlib import closing

from bulkedge import __version__
from bulkedge._errors import InputError
from bulkedge.comparison import Comparison, Plan
from bulkedge.records import Matrix, Part, Recipe, Record, Run, Tool, summarise

from .engine import Engine, LocalEngine
from .inputs import Watch, keep_out_of_inputs
from .journal import Journal, open_journal, row_keys
from .shard import Shard

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what was finished, how many so far, how many in all)``."""

Notice = Callable[[str], None]
"""Called with a line that someone should see."""


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
    skipped, tensors = list(plan.skipped), None if shard else list(plan.tensors)
    return Record(
        tool=Tool(version=__version__, torch=torch.__version__),
        inputs=work.watch.inputs,
        recipe=recipe,
        shard=_part(shard, positions, len(plan.comparisons)),
        summary=summarise(matrices, skipped, tensors, moments=plan.moments is not None),
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
