"""A record, or several, as one HTML file that opens offline and asks nothing of the network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard, Union

from bulkedge._errors import InputError, printable
from bulkedge.intruder import DEFAULT_EPSILON, Verdict
from bulkedge.records import Matrix, Record, differences
from bulkedge.repairing import RepairRecord

from .advice import by_worst, explanation, headline, steps
from .base_name import compare_names
from .columns import (
    CHOICES,
    PAGE,
    TERMINAL,
    columns_of,
    over_base,
    over_top_k_threshold,
    worst_score,
)
from .commands import is_relative
from .curve import matrix_curve, whole_curve
from .doubts import settings_of, untrained
from .drift import drift_sentences
from .gate import Gate, build_fails, failure_lines
from .names import short_name
from .parts import document, filled, part
from .scale import scale_sentences, scale_steps, told_weaker
from .static import without_script
from .verdicts import APPEARANCE, REPORTED, is_counted

MAX_ROWS = 40
"""So many matrices are listed where no script runs."""
NAMES = {
    "same": ", as given.",
    "other": "; the base given has another name.",
    "unknown": "; the base given has no name to compare.",
}
REPAIRED = "This is the fine-tune before its repair: see the audit after it, on this page."
Shown = Union[Record, RepairRecord]  # noqa: UP007 — Python 3.10


def to_html(
    records: Shown | Sequence[Shown],
    labels: Sequence[str] | None = None,
    columns: Sequence[str] = (),
    gate: Gate | None = None,
) -> str:
    """One self-contained page.

    A verdict and what to do next, a map of the model, a table of its matrices, and the charts of
    each; several records side by side: LoRA against full fine-tuning, before and after a repair.

    Args:
        records: What to show; the record of a repair stands for its audits before and after.
        labels: What to call the audits; the names of what was audited if None.
        columns: Names of columns of the table of matrices besides the usual ones.
        gate: What fails the build, which the page then says; None for a page that does not.

    Returns:
        HTML.  A policy in it forbids every request and every script but its own.

    Raises:
        InputError: If there are no records, not as many labels, or no column of a name.
    """
    given = [records] if isinstance(records, (Record, RepairRecord)) else list(records)
    audits = [audit for record in given for audit in _audits(record)]
    repaired = [id(record.before) for record in given if _is_done(record)]
    chosen = [audit for _, audit in audits]
    names = _names([name for name, _ in audits], labels)
    shown = {
        "records": [
            _condensed(record, name, gate, repaired=id(record) in repaired)
            for record, name in zip(chosen, names, strict=True)
        ],
        "open": 1 if len(given) == 1 and repaired else 0,
        "comparison": _compared(chosen, names),
        "mixed": differences(dict(zip(names, chosen, strict=True))),
        "columns": _columns(columns),
        "verdicts": [[verdict.value, is_counted(verdict)] for verdict in REPORTED],
    }
    slots = {
        "epsilon": f"{DEFAULT_EPSILON:g}",
        "counted": ", ".join(verdict.value for verdict in REPORTED if is_counted(verdict)),
        "meanings": "\n".join(map(_meaning, REPORTED)),
        "choices": "".join(map(_choice, _gravest_first())),
    }
    return document(
        filled(part("report.html"), slots),
        "audit",
        title=names[0],
        subtitle=" / ".join(names),
        script="report.js",
        css=_colours() + part("report.css"),
        shown=shown,
        unscripted="\n".join(
            (
                *(f'<p class="warning">{html.escape(line)}</p>' for line in shown["mixed"]),
                *map(partial(_unscripted, several=len(chosen) > 1), chosen, shown["records"]),
            )
        ),
    )


def named_audits(records: Sequence[Shown], labels: Sequence[str] | None = None) -> list[str]:
    """What several records are called where each stands for its last audit.

    Args:
        records: The records.
        labels: Names that were chosen; those of what was audited if None.

    Returns:
        A name for each, no two alike.

    Raises:
        InputError: If there are not as many labels, or two are alike.
    """
    names = _names([_audits(record)[-1][0] for record in records], labels)
    if len(set(names)) != len(names):
        raise InputError("expected labels of which no two are alike, got one twice")
    return names


def _names(found: Sequence[str], labels: Sequence[str] | None) -> list[str]:
    """The labels, or what was found; each once."""
    if not found:
        raise InputError("expected at least one record, got none")
    if labels is None:
        return _numbered(found)
    if len(labels) != len(found):
        raise InputError(f"expected {len(found)} labels, one for each audit, got {len(labels)}")
    return list(labels)


def _unscripted(record: Record, shown: dict[str, Any], *, several: bool) -> str:
    """A record where no script runs: its verdict, what to do next, and the worst matrices."""
    columns = columns_of(TERMINAL, moments=record.inputs.moments is not None)
    rows = [
        [short_name(matrix.name), *(printable(column.show(matrix)) for column in columns)]
        for matrix in by_worst(record)[:MAX_ROWS]
    ]
    return without_script(
        shown["headline"],
        shown["explanation"],
        label=shown["label"] if several else "",
        steps=[(text, command) for text, command in shown["steps"] + shown["copy"]],
        table=[["matrix", *(column.heading for column in columns)], *rows],
        about=shown["about"],
    )


def _gravest_first() -> list[Verdict]:
    """The verdicts as they are offered for a choice: counted ones first, the gravest foremost."""
    counted = [verdict for verdict in REPORTED if is_counted(verdict)]
    return [*reversed(counted), *(verdict for verdict in REPORTED if not is_counted(verdict))]


def _colours() -> str:
    """The colours of the verdicts, for charts and for the tags of a table."""
    colours = "".join(
        f"  --{verdict.value}: light-dark({look.light}, {look.dark});\n"
        for verdict, look in APPEARANCE.items()
    )
    tags = "".join(f".tag.{v.value} {{ color: var(--{v.value}); }}\n" for v in APPEARANCE)
    return f":root {{\n{colours}}}\n{tags}"


def _meaning(verdict: Verdict) -> str:
    """What a verdict says, for the list of words."""
    meaning = html.escape(APPEARANCE[verdict].meaning, quote=False)
    return f"<dt>{verdict.value}</dt><dd>{meaning}</dd>"


def _choice(verdict: Verdict) -> str:
    """A choice of matrices, those that have directions with a verdict."""
    several = html.escape(APPEARANCE[verdict].several)
    return f'<option value="{verdict.value}">with {several}</option>'


def _columns(chosen: Sequence[str]) -> list[dict[str, Any]]:
    """The columns of the page's table: all that it needs besides their values."""
    return [
        {
            "id": column.name,
            "heading": column.heading,
            "lowFirst": column.low_first,
            "wide": column.wide,
            "ifAny": column.if_any,
            "ofMoments": column.of_moments,
        }
        for column in columns_of(PAGE, chosen=chosen)
    ]


