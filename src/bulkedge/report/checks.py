"""A record for continuous integration: JUnit for its test tab, Markdown for a pull request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

from bulkedge._errors import count, printable
from bulkedge._verdict import COUNTED, Verdict
from bulkedge.records import Matrix, Record

from .advice import Step, by_worst, steps
from .columns import MARKDOWN, Column, columns_of
from .doubts import doubts, part_of, settings_of
from .drift import drift_lines
from .scale import scale_lines
from .terminal import verdict_line

MOST_ROWS = 50
"""The most rows of a Markdown table: comments on a pull request have a limit."""


def to_junit(
    record: Record, fail_on: Verdict = Verdict.ROTATED, refused: Mapping[str, str] | None = None
) -> str:
    """One test case per matrix, as JUnit XML.

    Args:
        record: What to write.
        fail_on: The mildest verdict that is a failure.
        refused: Why a repair refused a matrix, by its name; each is an error.

    Returns:
        XML.  What could not be judged is an error, a doubt a test that was skipped.
    """
    severe = COUNTED[COUNTED.index(fail_on) :]
    suite = ElementTree.Element("testsuite", name=", ".join(_title(record)))
    if (settings := settings_of(record)) is not None:
        properties = ElementTree.SubElement(suite, "properties")
        ElementTree.SubElement(properties, "property", name="settings", value=settings)
    failures = errors = 0
    for matrix in record.matrices:
        case = _case(suite, matrix.name, "bulkedge")
        found = [d for d in matrix.directions if d.verdict in severe]
        open_ = [d for d in matrix.directions if d.verdict is Verdict.UNDECIDED]
        if matrix.status in ("not_finite", "failed") or open_:
            errors += 1
            why = matrix.note or f"{count(len(open_), 'direction')} undecided"
            ElementTree.SubElement(case, "error", message=printable(why))
        elif found:
            failures += 1
            lines = "\n".join(
                f"direction {d.index} ({d.side}): {d.verdict.value}, score {d.score:.3f} "
                f"in [{d.score_lower:.3f}, {d.score_upper:.3f}], sigma {d.sigma:.4g}"
                for d in found
            )
            verb = "is" if len(found) == 1 else "are"
            new = f"{count(len(found), 'direction')} {verb} new"
            failure = ElementTree.SubElement(case, "failure", message=new)
            failure.text = lines
    for row in record.skipped:
        if row.lost:
            errors += 1
            case = _case(suite, row.name, "bulkedge.lost")
            ElementTree.SubElement(case, "error", message=printable(row.reason))
    for name, why in (refused or {}).items():
        errors += 1
        case = _case(suite, name, "bulkedge.repair")
        ElementTree.SubElement(case, "error", message=f"NOT repaired: {printable(why)}")
    doubted = doubts(record)
    for about, doubt in doubted.items():
        case = _case(suite, about, "bulkedge.doubt")
        ElementTree.SubElement(case, "skipped", message=f"doubt: {printable(doubt)}")
    suite.set("tests", str(len(suite.findall("testcase"))))
    suite.set("failures", str(failures))
    suite.set("errors", str(errors))
    suite.set("skipped", str(len(doubted)))
    suite.set("time", f"{record.run.seconds:.3f}")
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(
        suite, encoding="unicode"
    ) + "\n"  # fmt: skip


def to_markdown(record: Record, columns: Sequence[str] = ()) -> str:
    """A summary in Markdown, for a pull request or a job's page.

    Args:
        record: What to write.
        columns: Names of columns besides the usual ones.

    Returns:
        The verdict, and a table of the affected matrices, the worst first.

    Raises:
        InputError: If there is no column of a name.
    """
    affected = by_worst(record)
    shown = columns_of(MARKDOWN, moments=record.inputs.moments is not None, chosen=columns)
    lines = ["### bulkedge audit", "", _plain(verdict_line(record)), ""]
    settings = settings_of(record)
    told = [] if settings is None else [f"settings: {settings}"]
    for line in [*told, *scale_lines(record), *drift_lines(record)]:
        lines += [_plain(line), ""]
    if affected:
        lines += [
            _markdown_line("matrix", *(column.heading for column in shown)),
            "|---" * (1 + len(shown)) + "|",
            *(_markdown_row(matrix, shown) for matrix in affected[:MOST_ROWS]),
        ]
        if len(affected) > MOST_ROWS:
            lines.append(f"\n… and {len(affected) - MOST_ROWS} more")
    lines += ["", *(f"- {_step(step)}" for step in steps(record))]
    return "\n".join(lines) + "\n"


def _title(record: Record) -> list[str]:
    """What a record is of: an audit, or which part of one."""
    part = part_of(record)
    return ["bulkedge audit", *([] if part is None else [part])]


def _step(step: Step) -> str:
    """A step, its command as code that no name can end."""
    if step.command is None:
        return _plain(step.text)
    return f"{_plain(step.text)} `{step.command.replace('`', '')}`"


def _case(suite: ElementTree.Element, name: str, kind: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", name=printable(name), classname=kind)


def _markdown_row(matrix: Matrix, columns: Sequence[Column]) -> str:
    name = f"`{_plain(matrix.name).replace('`', '')}`"
    return _markdown_line(name, *(_plain(column.show(matrix)) for column in columns))


def _markdown_line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Text that Markdown takes for nothing else, on one line."""
    text = printable(text)
    for sign in "\\|<>[]":
        text = text.replace(sign, f"\\{sign}" if sign in "\\|[]" else ("&lt;", "&gt;")[sign == ">"])
    return text
