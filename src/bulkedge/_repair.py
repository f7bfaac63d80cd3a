"""The repair of one fine-tune: audit, treat what was found, write, audit what was written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from bulkedge import __version__
from bulkedge._errors import InputError, OutputError
from bulkedge._fields import POSITIVE_SHARE, as_path, check_values, optional, renamed, whole
from bulkedge._globs import as_globs, check_globs
from bulkedge.auditing import Engine, LocalEngine, keep_out_of_inputs, run_plan
from bulkedge.auditing.inputs import as_text
from bulkedge.checkpoint import Adapter
from bulkedge.checkpoint.write import check_writable, new_folder
from bulkedge.comparison import Plan, make_plan
from bulkedge.intruder import COUNTED, Verdict
from bulkedge.records import Recipe, Record, make_recipe, takes_recipe
from bulkedge.records.record import Tool
from bulkedge.repairing.choose import Remedy, work_for
from bulkedge.repairing.matrix import Selection
from bulkedge.repairing.method import Clip
from bulkedge.repairing.output import Output
from bulkedge.repairing.record import Choice, RepairRecord, cost_of
from bulkedge.repairing.work import Options, Work

Progress = Callable[[str, str, int, int], None]
"""Called as ``progress(phase, what was finished, how many so far, how many in all)``."""


@takes_recipe
@renamed(level="significance")
def repair(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    *,
    method: Remedy | None = None,
    select: str = COUNTED[0].value,
    significance: float | None = None,
    only: Iterable[str] = (),
    max_rank: int | None = None,
    recipe: Recipe | dict[str, Any] | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
) -> RepairRecord:
    """Take the intruder dimensions out of a fine-tune, and audit what is left.

    The fine-tune is audited, each matrix with intruders is corrected by ``method``, a copy of the
    input is written with the corrected matrices in it, and that copy is audited.  An adapter stays
    an adapter of the same kind, a checkpoint a checkpoint; every tensor that is not corrected is
    carried over byte for byte.

    Cost: two audits; and for each corrected matrix one audit of it a round, with its leading
    triplets to full precision.

    Args:
        base: The base, as for :func:`bulkedge.audit`.
        tuned: The fine-tune: an adapter or a checkpoint.
        out: The folder to be, with the repaired files and ``repair.json``; nothing is written if
            None.
        method: What to do: ``Scale``, ``Clip``, ``Shrink``, ``Project`` or ``Protect``; ``Clip()``
            if None.
        select: The mildest verdict that is treated: ``"rotated"``, any new direction, or
            ``"intruder"``.
        significance: Treat only directions whose singular value noise like the base's bulk reaches
            with at most this probability.
        only: Globs over names of either side: no other matrix is touched.
        max_rank: The largest rank of a repaired update; what that leaves out is ``loss`` in the
            record.  If None, updates grow by as many columns as it takes.
        recipe: What to measure, as for :func:`bulkedge.audit`.
        jobs: Worker processes of the audits.
        progress: Called after each matrix of each phase.

    Returns:
        The record: both audits, and what was done to each matrix.  Where nothing could be repaired
        no folder is written, and ``output`` is None: every matrix to be treated was refused, or the
        fine-tune could not be judged.

    Raises:
        OutputError: If ``out`` exists, lies in an input, or cannot be written.
        CheckpointError: As :func:`bulkedge.audit`.
        RecipeError: Likewise, and if a glob of ``only`` matches nothing.
        InputError: If ``select``, ``significance`` or ``max_rank`` makes no sense.

    References:
        Shuttleworth et al., arXiv:2410.21228; see the methods for theirs.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> W0 = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
        >>> update = 50 * torch.eye(32)[:, :1] @ torch.eye(32)[:1]
        >>> save_file({"layer.weight": W0}, folder / "base.safetensors")
        >>> save_file({"layer.weight": W0 + update}, folder / "tuned.safetensors")
        >>> found = repair(
        ...     folder / "base.safetensors", folder / "tuned.safetensors", folder / "repaired",
        ...     recipe={"top_k": 1},
        ... )
        >>> found.before.summary.new_directions, found.after.summary.new_directions
        (1, 0)
        >>> sorted(path.name for path in (folder / "repaired").iterdir())
        ['repair.json', 'tuned.safetensors']
    """
    settled = recipe if isinstance(recipe, Recipe) else make_recipe(recipe or {})
    options = _options(select, significance, max_rank)
    plan = make_plan(as_path("base", base), as_path("tuned", tuned), settled)
    work = work_for(plan, settled, method or Clip(), options)
    only = tuple(as_globs(only))
    check_globs(only, plan.names)
    if out is not None:
        check_output(Path(out), plan)
    engine = LocalEngine(jobs)
    before = run_plan(plan, settled, engine=engine, progress=_phase(progress, "auditing"))
    todo = work.affected(before, only)
    if out is None:
        work.treat(todo, None, _phase(progress, "repairing"))
        return record_of(work, before, None, None, ())
    with suppress(_NothingDone), new_folder(Path(out)) as folder:
        output = Output.copy(plan.tuned, folder)
        (folder / RepairRecord.file_name).unlink(missing_ok=True)  # of an earlier repair
        work.treat(todo, output, _phase(progress, "repairing"))
        _check_done(work, before)
        after = _audit_again(base, output, Path(out), settled, engine, progress)
        record = record_of(work, before, after, Path(out), output.left_behind)
        (folder / RepairRecord.file_name).write_text(record.to_json(), encoding="utf-8")
        return record
    return record_of(work, before, None, None, ())


class _NothingDone(Exception):
    """A copy that would be the input: it does not get its name."""


def _check_done(work: Work, before: Record) -> None:
    """Raise where a copy would be neither repaired nor in no need of it.

    Args:
        work: What was done.
        before: The audit of the input.

    Raises:
        _NothingDone: If so: matrices were refused, or the input was not judged as a whole.
    """
    statuses = {row.status for row in work.rows}
    if "repaired" not in statuses and ("refused" in statuses or not before.summary.complete):
        raise _NothingDone


def check_output(out: Path, plan: Plan) -> None:
    """Raise unless a repaired copy may be written there.

    Args:
        out: The folder to be.
        plan: What the inputs are.

    Raises:
        OutputError: If it exists, lies in an input, or there is no room for it.
    """
    if "\0" in str(out) or out.name in ("", ".."):
        raise OutputError(f"{str(out)!r}: names no folder that could be made; name another")
    if os.path.lexists(out):
        raise OutputError(f"{out}: exists; a repair is never written over anything, name another")
    keep_out_of_inputs(out, plan)
    check_writable(out)
    parent = next(folder for folder in out.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    needed = 2**20 + sum(file.stat().st_size for file in plan.tuned.files)
    if isinstance(plan.tuned, Adapter):
        needed *= 2  # the old factors and the new ones, for a moment
    if free < needed:
        raise OutputError(f"{out}: {free} bytes free, the copy needs about {needed}; make room")


def _options(select: str, significance: float | None, max_rank: int | None) -> Options:
    """What is asked for beside the method."""
    words = [verdict.value for verdict in COUNTED]
    if select not in words:
        raise InputError(f"expected select {' or '.join(map(repr, words))}, got {select!r}")
    check_values(
        "repair",
        significance=(significance, optional(POSITIVE_SHARE)),
        max_rank=(max_rank, optional(whole(1))),
    )
    rank = None if max_rank is None else int(max_rank)
    return Options(Selection(Verdict(select), significance), rank)


def _phase(progress: Progress | None, phase: str) -> Callable[[str, int, int], None] | None:
    """Progress of one phase."""
    if progress is None:
        return None
    return lambda name, done, total: progress(phase, name, done, total)


def _audit_again(
    base: str | os.PathLike[str],
    output: Output,
    out: Path,
    recipe: Recipe,
    engine: Engine,
    progress: Progress | None,
) -> Record:
    """The audit of what was written, under the name that it will have."""
    plan = make_plan(os.fspath(base), output.path, recipe)
    found = run_plan(plan, recipe, engine=engine, progress=_phase(progress, "verifying"))
    named = out / output.path.relative_to(output.folder)
    tuned = found.inputs.tuned.model_copy(update={"path": as_text(named)})
    return found.model_copy(update={"inputs": found.inputs.model_copy(update={"tuned": tuned})})


def record_of(
    work: Work,
    before: Record,
    after: Record | None,
    out: Path | None,
    left_behind: tuple[str, ...],
) -> RepairRecord:
    """The record of a repair.

    Args:
        work: What was done.
        before: The audit of the input.
        after: That of the copy, or None.
        out: The folder of the copy, or None.
        left_behind: Files of the input that are not in it.

    Returns:
        The record.
    """
    import torch

    counts = {row.name: work.counted(row) for row in after.matrices} if after else {}
    chosen = work.options.selection
    settings = Choice(select=chosen.mildest.value, significance=chosen.significance)
    matrices = [row.for_record(counts.get(row.comparison.base.name)) for row in work.rows]
    return RepairRecord(
        tool=Tool(version=__version__, torch=torch.__version__),
        method=work.settings,
        selection=settings,
        max_rank=work.options.max_rank,
        output=None if out is None else as_text(out),
        left_behind=[as_text(name) for name in left_behind],
        before=before,
        matrices=matrices,
        cost=cost_of(matrices),
        after=after,
    )
