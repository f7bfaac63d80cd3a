"""The budget of one base, from files to a record."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from pathlib import Path

from bulkedge import __version__
from bulkedge._errors import CheckpointError, InputError, OutputError
from bulkedge._fields import POSITIVE, as_path, check_values, optional, whole
from bulkedge._globs import as_globs
from bulkedge._precision import one_thread
from bulkedge.auditing import Notice, keep_out
from bulkedge.auditing.inputs import digests, plain, source, stamps
from bulkedge.auditing.journal import Journal, digest, finished_record
from bulkedge.checkpoint import Adapter, open_path
from bulkedge.checkpoint.adapter_config import CONFIG
from bulkedge.records import Run, Tool
from bulkedge.records.budget import (
    BUDGET_VERSION,
    Allowance,
    BudgetRecord,
    BudgetSettings,
    MatrixBudget,
    untrained,
)
from bulkedge.records.recipe import told_setting
from bulkedge.records.source import File, Source

from .matrix import allowed_any, allowed_like, measure_matrix
from .plan import BudgetPlan, Wanted, plan_budget

LIMITING = ("top_k", "target", "exclude", "seed")
"""The settings that limits depend on: the same limits serve another rank, α and level."""

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what was finished, how many so far, how many in all)``."""


def budget(
    base: str | os.PathLike[str],
    *,
    like: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    level: float = 1.0,
    target: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    top_k: int = 10,
    jobs: int = 1,
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> BudgetRecord:
    """How strong an update of each matrix of a base may be, before any training.

    A generic spike of strength θ makes an outlier of the tuned matrix once it exceeds
    ``θ_c = D(b⁺)^(−½)``.  Here b is the edge of the base's bulk, and D its D-transform.  The
    outlier is one of the k leading directions, which an audit judges, once θ exceeds
    ``θ_k = D(σ_k)^(−½)`` (θ_c, but at most σ_k, where σ_k lies inside the bulk).  So a LoRA with
    ``‖s·B·A‖₂ < θ_k`` is expected to make no intruder that counts.

    Cost: some 20 to 40 passes over each matrix with blocks of 16 vectors, no SVD of a large one.

    Args:
        base: The base: a ``.safetensors`` file or a model folder.
        like: A LoRA adapter of it: its rank, and for each layer the α that keeps its strongest
            spike below ``level`` of θ_k.
        rank: Rank r of a LoRA that is planned.
        alpha: Its α.
        rslora: Whether its scale is α/√r.
        level: What part of θ_k an update may reach.
        target: Globs of the matrices that are wanted; without, those that adapters usually update:
            no embeddings, no output layer.
        exclude: Globs of matrices to leave out.
        top_k: How many leading directions an audit judges.
        jobs: Matrices at a time, one thread each.
        seed: Of the random vectors.
        journal: A file that each row is added to as soon as it is finished.
        resume: Whether to take the rows that are in the journal, if they are of the same matrices,
            whatever rank, α, level and adapter they were measured for.
        progress: Called after each matrix.
        notice: Called with what was found in the journal.

    Returns:
        The record: a row for each matrix.  :func:`bulkedge.budgeting.lora_config` makes settings of
        PEFT of it.

    Raises:
        CheckpointError: If an input cannot be read, or is changed meanwhile.
        InputError: If a setting makes no sense, or rank and α are not both given.
        RecipeError: If a glob matches nothing.
        NothingAuditedError: If no matrix is left.
        OutputError: If the journal cannot be written; or if it is resumed, and is that of an audit,
            or beside it is the finished record of another base, adapter, k, target, exclude or
            seed.

    References:
        Benaych-Georges and Nadakuditi, arXiv:1103.2221; Xie, arXiv:2607.23711, for budgets by θ_c.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> file = Path(tempfile.mkdtemp()) / "base.safetensors"
        >>> W0 = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
        >>> save_file({"layer.weight": W0}, file)
        >>> (row,) = budget(file, rank=4, alpha=8).matrices
        >>> round(row.threshold / (60 * 40) ** 0.25, 1), row.noise
        (1.0, True)
        >>> round(row.allowed.max_ba_norm / row.top_k_threshold, 2)  # the scale is 8/4
        0.5
    """
    planned = _settings(
        rank, alpha, rslora, level, target, exclude, top_k, seed, like=like is not None
    )
    check_values("budget", jobs=(jobs, whole(1)))
    if like is not None and (rank is not None or alpha is not None):
        raise InputError("expected rank and alpha, or like, whose own they are; got both")
    if resume and journal is None:
        raise InputError("expected the journal to resume from, got none; give journal=PATH")
    adapter = None if like is None else Path(as_path("like", like))
    plan = plan_budget(Path(as_path("base", base)), adapter, planned.target, planned.exclude)
    if plan.like is not None:
        planned = planned.model_copy(update=_own(plan.like))
    files = [*plan.base.files, *(plan.like.files if plan.like else ())]
    if journal is not None:
        keep_out(
            os.fspath(journal), [plan.base.path, *([plan.like.path] if plan.like else [])], files
        )
    started, clock = datetime.datetime.now(datetime.timezone.utc), time.perf_counter()
    before, known = stamps(files), digests(files)
    book = Journal(journal, resume=resume, kind=MatrixBudget) if journal is not None else None
    with book if book is not None else nullcontext():
        work = _Work(plan, planned, known, book)
        taken = work.resume(book, notice) if book and resume else 0
        work.compute(jobs, lambda: stamps(files) == before, progress)
    return BudgetRecord(
        tool=_tool(),
        base=work.base,
        like=work.like,
        settings=planned,
        skipped=list(plan.skipped),
        matrices=work.finished(),
        run=Run(
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.perf_counter() - clock, 3),
            engine="local",
            jobs=jobs,
            resumed=taken,
        ),
    )


