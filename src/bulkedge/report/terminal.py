"""A record in a terminal: a table of what was found, the verdict in one line, then hints.

Names come out of files that strangers made: they are cleaned of control characters and passed to
rich as plain ``Text``, never as markup.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bulkedge._errors import count, printable
from bulkedge._verdict import COUNTED, Verdict
from bulkedge.records import Counts, Matrix, Record, Skipped

from .advice import broken, by_worst, steps
from .base_name import unknown_name
from .certainty import certainty_lines, undecided_lines
from .columns import TERMINAL, Column, columns_of
from .commands import Taken, unseen
from .doubts import doubts, odd_sizes, part_of, settings_of
from .drift import drift_lines
from .gate import indistinct
from .names import folded, short_name
from .scale import scale_lines

MAX_ROWS = 40
MAX_STEPS = 3


def print_record(
    record: Record,
    console: Console,
    *,
    brief: bool = False,
    columns: Sequence[str] = (),
    taken: Taken = unseen,
) -> None:
    """Print the table of affected matrices and the verdict.

    Args:
        record: What to show.
        console: Where.
        brief: Only the verdict, and what may change what a reader makes of it.
        columns: Names of columns besides the usual ones.
        taken: Whether something has a name already, in the folder in which commands will run.

    Raises:
        InputError: If there is no column of a name.
    """
    affected = by_worst(record)
    affected += [matrix for matrix in odd_sizes(record) if not matrix.new_directions]
    if not brief and affected:
        console.print(_table(affected[:MAX_ROWS], _columns(record, columns), console.width))
        console.print()
        if (rest := len(affected) - MAX_ROWS) > 0:
            fewer = count(rest, "matrix", "matrices")
            console.print(f"… and {fewer} less affected: see the record (--output)")
    print_line(console, verdict_line(record))
    lines = warning_lines(record)
    for line in lines if brief else [*lines, *_hints(record, taken)]:
        print_line(console, line)
    if not brief:
        told = [step for step in steps(record, taken) if step.command or step.brief]
        for step in told[:MAX_STEPS]:
            print_line(console, f"next: {step.brief or step.text}")
            if step.command:
                print_line(console, f"  {step.command}")


def warning_lines(record: Record) -> list[str]:
    """What may change what a reader makes of the verdict; a quiet view has it, too.

    Args:
        record: An audit.

    Returns:
        Lines.
    """
    lines = [
        f"not audited: {matrix.name}: {matrix.note}{_remedy(matrix)}" for matrix in broken(record)
    ]
    lines += _skipped_lines(row for row in record.skipped if row.lost)
    lines += undecided_lines(record)
    lines += [f"doubt: {doubt}" for doubt in doubts(record).values()]
    if (settings := settings_of(record)) is not None:
        lines.append(f"settings: {settings}")
    return lines + drift_lines(record)


def _hints(record: Record, taken: Taken) -> list[str]:
    """What else a reader should know."""
    lines = certainty_lines(record)
    lines += _skipped_lines(row for row in record.skipped if not row.lost)
    if (note := unknown_name(record)) is not None:
        lines.append(note)
    if rounded := record.inputs.base.quantised:
        lines.append(f"base: quantised, {rounded}: judged as it is read back")
    lines += scale_lines(record, taken)
    lines += spikes_lines(record)
    if record.summary.tensors is not None:
        lines.append(tensors_line(record.summary.tensors))
    return lines


def verdict_line(record: Record) -> str:
    """What the audit found, in one sentence."""
    part = part_of(record)
    return _verdict_line(record) if part is None else f"{part}: {_verdict_line(record)}"


def _verdict_line(record: Record) -> str:
    """The same of a part of an audit, without saying that it is one."""
    summary = record.summary
    if (nothing := no_fine_tune(record)) is not None:
        return nothing
    affected = sum(1 for matrix in record.matrices if matrix.new_directions)
    counts = [f"{summary.verdicts[verdict]} {verdict.value}" for verdict in COUNTED]
    judged = sum(summary.verdicts.values())
    are = "is" if summary.new_directions == 1 else "are"
    line = (
        f"{summary.new_directions} of {count(judged, 'leading direction')} {are} new "
        f"(score < {record.recipe.epsilon:g}), in {affected} of "
        f"{count(summary.audited, 'matrix', 'matrices')}: {', '.join(counts)}"
    )
    if len(record.recipe.sides) > 1:
        line += f" ({_by_side(record)})"
    if alike := indistinct(record):
        line += (
            f"; {len(alike)} of the rotated could not be distinguished from intruders, because "
            "2·top_k directions span the whole space there: use a smaller --top-k "
            "(--fail-on intruder counts them)"
        )
    if summary.unchanged:
        line += f"; {count(summary.unchanged, 'matrix', 'matrices')} unchanged"
    if summary.verdicts[Verdict.UNDECIDED]:
        line += f"; {count(summary.verdicts[Verdict.UNDECIDED], 'direction')} UNDECIDED"
    if summary.not_audited:
        its = "its" if summary.not_audited == 1 else "their"
        unaudited = count(summary.not_audited, "matrix", "matrices")
        line += f"; {unaudited} could NOT be audited ({its} tensors count as lost)"
    if summary.lost:
        lost = count(summary.lost, "tensor")
        line += f"; {lost} NOT judged (--exclude accepts that{_or_partial(record)})"
    return line


def no_fine_tune(record: Record) -> str | None:
    """That a fine-tune is none; None where any matrix differs from the base, or is unjudged."""
    equal = record.summary.unchanged
    if equal < record.summary.matrices or record.summary.lost:
        return None
    matrices = "the matrix equals" if equal == 1 else f"all {equal} matrices equal"
    return f"{matrices} the base: there is no fine-tune here"


def _remedy(matrix: Matrix) -> str:
    """What to do about a matrix that holds NaN or Inf; a failure has its own message."""
    if matrix.status != "not_finite":
        return ""
    return "; save the model again, or download it again, or --exclude this matrix"


def _or_partial(record: Record) -> str:
    """The other way to accept weights that are not stored."""
    absent = any(row.lost and row.side == "base" for row in record.skipped)
    return ", --partial weights that are not stored" if absent else ""


def spikes_lines(record: Record) -> list[str]:
    """How much of a low-rank update is strong enough to stand among the leading directions."""
    spikes, beyond = record.summary.spikes, record.summary.beyond_top_k_threshold
    if not spikes or beyond is None:
        return []
    exceed = "exceeds" if beyond == 1 else "exceed"
    its = "its" if spikes == 1 else "their"
    return [
        f"hint: {beyond} of {count(spikes, 'spike')} of the update {exceed} the limit θ_k of {its} "
        "matrix"
    ]


def tensors_line(counts: Counts) -> str:
    """What became of every tensor of two or more dimensions."""
    fates = [
        f"{counts.compared} compared",
        f"{counts.equal} equal",
        f"{counts.lost} lost",
        f"{counts.excluded} excluded",
        f"{counts.apart} without a counterpart to compare with",
    ]
    return (
        f"files: {count(counts.base, 'tensor')} of two or more dimensions in the base and "
        f"{counts.tuned} in the fine-tune: {', '.join(fates)}"
    )


def _by_side(record: Record) -> str:
    """The new directions of each side."""
    counts = Counter(
        direction.side
        for matrix in record.matrices
        for direction in matrix.directions
        if direction.score < record.recipe.epsilon
    )
    return ", ".join(f"{side} {counts[side]}" for side in record.recipe.sides)


def _columns(record: Record, chosen: Sequence[str]) -> list[Column]:
    """The columns of the table of a record: what was measured, and what was asked for."""
    if record.recipe.critical_scale:
        chosen = [*chosen, "critical_scale"]
    return columns_of(TERMINAL, moments=record.inputs.moments is not None, chosen=chosen)


def _table(matrices: Sequence[Matrix], columns: Sequence[Column], width: int) -> Table:
    """One row per matrix, its worst direction in view."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("matrix", overflow="fold")
    for column in columns:
        table.add_column(column.short or column.heading, justify="right", no_wrap=True)
    room = width - sum(1 + _width(column, matrices) for column in columns)
    for matrix in matrices:
        cells = (_cell(column, matrix) for column in columns)
        table.add_row(Text("\n".join(folded(short_name(matrix.name), room))), *cells)
    return table


