"""All matrices of a plan: computed, kept in a journal, recorded."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from bulkedge import __version__
from bulkedge._errors import InputError, OutputError
from bulkedge.comparison import Plan
from bulkedge.records import Matrix, Part, Recipe, Record, Run, Tool, summarise
from bulkedge.records.recipe import changed_settings

from .engine import Engine, LocalEngine
from .inputs import Watch, contents, keep_out_of_inputs
from .journal import Journal, finished_record, open_journal, row_keys
from .known import KnownBases
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
    cache: str | os.PathLike[str] | None = None,
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
        cache: See :func:`run_plans`.
        shard: See :func:`audit`.
        journal: See :func:`audit`.
        resume: See :func:`audit`.
        progress: See :func:`audit`.
        notice: See :func:`audit`.

    Returns:
        The record.

    Raises:
        InputError: If there is a journal to resume from, but its path is not given; or a cache or
            a number of jobs for an engine that takes none.
        OutputError: If the folder of the journal has the finished record of other inputs, by other
            settings, or of another part.
    """
    engine = engine or LocalEngine(jobs)
    _check_engine(engine, jobs, cache)
    engine.check(recipe)
    if resume and journal is None:
        raise InputError("expected the journal to resume from, got none; give journal=PATH")
    for written in filter(None, (journal, cache)):
        keep_out_of_inputs(os.fspath(written), plan)
    started = _Start()
    work = _Work(plan, recipe, shard)
    if cache is not None and isinstance(engine, LocalEngine):
        engine = replace(engine, known=KnownBases(Path(cache), work.watch.digests))
    with open_journal(journal, resume=resume) as book:
        taken = work.resume(book, notice) if book and resume else 0
        _compute([work], [book], engine, progress)
    return _record(work, engine, started, taken)


def _check_engine(engine: Engine, jobs: int, cache: str | os.PathLike[str] | None) -> None:
    """Raise where a setting would have no effect on an engine."""
    if jobs not in (1, engine.jobs):
        raise InputError(f"jobs={jobs}: the engine that was given has its own; leave out jobs")
    if cache is not None and not isinstance(engine, LocalEngine):
        raise InputError(
            f"cache={os.fspath(cache)!r}: a folder of this machine, which the engine "
            f"{engine.name!r} does not use; leave it out, or compute with LocalEngine"
        )


def run_plans(
    plans: Sequence[Plan],
    recipe: Recipe,
    *,
    jobs: int = 1,
    cache: str | os.PathLike[str] | None = None,
    journals: Sequence[str | os.PathLike[str]] = (),
    resume: bool = False,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> list[Record]:
    """Compute every row of several plans of one base, which is read and decomposed once.

    Matrices are taken base matrix by base matrix.  Each record equals that of a separate audit,
    except for ``run``.

    Args:
        plans: From :func:`make_plan`, all with one base.
        recipe: The recipe that they were made for.
        jobs: See :func:`audit`.
        cache: A folder that keeps singular values of base matrices, and the SVDs of small ones,
            for later calls, by the content of the base's files.
        journals: A file for each plan that its rows are added to; none to keep none.
        resume: See :func:`audit`.
        progress: See :func:`audit`.
        notice: See :func:`audit`.

    Returns:
        A record for each plan.

    Raises:
        InputError: If there are journals to resume from, but not one for each plan.
    """
    books: Sequence[str | os.PathLike[str] | None] = journals or [None] * len(plans)
    if len(books) != len(plans) or (resume and not journals):
        raise InputError(f"expected {len(plans)} journals, one per plan, got {len(journals)}")
    started, works = _Start(), list[_Work]()
    for plan, journal in zip(plans, books, strict=True):
        for written in filter(None, (journal, cache)):
            keep_out_of_inputs(os.fspath(written), plan)
        works.append(_Work(plan, recipe, known=works[0].watch.digests if works else None))
    folder = None if cache is None else Path(cache)
    engine = LocalEngine(jobs, KnownBases(folder, works[0].watch.digests if works else {}))
    engine.check(recipe)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_journal(book, resume=resume)) for book in books]
        pairs = list(zip(works, opened, strict=True))
        taken = [work.resume(book, notice) if book and resume else 0 for work, book in pairs]
        _compute(works, opened, engine, progress)
    return [_record(w, engine, started, count) for w, count in zip(works, taken, strict=True)]