class _Work:
    """The matrices to be measured, and the rows so far by their position."""

    def __init__(
        self,
        plan: BudgetPlan,
        settings: BudgetSettings,
        known: Mapping[Path, str],
        book: Journal[MatrixBudget] | None,
    ) -> None:
        self.plan, self.settings, self.book = plan, settings, book
        self.keys = _keys(plan.wanted, settings, known)
        self.base = source(plan.base, known)
        self.like = None if plan.like is None else source(plan.like, known)
        self.rows: dict[int, MatrixBudget] = {}

    def resume(self, book: Journal[MatrixBudget], notice: Notice | None) -> int:
        """Take what the journal has, and say so; how many that is."""
        self._keep_other_record(book.path.with_name(BudgetRecord.file_name))
        self.rows = book.take(self.keys)
        if notice is not None:
            for note in book.notes:
                notice(f"{book.path}: {note}")
        return len(self.rows)

    def _keep_other_record(self, path: Path) -> None:
        """Raise where the record beside a journal is finished, and has other limits than these."""
        if (record := finished_record(path, BudgetRecord)) is None:
            return
        for name, was, now in (("base", record.base, self.base), ("like", record.like, self.like)):
            if _content(was) != _content(now):
                what = f"{name} {'none' if was is None else was.path}, or of what it was before"
                break
        else:
            what = _changed(record.settings, self.settings)
        if what:
            raise OutputError(
                f"{path}: is the budget of {what}; give another folder, or --force in place of "
                "--resume"
            )

    def compute(self, jobs: int, unchanged: Callable[[], bool], progress: Progress | None) -> None:
        """Measure the others, each on disk before it counts."""
        for i, row in self._measured(jobs):
            if not unchanged():  # a row of what was read meanwhile must not be kept
                raise CheckpointError("an input file was changed meanwhile; start the budget again")
            if self.book is not None:
                self.book.append(self.keys[i], row)
            self.rows[i] = row
            if progress is not None:
                progress(row.name, len(self.rows), len(self.keys))

    def finished(self) -> list[MatrixBudget]:
        """All rows in order, with what each is allowed."""
        rows = [self.rows[i] for i in range(len(self.keys))]
        if self.plan.like is None:
            aside = [] if self.settings.target else untrained(rows)
            limits = [
                row.top_k_threshold
                for row in rows
                if row.top_k_threshold is not None and row not in aside
            ]
            mean = sum(limits) / max(len(limits), 1)
            allowed = [(allowed_any(row, self.settings, mean), None) for row in rows]
        else:
            pairs = zip(rows, self.plan.wanted, strict=True)
            allowed = [allowed_like(row, wanted, self.settings) for row, wanted in pairs]
        columns = zip(rows, self.plan.wanted, allowed, strict=True)
        return [_with(row, wanted, *found) for row, wanted, found in columns]

    def _measured(self, jobs: int) -> Iterator[tuple[int, MatrixBudget]]:
        """The rows as they are finished, the largest matrices first."""
        wanted = self.plan.wanted
        left = [i for i in range(len(self.keys)) if i not in self.rows]
        left.sort(key=lambda i: -wanted[i].matrix.size)
        pool = ThreadPoolExecutor(jobs)
        with one_thread():
            try:
                found = {pool.submit(measure_matrix, wanted[i], self.settings): i for i in left}
                for done in as_completed(found):
                    yield found[done], done.result()
            finally:
                pool.shutdown(cancel_futures=True)


