"""A record, or several, in Markdown: for a pull request, or the page of a job."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bulkedge._errors import count, printable
from bulkedge.records import Matrix, Record, differences

from .advice import Step, by_worst, steps
from .columns import MARKDOWN, Column, columns_of
from .doubts import settings_of
from .drift import drift_lines
from .gate import Gate, Refused, Repairs, build_fails, failure_lines
from .scale import scale_lines
from .several import columns_of_several, several_line, warnings_of
from .terminal import verdict_line

MOST_ROWS = 50
"""The most rows of all tables of matrices: comments on a pull request have a limit."""
FEWEST_ROWS = 3
"""The fewest of one of several fine-tunes."""


def to_markdown(
    records: Record | Mapping[str, Record],
    columns: Sequence[str] = (),
    gate: Gate | None = None,
    refused: Mapping[str, Refused] | None = None,
    repairs: Repairs | None = None,
) -> str:
    """A summary in Markdown.

    Args:
        records: What to write; several by their names.
        columns: Names of columns besides the usual ones.
        gate: What fails the build; ``Gate()`` if None.
        refused: Why a repair refused matrices, by the names of the records.  That of one record
            alone has the name ``""``.
        repairs: What was repaired before these audits, in sentences, by the names of the records.

    Returns:
        The verdict, what fails the build, and a table of the affected matrices, the worst first.
        Of several, a table of all of them comes first.

    Raises:
        InputError: If there is no column of a name.
    """
    gate, refused, repairs = gate or Gate(), refused or {}, repairs or {}
    if isinstance(records, Record):
        failures = failure_lines(gate.failures(records, refused.get("", {})))
        lines = ["### bulkedge audit", "", _plain(verdict_line(records)), ""]
        lines += _paragraphs([*_repaired(repairs.get("", ())), *_facts(records)])
        lines += [*_failed(records, failures), *_table(records, columns, MOST_ROWS)]
        lines += ["", *(f"- {_step(step)}" for step in steps(records))]
        return "\n".join(lines) + "\n"
    return "\n".join(_several(records, columns, gate, refused, repairs)) + "\n"


def _several(
    records: Mapping[str, Record],
    columns: Sequence[str],
    gate: Gate,
    refused: Mapping[str, Refused],
    repairs: Repairs,
) -> Iterable[str]:
    """Several records: all in a table, then the affected matrices of each."""
    yield from ("### bulkedge audit", "")
    yield from _paragraphs(f"WARNING: {line}" for line in differences(records))
    yield from _paragraphs([several_line(records)])
    shown = columns_of_several(records)
    yield _line("fine-tune", *(column.heading for column in shown))
    yield "|---" * (1 + len(shown)) + "|"
    for name, record in records.items():
        yield _line(_code(name), *(_plain(column.shown(record)) for column in shown))
    yield ""
    yield from (f"- {_plain(line)}" for line in warnings_of(records))
    most = max(FEWEST_ROWS, MOST_ROWS // len(records))
    for name, record in records.items():
        failures = failure_lines(gate.failures(record, refused.get(name, {})))
        table = _table(record, columns, most)
        done = _repaired(repairs.get(name, ()))
        if failures or table or done:
            yield from ("", f"#### {_code(name)}", "", _plain(verdict_line(record)), "")
            yield from (*_paragraphs(done), *_failed(record, failures), *table)


def _repaired(sentences: Sequence[str]) -> list[str]:
    """What was repaired before the audit, in one line."""
    return ["; ".join(("repair: " + sentences[0], *sentences[1:]))] if sentences else []


def _facts(record: Record) -> list[str]:
    """The settings, and how much weaker the update has to be, and its drift."""
    settings = settings_of(record)
    told = [] if settings is None else [f"settings: {settings}"]
    return [*told, *scale_lines(record), *drift_lines(record)]


def _failed(record: Record, failures: Sequence[str]) -> list[str]:
    """What fails the build, a paragraph each."""
    head, rest = build_fails(record)
    return [text for line in failures for text in (f"**{head}** {rest} {_plain(line)}", "")]


def _paragraphs(lines: Iterable[str]) -> list[str]:
    """A paragraph each; a line that starts with two spaces is a command."""
    shown = (_command(line) if line.startswith("  ") else _plain(line) for line in lines)
    return [part for line in shown for part in (line, "")]


def _command(text: str) -> str:
    """Code that no name can end."""
    return f"`{text.strip().replace('`', '')}`"


def _table(record: Record, columns: Sequence[str], most: int) -> list[str]:
    """The affected matrices; nothing without any."""
    affected = by_worst(record)
    shown = columns_of(MARKDOWN, moments=record.inputs.moments is not None, chosen=columns)
    if not affected:
        return []
    more = f"\n… and {count(len(affected) - most, 'more matrix', 'more matrices')}"
    return [
        _line("matrix", *(column.heading for column in shown)),
        "|---" * (1 + len(shown)) + "|",
        *(_row(matrix, shown) for matrix in affected[:most]),
        *([more] if len(affected) > most else []),
    ]


def _step(step: Step) -> str:
    """A step, its command as code."""
    if step.command is None:
        return _plain(step.text)
    return f"{_plain(step.text)} {_command(step.command)}"


def _row(matrix: Matrix, columns: Sequence[Column]) -> str:
    return _line(_code(matrix.name), *(_plain(column.show(matrix)) for column in columns))


def _code(name: str) -> str:
    return f"`{_plain(name).replace('`', '')}`"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Text that Markdown takes for nothing else, on one line."""
    text = printable(text)
    for sign in "\\|<>[]":
        text = text.replace(sign, f"\\{sign}" if sign in "\\|[]" else ("&lt;", "&gt;")[sign == ">"])
    return text