def _width(column: Column, matrices: Iterable[Matrix]) -> int:
    """The width of a column: of its heading, or of its longest value."""
    heading = column.short or column.heading
    return max(map(cell_len, (heading, *(column.show(matrix) for matrix in matrices))))


def _cell(column: Column, matrix: Matrix) -> Text:
    """One value, in the style of its column unless it is zero."""
    style = column.style if column.value(matrix) else ""
    return Text(printable(column.show(matrix)), style=style)


def _name(name: str) -> Text:
    """The same as text that is no markup."""
    return Text(short_name(name))


def _skipped_lines(skipped: Iterable[Skipped]) -> list[str]:
    """One line per reason, with the first name as example; what is lost is said loudly."""
    groups: dict[tuple[bool, str], list[Skipped]] = {}
    for row in skipped:
        # the nearest names in parentheses belong to one row, not to the reason
        groups.setdefault((row.lost, row.reason.partition(" (")[0]), []).append(row)
    lines = []
    for (lost, _), rows in groups.items():
        first = rows[0]
        done = "NOT judged" if lost else "skipped"
        count = f"{len(rows)}, such as " if len(rows) > 1 else ""
        lines.append(f"{done}: {count}{first.name}: {first.reason}")
    return lines


def print_line(console: Console, text: str) -> None:
    """Print text without markup; a pipe gets it on one line, and anything a command.

    A command begins with two spaces, and is to be copied in one piece.

    Args:
        console: Where.
        text: What.
    """
    whole = text.startswith("  ") or not console.is_terminal
    console.print(Text(printable(text), overflow="fold"), soft_wrap=whole)