def _content(found: Source | None) -> tuple[str, list[File]] | None:
    """An input but for where it lies: machines may mount it in different places."""
    return None if found is None else (found.kind, found.files)


def _changed(was: BudgetSettings, now: BudgetSettings) -> str:
    """The settings in which the limits of two budgets differ; empty where they are the same."""
    pairs = ((name, getattr(was, name), getattr(now, name)) for name in LIMITING)
    changed = [
        f"{name}={told_setting(old) or 'none'}, not {told_setting(new) or 'none'}"
        for name, old, new in pairs
        if old != new
    ]
    return f"other settings ({', '.join(changed)})" if changed else ""


def _with(
    row: MatrixBudget, wanted: Wanted, allowed: Allowance | None, note: str | None
) -> MatrixBudget:
    """A row with what it is allowed, and under the name of this plan's layer."""
    notes = "; ".join(filter(None, (row.note, note))) or None
    return row.model_copy(update={"allowed": allowed, "note": notes, "module": wanted.module})


def _settings(
    rank: int | None,
    alpha: float | None,
    rslora: bool,
    level: float,
    target: str | Iterable[str],
    exclude: str | Iterable[str],
    top_k: int,
    seed: int,
    *,
    like: bool,
) -> BudgetSettings:
    """What was asked for, checked."""
    check_values(
        "budget",
        rank=(rank, optional(whole(1))),
        alpha=(alpha, optional(POSITIVE)),
        level=(level, POSITIVE),
        top_k=(top_k, whole(1)),
        seed=(seed, whole(0)),
    )
    if (rank is None) != (alpha is None):
        raise InputError(f"expected both rank and alpha, or neither, got {rank} and {alpha}")
    if level != 1 and rank is None and not like:
        raise InputError("expected rank and alpha, or like, for level, which limits them; got none")
    if rslora and rank is None:
        raise InputError("expected rank and alpha for rslora, which is a scale of theirs; got none")
    return BudgetSettings(
        top_k=top_k,
        level=level,
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        target=tuple(as_globs(target)),
        exclude=tuple(as_globs(exclude)),
        seed=seed,
    )


def check_like(like: Path) -> None:
    """Raise where an adapter has no rank and α that settings of PEFT could begin with.

    Args:
        like: The adapter.

    Raises:
        CheckpointError: If it cannot be read.
        InputError: If it has none: no configuration of PEFT, or an α of 0 or below.
    """
    adapter = open_path(like)
    if not isinstance(adapter, Adapter) or _own(adapter):  # a model is refused where it is planned
        return
    why = f"no {CONFIG} with the rank and α of the whole"
    if adapter.files[-1].name == CONFIG:
        why = f"lora_alpha = {adapter.config.lora_alpha:g}, expected more than 0"
    raise InputError(
        f"{like}: has {why}, which settings of PEFT begin with; leave out --peft: the record has a "
        "limit for each layer"
    )


def _own(adapter: Adapter) -> dict[str, object]:
    """Rank and α of an adapter, where PEFT's configuration has them."""
    config = adapter.config
    if adapter.files[-1].name != CONFIG or not config.lora_alpha > 0:
        return {}
    return {"rank": config.r, "alpha": config.lora_alpha, "rslora": config.use_rslora}


def _keys(
    wanted: Sequence[Wanted], settings: BudgetSettings, known: Mapping[Path, str]
) -> list[str]:
    """A digest of everything that each row depends on, the base by its content."""
    common = {
        "budget": BUDGET_VERSION,
        **_tool().model_dump(),
        "top_k": settings.top_k,
        "seed": settings.seed,
    }
    return [digest(common | {"matrix": plain(each.matrix, known)}) for each in wanted]


def _tool() -> Tool:
    import torch

    return Tool(version=__version__, torch=torch.__version__)
