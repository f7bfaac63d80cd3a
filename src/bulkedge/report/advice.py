"""What a record says in a line, how certain that is, and what to do about it, as commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from bulkedge._errors import count, printable
from bulkedge._verdict import COUNTED, Verdict
from bulkedge.records import Matrix, Record

from .certainty import certainty
from .columns import worst_score
from .commands import (
    BASE_MOMENTS,
    PROTECTED,
    REPAIRED,
    Taken,
    audit_command,
    free,
    page_command,
    protect_command,
    repair_command,
    unseen,
)
from .doubts import doubts, is_all_noise, part_of, untrained
from .drift import is_notable
from .merging import MERGED, is_of_factors, merge, merged, to_be_merged
from .verdicts import APPEARANCE

NEAR = 0.05
"""A worst score that exceeds ε by less is mentioned: other data could have put it below."""
FEW = 3
"""The most matrices that a step names."""
EXPERT = re.compile(r"\[\d+[\],]")
"""What of the name of an update says that it is one of several in a tensor."""


@dataclass(frozen=True)
class Step:
    """Something to do next.

    Attributes:
        text: What and why, a sentence that a command may follow.
        command: For a shell, or a line of Python; None if words say it all.
        brief: What and why in a few words, for a terminal; None where the text is brief, or a step
            without a command is for the page alone.
    """

    text: str
    command: str | None = None
    brief: str | None = None


def headline(record: Record) -> str:
    """What was found, in a few words."""
    if (part := part_of(record)) is not None:
        return f"{part[0].upper()}{part[1:]}: {_headline(record)}"
    return _headline(record)


def _headline(record: Record) -> str:
    """The same of a part of an audit, without saying that it is one."""
    summary = record.summary
    if summary.unchanged == summary.matrices and not summary.lost:
        return "Nothing was changed: no matrix differs from the base"
    open_ = summary.not_audited + summary.lost
    if open_:
        rest = f"{count(open_, 'matrix', 'matrices')} could not be judged"
        return f"{_found(record)}; {rest}" if summary.new_directions else rest[0].upper() + rest[1:]
    if summary.verdicts[Verdict.UNDECIDED] and not summary.new_directions:
        undecided = summary.verdicts[Verdict.UNDECIDED]
        return f"No new direction found, {count(undecided, 'direction')} undecided"
    return _found(record)


def _found(record: Record) -> str:
    audited = record.summary.audited
    if not record.summary.new_directions:
        return f"No new direction in {count(audited, 'matrix', 'matrices')}"
    affected = sum(matrix.new_directions > 0 for matrix in record.matrices)
    new = count(record.summary.new_directions, "new direction")
    return f"{new} in {affected} of {count(audited, 'matrix', 'matrices')}"


def explanation(record: Record) -> list[str]:
    """How many, how far, how certain: sentences."""
    judged = sum(record.summary.verdicts.values())
    if not judged:
        return []
    sentences = [_counted(record, judged)]
    noise = sum(matrix.new_directions for matrix in untrained(record))
    if noise:
        where = "is in a matrix" if noise == 1 else "are in matrices"
        sentences.append(f"{noise} of the new ones {where} whose base looks untrained.")
    scores = [_lowest(matrix) for matrix in record.matrices]
    sentences.append(
        f"The lowest score is {min(scores):.2f}; 1 means that the base had the direction, 0 that "
        "it is wholly new."
    )
    close = sum(0 <= score - record.recipe.epsilon < NEAR for score in scores)
    if close:
        sentences.append(
            f"{count(close, 'matrix has', 'matrices have')} a score less than {NEAR:g} above "
            "the limit."
        )
    sentences.append(certainty(record))
    return sentences


def _counted(record: Record, judged: int) -> str:
    """How many of the judged directions are new."""
    found, epsilon = record.summary.new_directions, f"{record.recipe.epsilon:g}"
    leading = f"{count(judged, 'leading singular direction')} of the tuned matrices"
    if not found:
        return f"None of the {leading} is new (score below {epsilon})."
    clauses = ", ".join(_clause(record, verdict) for verdict in COUNTED)
    return (
        f"Of the {leading}, {count(found, 'has', 'have')} no counterpart in the base (score below "
        f"{epsilon}): {clauses}."
    )


def _clause(record: Record, verdict: Verdict) -> str:
    """How many of the counted directions have a verdict, in words."""
    found = count(record.summary.verdicts[verdict], *APPEARANCE[verdict].clauses)
    return f"{found} ({verdict.value})"


def steps(record: Record, taken: Taken = unseen) -> list[Step]:
    """What to do next, the most pressing first.

    Args:
        record: An audit.
        taken: Whether something has a name already, in the folder in which commands will run.

    Returns:
        At least one.
    """
    found = [*_doubts(record), *_against_drift(record, taken), *_remedies(record, taken)]
    return list(dict.fromkeys(found)) or [
        Step(
            "Nothing to take out. An audit sees singular directions only: evaluate your task, and "
            "what the model could do before."
        )
    ]


def _doubts(record: Record) -> Iterator[Step]:
    """What stands in the way of trusting the rest."""
    if failed := broken(record):
        first = failed[0]
        yield Step(
            f"{count(len(failed), 'matrix', 'matrices')} could not be judged, such as "
            f"{printable(first.name)} ({printable(first.note or first.status)}): save the model "
            "again, or download it again, then audit it anew."
        )
    lost = [row for row in record.skipped if row.lost]
    if lost:
        yield Step(
            f"{count(len(lost), 'update')} went unjudged, such as {printable(lost[0].name)}: "
            f"{printable(lost[0].reason)}"
        )
    yield from map(Step, doubts(record).values())
    if record.summary.verdicts[Verdict.UNDECIDED]:
        yield Step(
            "Decide the undecided directions with full SVDs:",
            audit_command(record, "--method", "dense"),
        )


def _remedies(record: Record, taken: Taken) -> Iterator[Step]:
    """What to do about new directions."""
    found = record.summary.new_directions
    if not found or is_all_noise(record):
        return
    fresh = [matrix for matrix in untrained(record) if matrix.new_directions]
    left_out = left_out_globs(record)
    if fresh:
        names = ", ".join(printable(_module(matrix)) for matrix in fresh[:FEW])
        few = bool(left_out)
        yield Step(
            f"{names}{'' if few else ' and others'}: the base looks like noise. If it was never "
            "pretrained, everything is new there; leave it out"
            f"{':' if few else ' with --exclude.'}",
            audit_command(record, *left_out) if few else None,
            f"leave out {names}, whose base looks untrained: all is new there" if few else None,
        )
    if sum(matrix.new_directions for matrix in fresh) < found:
        yield from _against_forgetting(record, taken)
        yield from _repaired_copy(record, left_out, taken)
    if record.inputs.tuned.kind == "lora":
        yield Step(
            "If you train again, mix in texts like those to keep, with the base's outputs as their "
            "target. In our study this kept most of what the base could do. SpikeClip from "
            "bulkedge.tune leaves fewer new directions, but did not keep more of it:",
            "SpikeClip(model).attach(optimizer)",
            "train with fewer new directions next time, with SpikeClip from bulkedge.tune",
        )


def _repaired_copy(record: Record, left_out: list[str], taken: Taken) -> Iterator[Step]:
    """A copy without new directions; or, where none can be written, why, and what to do instead."""
    written = record if is_of_factors(record) else _written(record, taken)
    treated = [m for m in written.matrices if m.new_directions and not _is_left_out(m, left_out)]
    if (step := _no_copy(treated)) is not None:
        yield step
        return
    if not is_of_factors(record):
        yield from _merge_first(record, taken)
    copy = free(REPAIRED, taken)
    fixed = sum(m.read_only is not None for m in treated)
    refused = f"{fixed} of {count(len(treated), 'matrix', 'matrices')}" if fixed else ""
    without = ", without what was never pretrained" if left_out else ""
    yield Step(
        f"Write a copy that has no new directions{without}. It costs some of the task: in our "
        "study about a point of accuracy, and it gave back little of what was forgotten. "
        + (f"{_first_fixed(treated)}: the repair refuses {refused}. " if fixed else "")
        + "Evaluate the copy:",
        repair_command(written, *left_out, output=copy),
        f"write a copy without new directions{without}; it costs some of the task, evaluate it"
        + (f"; it refuses {refused}, which cannot be written" if fixed else ""),
    )
    yield Step(
        "Look at both audits on one page:",
        page_command(copy, taken),
        "look at both audits on one page",
    )


def _is_left_out(matrix: Matrix, left_out: list[str]) -> bool:
    """Whether the options of :func:`left_out_globs` leave a matrix out."""
    return _module(matrix) in left_out


def _no_copy(treated: list[Matrix]) -> Step | None:
    """Why no repaired copy can be written, and what to do instead; None if one can."""
    if not treated or any(matrix.read_only is None for matrix in treated):
        return None
    why = _first_fixed(treated)
    return Step(f"A repair cannot write a copy. {why}.", None, f"a repair writes no copy: {why}")


def _first_fixed(treated: list[Matrix]) -> str:
    """The first of some matrices that cannot be written, and why."""
    first = next(matrix for matrix in treated if matrix.read_only is not None)
    return f"{printable(first.name)}: {printable(first.read_only or '')}"


def _changed(record: Record) -> list[Matrix]:
    """The matrices that a repair of the whole update treats."""
    return [matrix for matrix in record.matrices if matrix.status == "audited"]


def _against_forgetting(record: Record, taken: Taken) -> Iterator[Step]:
    """The remedy that gave back most at equal accuracy (docs/study.md), where none was named."""
    if record.inputs.moments is not None:
        return
    evaluate = (
        "New directions do not show what a model has forgotten: evaluate what it could do before."
    )
    written = _written(record, taken)
    if _no_copy(_changed(written)) is not None or _are_all_experts(record):
        yield Step(evaluate)
        return
    yield from _merge_first(record, taken)
    if taken(BASE_MOMENTS):
        yield Step(
            f"{evaluate} If it lost abilities, give them back without training, by {BASE_MOMENTS} "
            "of this folder:",
            protect_command(
                written, BASE_MOMENTS, *left_out_globs(record), output=free(PROTECTED, taken)
            ),
            f"if it forgot, give it back without training, by {BASE_MOMENTS} of this folder",
        )
        return
    measure = _moments_command(record)
    of = "" if written is record else f" of {written.inputs.tuned.path}"
    brief = f"if it forgot, measure moments on texts to keep, for repair --method protect{of}"
    yield Step(
        f"{evaluate} If it lost abilities, measure moments on texts like those to keep; "
        "bulkedge repair --method protect and bulkedge frontier take them:",
        measure,
        brief if measure else None,
    )


def _are_all_experts(record: Record) -> bool:
    """Whether all that was changed are experts, whose inputs are not measured."""
    changed = _changed(record)
    return bool(changed) and all(EXPERT.search(matrix.tuned_name) for matrix in changed)


def _merge_first(record: Record, taken: Taken) -> Iterator[Step]:
    """How to merge a fine-tune that protect refuses as it is."""
    if (method := to_be_merged(record)) is None:
        return
    what = "protect and rescale" if is_of_factors(record) else "a repair"
    folder = free(MERGED, taken)
    how = merge(record, folder)
    yield Step(
        f"{printable(method)}: {what} cannot change it as it is stored. Merge it into the model "
        f"first, then use the folder {folder}{how.note}{':' if how.line else '.'}",
        how.line,
        f"{printable(method)}: for {what}, merge it first, into {folder}{how.note}",
    )


def _written(record: Record, taken: Taken) -> Record:
    """The record as that of the form that protect can change."""
    return record if to_be_merged(record) is None else merged(record, free(MERGED, taken))


def _moments_command(record: Record) -> str | None:
    """Moments of the base, which takes the folder of a model."""
    path = record.inputs.base.path
    if path.endswith(".safetensors"):
        return None
    return f"bulkedge moments {shlex.quote(printable(path))} keep.txt -o {BASE_MOMENTS}"


def left_out_globs(record: Record) -> list[str]:
    """Options that leave out the matrices with new directions whose base looks untrained.

    Args:
        record: An audit.

    Returns:
        ``--exclude`` and a name for each; nothing where there are none, or too many to name.
    """
    names = dict.fromkeys(_module(m) for m in untrained(record) if m.new_directions)
    if not names or len(names) > FEW or is_all_noise(record):
        return []
    return [word for name in names for word in ("--exclude", name)]


def _module(matrix: Matrix) -> str:
    """The name of a matrix as a glob that matches all its blocks."""
    return matrix.name.partition("[")[0].removesuffix(".weight")


def _against_drift(record: Record, taken: Taken) -> Iterator[Step]:
    """What to do about outputs that have moved."""
    moments, drift = record.inputs.moments, record.summary.drift
    if moments is None or drift is None or not is_notable(record):
        return
    written = _written(record, taken)
    if (step := _no_copy(_changed(written))) is not None:
        yield step
        return
    yield from _merge_first(record, taken)
    yield Step(
        f"The update changes {drift.mean or 0.0:.2%} of the mean square of a layer's outputs on "
        "the inputs of the moments. If the model has lost abilities, give them back without "
        "training; --task-moments keep more of the task:",
        protect_command(
            written, moments.path, *left_out_globs(record), output=free(PROTECTED, taken)
        ),
        "give back what was forgotten, without training; --task-moments keep more of the task",
    )


def broken(record: Record) -> list[Matrix]:
    """What could not be audited."""
    return [m for m in record.matrices if m.status in ("not_finite", "failed")]


def by_worst(record: Record) -> list[Matrix]:
    """The matrices with new directions, the lowest score first."""
    affected = [matrix for matrix in record.matrices if matrix.new_directions]
    return sorted(affected, key=_lowest)


def _lowest(matrix: Matrix) -> float:
    """The lowest score of a matrix; 1 where nothing was judged."""
    worst = worst_score(matrix)
    return 1.0 if worst is None else worst
