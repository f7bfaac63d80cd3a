"""A repair in a terminal: what was done to each matrix, and what it cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bulkedge._errors import count

from .names import short_name
from .terminal import MAX_ROWS, no_fine_tune, print_line, warning_lines

if TYPE_CHECKING:
    from bulkedge.repairing import RepairedMatrix, RepairRecord

LEFT = "nothing as significant as asked for, or nothing to take"
NOTABLE_LOSS = 1e-3
"""A table of repairs has a column of losses if one exceeds this: what dtype or rank left out."""


def print_repair(record: RepairRecord, console: Console, *, brief: bool = False) -> None:
    """Print what was done to each matrix, and what the audit of the output found.

    Args:
        record: What to show.
        console: Where.
        brief: Only the verdict, and what may change what a reader makes of it.
    """
    done = [row for row in record.matrices if row.status == "repaired"]
    if not brief:
        if done:
            console.print(_repaired_table(done[:MAX_ROWS]))
            print_line(
                console, "(changed: Frobenius norm of the correction over that of the update)"
            )
            console.print()
        if len(done) > MAX_ROWS:
            more = count(len(done) - MAX_ROWS, "more matrix", "more matrices")
            console.print(f"… and {more}: see the record")
        left = [row for row in record.matrices if row.status == "left"]
        for line in _grouped(left, "left as it was", LEFT):
            print_line(console, line)
        for name in record.left_behind:
            print_line(console, f"not carried over: {name}")
    print_line(console, repair_line(record))
    for line in cost_lines(record)[brief:]:  # of the verdict alone a warning is a part
        print_line(console, line)
    refused = [row for row in record.matrices if row.status == "refused"]
    for line in (*_grouped(refused, "NOT repaired"), *_grouped(done, "in doubt")):
        print_line(console, line)
    for line in warning_lines(record.after or record.before):
        print_line(console, line)


def _grouped(rows: Iterable[RepairedMatrix], what: str, otherwise: str = "") -> list[str]:
    """One line for each note on some matrices, with the first as example."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        if note := row.note or otherwise:
            groups.setdefault(note, []).append(row.name)
    return [
        f"{what}: {f'{len(names)}, such as ' if len(names) > 1 else ''}{names[0]}: {note}"
        for note, names in groups.items()
    ]


def _drift(rows: list[RepairedMatrix]) -> str:
    """The mean drift of the matrices where it was measured; nothing without any."""
    pairs = [(r.drift_before, r.drift_after) for r in rows if r.drift_before is not None]
    if not pairs:
        return ""
    before, after = (
        sum(x or 0.0 for x in column) / len(pairs) for column in zip(*pairs, strict=True)
    )
    return f"; mean drift on the base's inputs {before:.3g} before, {after:.3g} after"


def _task_change(record: RepairRecord) -> str:
    """How much of what the updates do to the task's inputs has changed; nothing if not measured."""
    known = [r.task_change for r in record.matrices if r.task_change is not None]
    if not known:
        return ""
    return f", and what it does to the task's inputs by {sum(known) / len(known):.0%} (mean square)"


def _refused(record: RepairRecord) -> str:
    """How many matrices should have been treated and were not; nothing without any."""
    refused = [row for row in record.matrices if row.status == "refused"]
    if not refused:
        return ""
    every = count(len(record.matrices), "matrix", "matrices")
    measured = any(row.drift_before is not None for row in record.matrices)
    return (
        f"; {len(refused)} of {every} to be treated REFUSED, such as {refused[0].name}"
        f"{' (not in the mean)' if measured else ''}"
    )


def _unjudged(record: RepairRecord) -> str:
    """That the fine-tune was not judged as a whole; nothing where it was."""
    if record.before.summary.complete:
        return ""
    return f"; {no_fine_tune(record.before) or 'not everything could be judged'}"


def repair_line(record: RepairRecord) -> str:
    """What the repair did, in one sentence."""
    before = record.before.summary.new_directions
    done = [row for row in record.matrices if row.status == "repaired"]
    touched = len(done)
    if record.after is None:
        if not done and (refused := _refused(record) or _unjudged(record)):
            return f"nothing can be repaired{refused}"
        treated = sum(row.intruders_before for row in done)
        matrices, new = count(touched, "matrix", "matrices"), count(treated, "direction")
        mean = f"{_drift(done)}{_refused(record)}"
        return f"would repair {matrices} with {new} new{mean}"
    after, name = record.after.summary, record.method["name"]
    line = (
        f"{name}: {count(before, 'direction')} new before, "
        f"{after.new_directions} after, {touched} of {count(after.matrices, 'matrix', 'matrices')} "
        f"changed{_drift(done)}{_refused(record)}"
    )
    if not after.complete:
        line += "; the audit of the output is NOT complete, see bulkedge audit"
    return line


def cost_lines(record: RepairRecord) -> list[str]:
    """What the repair costs, and in how many matrices, in one sentence; a warning if it is much."""
    if (cost := record.cost) is None:
        return []
    done = sum(row.status == "repaired" for row in record.matrices)
    every = record.before.summary.matrices
    where = "" if done == every else f" in {done} of {count(every, 'matrix', 'matrices')}"
    if record.method["name"] == "protect":  # which may well move more than there was
        return [
            f"the update was redirected{where}, by {cost.mean:.0%} of its own norm on average"
            f"{_task_change(record)}; evaluate the task, and what you wanted to keep, before you "
            "ship"
        ]
    worst = cost.matrix.removesuffix(".weight")
    if done == 1:
        changed = f"the update{where} ({worst})"
    else:
        changed = f"each update that it changed{where}" if where else "each update"
        changed += f" on average, at most {cost.most:.0%} ({worst})"
    line = f"the repair changed {cost.mean:.0%} of {changed}: evaluate before you ship"
    if not cost.heavy:
        return [line]
    if cost.heavy == "most":
        gone = "one matrix's update is gone"
    else:
        on_average = ", on average of these" if where and done > 1 else ""
        gone = f"the update is gone{where}{on_average}"
    return [line, f"WARNING: more than half of {gone}, and perhaps what it had learned"]


def _repaired_table(rows: Sequence[RepairedMatrix]) -> Table:
    """One row per repaired matrix: its new directions, rank, and how far it moved."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("matrix", overflow="fold")
    lossy = any(row.loss > NOTABLE_LOSS for row in rows)
    for header in ("new before", "new after", "rank", "changed", *(["lost"] if lossy else [])):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        after = "–" if row.intruders_after is None else str(row.intruders_after)
        rank = "–" if row.rank_before is None else f"{row.rank_before}→{row.rank_after}"
        table.add_row(
            Text(short_name(row.name)),
            str(row.intruders_before),
            Text(after, style="red" if row.intruders_after else ""),
            rank,
            f"{row.change:.0%}",
            *([f"{row.loss:.1%}"] if lossy else []),
        )
    return table