def _compute(
    works: Sequence[_Work],
    books: Sequence[Journal | None],
    engine: Engine,
    progress: Progress | None,
) -> None:
    """Compute the rows that are not there, each on disk before it counts."""
    todo = [(w, i) for w, work in enumerate(works) for i in work.left]
    if len(works) > 1:  # the matrices of all fine-tunes that share a base matrix in a row
        todo.sort(key=lambda at: works[at[0]].comparisons[at[1]].base_key)
    done, total = sum(len(w.rows) for w in works), sum(len(w.comparisons) for w in works)
    comparisons = [works[w].comparisons[i] for w, i in todo]
    with closing(engine.rows(comparisons, works[0].recipe)) as found:  # ends the workers at once
        for position, row in found:
            w, i = todo[position]
            works[w].take(i, row, books[w])
            done += 1
            if progress is not None:
                progress(row.name, done, total)
    for work in works:
        work.watch.check()


@dataclass(frozen=True)
class _Start:
    """When a computation began, by the calendar and by a clock."""

    date: datetime.datetime = field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc)
    )
    clock: float = field(default_factory=time.perf_counter)


def _record(work: _Work, engine: Engine, started: _Start, taken: int) -> Record:
    """What was found, once all rows are there."""
    import torch

    plan, shard = work.plan, work.shard
    matrices = [work.rows[i] for i in range(len(work.comparisons))]
    skipped, tensors = list(plan.skipped), None if shard else list(plan.tensors)
    return Record(
        tool=Tool(version=__version__, torch=torch.__version__),
        inputs=work.watch.inputs,
        recipe=work.recipe,
        shard=_part(shard, work.positions, len(plan.comparisons)),
        summary=summarise(matrices, skipped, tensors, moments=plan.moments is not None),
        skipped=skipped,
        tensors=list(plan.tensors),
        matrices=matrices,
        run=Run(
            started=started.date.isoformat(timespec="seconds"),
            seconds=round(time.perf_counter() - started.clock, 3),
            engine=engine.name,
            jobs=engine.jobs,
            resumed=taken,
        ),
    )


class _Work:
    """What is to be computed, and the rows so far by their position in it."""

    def __init__(
        self,
        plan: Plan,
        recipe: Recipe,
        shard: Shard | None = None,
        known: Mapping[Path, str] | None = None,
    ) -> None:
        self.plan, self.recipe, self.shard = plan, recipe, shard
        self.positions = (shard or Shard(1, 1)).positions(plan.comparisons)
        self.comparisons = [plan.comparisons[i] for i in self.positions]
        self.watch = Watch(plan, known)
        self.keys = row_keys(self.comparisons, recipe, self.watch.inputs, self.watch.digests)
        self.rows: dict[int, Matrix] = {}

    @property
    def left(self) -> list[int]:
        """The positions that have no row yet."""
        return [i for i in range(len(self.comparisons)) if i not in self.rows]

    def resume(self, book: Journal, notice: Notice | None) -> int:
        """Take what the journal has, and say so; how many that is."""
        self._keep_other_record(book.path.with_name(Record.file_name))
        self.rows = book.take(self.keys)
        if notice is not None:
            for note in book.notes:
                notice(f"{book.path}: {note}")
        return len(self.rows)

    def _keep_other_record(self, path: Path) -> None:
        """Raise where the record beside a journal is finished, and answers another question."""
        if (record := finished_record(path, Record)) is None:
            return
        if contents(other := record.inputs) != contents(self.watch.inputs):
            what = f"{other.tuned.path} against {other.base.path}, or of what these were before"
        elif changed := changed_settings(record.recipe, self.recipe):
            what = f"an audit with other settings ({changed})"
        elif (was := _of_part(record.shard)) != (now := _of_part(self.shard)):
            what = f"{was}, not of {now}"
        else:
            return
        raise OutputError(
            f"{path}: is the record of {what}; give another folder, or --force in place of --resume"
        )

    def take(self, position: int, row: Matrix, book: Journal | None) -> None:
        """A row that was computed."""
        self.watch.check()  # a row of what was read meanwhile must not be kept
        if book is not None:
            book.append(self.keys[position], row)
        self.rows[position] = row


def _of_part(part: Shard | Part | None) -> str:
    """Which part of an audit that is."""
    return "the whole audit" if part is None else f"part {part.index} of {part.count}"


def _part(shard: Shard | None, positions: list[int], matrices: int) -> Part | None:
    """What a record says of the part that it has."""
    if shard is None:
        return None
    return Part(index=shard.index, count=shard.count, positions=positions, matrices=matrices)