def _audits(record: Shown) -> list[tuple[str, Record]]:
    """The audits of a record, each with the name of what was audited."""
    if isinstance(record, Record):
        return [(printable(Path(record.inputs.tuned.path).name or "tuned"), record)]
    ((name, before),) = _audits(record.before)
    after = [] if record.after is None else [(f"{name}, repaired", record.after)]
    return [(f"{name}, as trained", before), *after]


def _is_done(record: Shown) -> TypeGuard[RepairRecord]:
    """Whether a record is of a repair that was written, with both of its audits."""
    return isinstance(record, RepairRecord) and record.after is not None


def _numbered(names: Sequence[str]) -> list[str]:
    """Names, with a number where one comes again."""
    return [
        f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def _compared(records: Sequence[Record], names: Sequence[str]) -> str:
    """How many new directions each record has, in a line."""
    counts = [str(record.summary.new_directions) for record in records]
    return "New directions: " + ", ".join(map("{1} in {0}".format, names, counts))


def _condensed(
    record: Record, label: str, gate: Gate | None, *, repaired: bool = False
) -> dict[str, Any]:
    """What the page shows of a record."""
    summary = record.summary
    bad = summary.new_directions or summary.not_audited or summary.lost
    fresh = {matrix.name for matrix in untrained(record)}
    fails = " ".join(build_fails(record))
    failed = failure_lines(gate.failures(record)) if gate is not None and not repaired else []
    return {
        "label": label,
        "headline": headline(record),
        "kind": "bad" if bad else "unsure" if summary.verdicts[Verdict.UNDECIDED] else "",
        "explanation": [
            " ".join(sentences)  # a paragraph each
            for sentences in (
                explanation(record),
                scale_sentences(record),
                drift_sentences(record),
                [f"{fails} {line}." for line in failed],
            )
            if sentences
        ],
        "weaker": told_weaker(record),
        "curve": whole_curve(record),
        "drift": None if summary.drift is None else _short(summary.drift.mean),
        "moments": record.inputs.moments is not None,
        "steps": [[REPAIRED, None]]
        if repaired
        else [[step.text, step.command] for step in steps(record)],
        "copy": [] if repaired else _weaker_steps(record),
        "relative": is_relative(record),
        "about": _about(record),
        "epsilon": record.recipe.epsilon,
        "summary": {
            "audited": summary.audited,
            "not_audited": summary.not_audited,
            "new_directions": summary.new_directions,
            "lost": summary.lost,
            **{verdict.value: summary.verdicts[verdict] for verdict in Verdict},
        },
        "matrices": [_matrix(matrix, matrix.name in fresh) for matrix in record.matrices],
        "skipped": [
            [printable(row.name), printable(row.reason), row.lost] for row in record.skipped
        ],
    }


def _weaker_steps(record: Record) -> list[list[str | None]]:
    """The commands about a weaker copy, after sentences."""
    found = scale_steps(record)
    return [[f"{step.text[0].upper()}{step.text[1:]}", step.command] for step in found]


def _about(record: Record) -> str:
    """Where a record comes from."""
    inputs = record.inputs
    text = (
        f"Made by bulkedge {record.tool.version} from an audit of {record.run.started[:10]}: "
        f"{printable(inputs.tuned.path)} against {printable(inputs.base.path)}."
    )
    if inputs.tuned.trained_on is not None:
        named = printable(inputs.tuned.trained_on)
        text += f" The adapter names {named} as its base"
        text += NAMES[compare_names(record) or "unknown"]
    if (settings := settings_of(record)) is not None:
        text += f" Settings: {settings}."
    if inputs.base.quantised is not None:
        text += f" The base is quantised: {printable(inputs.base.quantised)}."
    return text


def _matrix(matrix: Matrix, fresh: bool) -> dict[str, Any]:
    """What the page shows of a matrix."""
    verdicts = [direction.verdict for direction in matrix.directions]
    return {
        "name": printable(matrix.name),
        "shape": matrix.shape,
        "dtype": matrix.dtype,
        "rank": matrix.rank,
        "scale": matrix.scale,
        "status": matrix.status,
        "note": None if matrix.note is None else printable(matrix.note),
        "new_directions": matrix.new_directions,
        "untrained": fresh,
        "passes": matrix.passes,
        "counts": {verdict.value: verdicts.count(verdict) for verdict in Verdict},
        "worst": _short(worst_score(matrix)),
        "ratio": _short(over_base(matrix)),
        "over": _short(over_top_k_threshold(matrix)),
        "cells": {
            c.name: [_key(c.value(matrix)), c.show(matrix)]
            for c in columns_of(PAGE, chosen=CHOICES)
        },
        "drift": _short(matrix.drift),
        "driftNote": None if matrix.drift_note is None else printable(matrix.drift_note),
        "driftParts": [[row.index, _short(row.drift)] for row in matrix.drift_parts],
        "curve": matrix_curve(matrix),
        "ranks": [matrix.spikes, matrix.in_use, *map(_short, _ranks(matrix))],
        "threshold": _short(matrix.threshold),
        "top_k_threshold": _short(matrix.top_k_threshold),
        "edge": None if matrix.bulk is None else _short(matrix.bulk.edge),
        "sides": [angles.side for angles in matrix.angles],
        "similarity": {angles.side: angles.similarity for angles in matrix.angles},
        "spectrum": None if matrix.spectrum is None else matrix.spectrum.model_dump(),
        "directions": [
            {
                "index": found.index,
                "side": found.side,
                "sigma": _short(found.sigma),
                "score": _short(found.score),
                "low": _short(found.score_lower),
                "high": _short(found.score_upper),
                "overlap": _short(found.subspace_overlap),
                "match": found.matched_index,
                "verdict": found.verdict.value,
                "method": found.method,
                "along": _short(found.drift_along),
            }
            for found in matrix.directions
        ],
        "predicted": [
            {
                "theta": _short(row.theta),
                "supercritical": row.supercritical,
                "location": _short(row.location),
                "sd": _short(row.sd),
                "measured": _short(row.measured_location),
            }
            for row in matrix.predicted
        ],
    }


def _ranks(matrix: Matrix) -> tuple[float | None, float | None]:
    """The effective and the stable rank of an update."""
    return matrix.effective_rank, matrix.stable_rank


def _short(x: float | None) -> float | None:
    """Five digits; nothing for what is not a number."""
    return None if x is None or x != x or abs(x) == float("inf") else float(f"{x:.5g}")


def _key(value: Any) -> Any:
    """What the page sorts a column by; JSON knows no infinity."""
    return _short(value) if isinstance(value, float) else value
