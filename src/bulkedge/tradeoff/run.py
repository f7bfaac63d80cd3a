"""The frontier of one fine-tune, from files to a record."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bulkedge import __version__
from bulkedge._errors import InputError
from bulkedge._fields import FLAG, as_path, check_values, one_of, whole
from bulkedge.auditing import Notice, hold, keep_out
from bulkedge.auditing.inputs import Watch, digests, source_of_moments
from bulkedge.comparison import make_plan
from bulkedge.records import Run, Tool, make_recipe
from bulkedge.records.frontier import FrontierRecord, FrontierSettings, dominated, gains
from bulkedge.records.source import Source

from .copies import Copies
from .evaluation import Evaluate, evaluator
from .folder import Folder, write
from .measure import Evaluations, Wanted
from .points import SCALES, STRENGTHS, Files, Point, points_of

Progress = Callable[[str, str, int, int], None]
"""Called as ``progress(phase, what was finished, how many so far, how many in all)``."""


def frontier(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    moments: str | os.PathLike[str],
    evaluate: Evaluate,
    task_moments: str | os.PathLike[str] | None = None,
    task: str | None = None,
    keep: str | None = None,
    lower: Iterable[str] = (),
    scales: Sequence[float] = SCALES,
    strengths: Sequence[float] = STRENGTHS,
    balance: str = "output",
    with_base: bool = False,
    partial: bool = False,
    device: str = "cpu",
    jobs: int = 1,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> FrontierRecord:
    """Task accuracy against retention of a fine-tune, by scaling and by protecting.

    Copies of the fine-tune are written, ``W0 + s ΔW`` for each factor s and ``Protect(strength=λ)``
    for each λ, every one as ``bulkedge repair`` writes it, and each is evaluated, as is the
    fine-tune itself.  A run that was stopped resumes when it is repeated: copies
    of the same inputs and evaluations by the same command are kept.

    Cost: one audit, two solves for each layer and strength at most, and as many evaluations as
    there are points: 11 by default.

    Args:
        base: The base, as for :func:`bulkedge.repair`.
        tuned: The fine-tune: an adapter or a checkpoint.
        out: The folder of the copies and of ``frontier.json``; new, or of the same inputs.
        moments: A file of moments of text to be kept.
        evaluate: A command with ``{model}`` in place of the path of a copy, run without a shell,
            whose last line on stdout is a JSON object of numbers; or a function that takes the path
            and returns them.
        task_moments: A file of moments of the task.
        task: Which of the numbers is the task; the first if None.
        keep: Which is to be kept; the first other one if None.
        lower: The numbers for which lower is better, such as a perplexity.
        scales: Factors s.
        strengths: Strengths λ.
        balance: See :class:`bulkedge.Protect`.
        with_base: Whether the base is also evaluated; it is not an adapter.
        partial: Whether the fine-tune stores some weights only.
        device: Where copies are computed.
        jobs: Worker processes of the audit.
        progress: Called after each matrix of the audit, and each point.
        notice: Called with a line for each point.

    Returns:
        The record: all points, which of them are dominated, and the gain of protecting over scaling
        at equal retention.

    Raises:
        InputError: If a setting makes no sense, the evaluation fails or gives no numbers, or
            others than before.  What was finished is kept.
        OutputError: If ``out`` holds points of other inputs, or cannot be written.
        CheckpointError: As :func:`bulkedge.repair`.

    References:
        Wortsman et al., arXiv:2109.01903 (WiSE-FT), for scaling between base and fine-tune.

    Example:
        >>> record = frontier(  # doctest: +SKIP
        ...     "base", "adapter", "out", moments="base.moments", task_moments="task.moments",
        ...     evaluate="python my_eval.py {model}",
        ... )
        >>> [gain.gain for gain in record.gains]  # doctest: +SKIP
    """
    started, clock = datetime.datetime.now(datetime.timezone.utc), time.perf_counter()
    _check(balance, with_base, partial, jobs)
    points, evaluation = points_of(scales, strengths, with_base), evaluator(evaluate)
    base, tuned = as_path("base", base), as_path("tuned", tuned)
    files = _files(base, tuned, moments, task_moments, balance, partial)
    recipe = make_recipe({"device": device, "partial": partial})
    plan = make_plan(base, tuned, recipe)
    keep_out(Path(out), (plan.base.path, plan.tuned.path, *files.measured), set(plan.files))
    folder = Folder(Path(out))
    copies = Copies(plan, recipe, files, folder, jobs, _phase(progress, "auditing"))
    copies.check(points)
    with hold(folder.path):
        watch, known = Watch(plan), digests(files.measured)
        sources = [source_of_moments(path, known) for path in files.measured]
        inputs = _identity(watch, sources, files)
        folder.claim(inputs)
        folder.sweep(points)
        copies.check_room(points)
        wanted = Wanted(task, keep, tuple(lower))
        run = Evaluations(points, copies, evaluation, watch, wanted)
        with folder.journal() as book:
            resumed = run.go_on(book, inputs)
            run.go(book, _phase(progress, "evaluating"), notice)
        took = Run(
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.perf_counter() - clock, 3),
            engine="local",
            jobs=jobs,
            resumed=resumed,
        )
        record = _record(run, files, sources, took)
        write(folder.path / record.file_name, record.to_json())
    return record


def _record(run: Evaluations, files: Files, sources: list[Source], took: Run) -> FrontierRecord:
    """The record of a finished run."""
    import torch

    axes, inputs = run.axes, run.watch.inputs
    return FrontierRecord(
        tool=Tool(version=__version__, torch=torch.__version__),
        base=inputs.base,
        tuned=inputs.tuned,
        moments=sources[0],
        task_moments=sources[1] if len(sources) > 1 else None,
        settings=_settings(run.points, files),
        evaluation=run.described,
        axes=axes,
        points=run.rows,
        dominated=dominated(run.rows, axes),
        gains=gains(run.rows, axes),
        run=took,
    )


def _settings(points: list[Point], files: Files) -> FrontierSettings:
    """What was asked for."""
    strengths = {
        arm: tuple(p.strength for p in points if p.arm == arm and p.strength is not None)
        for arm in ("scaled", "protected")
    }
    return FrontierSettings(
        scales=strengths["scaled"],
        strengths=strengths["protected"],
        balance=files.balance,
        with_base=any(point.arm == "base" for point in points),
        partial=files.partial,
    )


def _check(balance: str, with_base: bool, partial: bool, jobs: int) -> None:
    """The settings that are no lists."""
    check_values(
        "frontier",
        balance=(balance, one_of("output", "drift", "layer")),
        with_base=(with_base, FLAG),
        partial=(partial, FLAG),
        jobs=(jobs, whole(1)),
    )


def _files(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    moments: str | os.PathLike[str],
    task_moments: str | os.PathLike[str] | None,
    balance: str,
    partial: bool,
) -> Files:
    """The inputs; moments are files here, so that a command can name them."""
    for name, given in {"moments": moments, "task_moments": task_moments}.items():
        if given is not None and not isinstance(given, (str, os.PathLike)):
            raise InputError(
                f"expected the path of a file for {name}, got {type(given).__name__}; save them "
                "first, and give the path"
            )
    task = None if task_moments is None else Path(task_moments)
    return Files(Path(base), Path(tuned), Path(moments), task, balance, partial)


def _phase(progress: Progress | None, phase: str) -> Callable[[str, int, int], None] | None:
    if progress is None:
        return None
    return lambda name, done, total: progress(phase, name, done, total)


def _identity(watch: Watch, moments: list[Source], files: Files) -> dict[str, Any]:
    """Everything that the copies depend on, but for their strengths."""
    content = [[[file.name, file.sha256] for file in source.files] for source in moments]
    both = (watch.inputs.base, watch.inputs.tuned)
    base, tuned = ([[file.name, file.sha256] for file in source.files] for source in both)
    return {
        "version of bulkedge": __version__,
        "BASE": base,
        "TUNED": tuned,
        "file of moments": content[0],
        "file of task moments": content[1] if len(content) > 1 else None,
        "balance": files.balance,
        "choice of --partial": files.partial,
    }
