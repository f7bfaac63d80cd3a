"""A record as SARIF, which code-scanning services show beside other linters' findings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from bulkedge._errors import count, printable
from bulkedge._verdict import COUNTED, Verdict
from bulkedge.records import Matrix, Record

from .doubts import doubts, settings_of
from .gate import DOUBT, MAX_DRIFT, NOT_JUDGED, NOT_REPAIRED, UNKNOWN, Gate, Refused, Repairs
from .verdicts import APPEARANCE

VERSION = "2.1.0"
SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
SETTINGS, REPAIR = "settings", "repair"
FINDINGS = (*COUNTED, Verdict.UNDECIDED)
"""The verdicts that are results; each is a rule."""
OTHER = {
    NOT_JUDGED: ("error", "Part of the fine-tune that could not be judged."),
    NOT_REPAIRED: ("error", "A matrix that a repair refused."),
    MAX_DRIFT: ("error", "More mean drift than was allowed, or drift that is not known."),
    DOUBT: ("warning", "Why the verdict may mislead."),
    SETTINGS: ("note", "Settings of the audit that are not the defaults."),
    REPAIR: ("note", "The repair before the audit: new directions before and after."),
}
"""The other rules: their usual level and what they say."""


def to_sarif(
    records: Record | Mapping[str, Record],
    gate: Gate | None = None,
    refused: Mapping[str, Refused] | None = None,
    repairs: Repairs | None = None,
) -> str:
    """One result for each affected matrix and verdict, as SARIF 2.1.0.

    Args:
        records: What to write; several by their names, all in one run.
        gate: What fails the build, and is an error here; ``Gate()`` if None.
        refused: Why a repair refused matrices, by the names of the records.  That of one record
            alone has the name ``""``.
        repairs: What was repaired before these audits, in sentences, by the names of the records.

    Returns:
        JSON.  A finding or a doubt that fails no build is a warning.  What could not be judged is a
        result of the rule ``not-judged``, a matrix that a repair refused one of ``not-repaired``,
        too much drift one of ``max-drift``; settings other than the defaults are a note, and so is
        a repair.
    """
    gate, refused, repairs = gate or Gate(), refused or {}, repairs or {}
    named = {"": records} if isinstance(records, Record) else records
    results, done = list[dict[str, Any]](), True
    for name, record in named.items():
        mine = refused.get(name, {})
        done &= all(failure.code != UNKNOWN for failure in gate.failures(record, mine))
        rows = [*_found(record, gate, mine)]
        if told := repairs.get(name):
            rows.append((REPAIR, "note", "repair", "; ".join(told)))
        results += [_result(_place(record), name, *found) for found in rows]
    driver = {
        "name": "bulkedge",
        "version": next((record.tool.version for record in named.values()), ""),
        "rules": [
            *map(_rule, FINDINGS),
            *(_other_rule(name, *rule) for name, rule in OTHER.items()),
        ],
    }
    run = {
        "tool": {"driver": driver},
        "results": results,
        "invocations": [{"executionSuccessful": done}],
    }
    return json.dumps({"$schema": SCHEMA, "version": VERSION, "runs": [run]}, indent=2) + "\n"


def _rule(verdict: Verdict) -> dict[str, Any]:
    """A verdict as a rule of a linter."""
    level = "warning" if verdict in COUNTED else "error"
    return _other_rule(verdict.value, level, APPEARANCE[verdict].meaning)


def _other_rule(name: str, level: str, meaning: str) -> dict[str, Any]:
    """A rule, its usual level, and what it says."""
    return {
        "id": name,
        "shortDescription": {"text": meaning},
        "defaultConfiguration": {"level": level},
    }


def _found(record: Record, gate: Gate, refused: Refused) -> Iterator[tuple[str, str, str, str]]:
    """Rule, level, name of a matrix or of what else it is about, and message of each result."""
    failed = set[tuple[str, str]]()
    for failure in gate.failures(record, refused):
        failed.add((failure.rule, failure.about))
        told = failure.message if failure.rule == DOUBT else f"{failure.about}: {failure.message}"
        yield failure.rule, "error", failure.about, told
    for matrix in record.matrices:
        for verdict in COUNTED:
            if (verdict.value, matrix.name) not in failed and _scores(matrix, verdict):
                yield verdict.value, "warning", matrix.name, _message(matrix, verdict)
    for about, doubt in doubts(record).items():
        if (DOUBT, about) not in failed:
            yield DOUBT, "warning", about, doubt
    if (settings := settings_of(record)) is not None:
        yield SETTINGS, "note", "recipe", settings


def _scores(matrix: Matrix, verdict: Verdict) -> list[float]:
    """The scores of the directions with a verdict."""
    return [row.score for row in matrix.directions if row.verdict is verdict]


def _message(matrix: Matrix, verdict: Verdict) -> str:
    """How many directions of a matrix have a verdict, and the lowest score."""
    scores = _scores(matrix, verdict)
    number = count(len(scores), f"{verdict.value} direction")
    return f"{matrix.name}: {number}, lowest score {min(scores):.3f}"


def _place(record: Record) -> str:
    """The fine-tune as a relative or absolute URI."""
    path = PurePath(record.inputs.tuned.path)
    uri = quote(path.as_posix())
    return f"file://{uri}" if path.is_absolute() else uri


def _result(
    place: str, tuned: str, rule: str, level: str, name: str, message: str
) -> dict[str, Any]:
    """One result at the place of the fine-tune; its matrix is the logical location."""
    named = f"{printable(tuned)}/{printable(name)}" if tuned else printable(name)
    return {
        "ruleId": rule,
        "level": level,
        "message": {"text": printable(f"{tuned}: {message}" if tuned else message)},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": place},
                    "region": {"startLine": 1},
                },
                "logicalLocations": [{"fullyQualifiedName": named, "kind": "member"}],
            }
        ],
        "partialFingerprints": {"matrix/v1": f"{rule}:{named}"},
    }
