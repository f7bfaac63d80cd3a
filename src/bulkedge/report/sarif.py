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
from .verdicts import APPEARANCE

VERSION = "2.1.0"
SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
NOT_JUDGED, REFUSED, DOUBT, SETTINGS = "not-judged", "not-repaired", "doubt", "settings"
FINDINGS = (*COUNTED, Verdict.UNDECIDED)
"""The verdicts that are results; each is a rule."""
OTHER = {
    NOT_JUDGED: ("error", "Part of the fine-tune that could not be judged."),
    REFUSED: ("error", "A matrix that a repair refused."),
    DOUBT: ("warning", "Why the verdict may mislead."),
    SETTINGS: ("note", "Settings of the audit that are not the defaults."),
}
"""The other rules: their level and what they say."""


def to_sarif(record: Record, refused: Mapping[str, str] | None = None) -> str:
    """One result for each affected matrix and verdict, as SARIF 2.1.0.

    Args:
        record: What to write.
        refused: Why a repair refused a matrix, by its name.

    Returns:
        JSON.  What could not be judged is a result of the rule ``not-judged``, a matrix that a
        repair refused one of ``not-repaired``, why the verdict may mislead one of ``doubt``, and
        settings other than the defaults are one of ``settings``.
    """
    driver = {
        "name": "bulkedge",
        "version": record.tool.version,
        "rules": [
            *map(_rule, FINDINGS),
            *(_other_rule(name, *rule) for name, rule in OTHER.items()),
        ],
    }
    place = _place(record)
    run = {
        "tool": {"driver": driver},
        "results": [_result(place, *found) for found in _found(record, refused or {})],
        "invocations": [{"executionSuccessful": record.summary.complete and not refused}],
    }
    return json.dumps({"$schema": SCHEMA, "version": VERSION, "runs": [run]}, indent=2) + "\n"


def _level(verdict: Verdict) -> str:
    """How grave a verdict is: the gravest of new directions, and an open one, are errors."""
    return "error" if verdict in FINDINGS[-2:] else "warning"


def _rule(verdict: Verdict) -> dict[str, Any]:
    """A verdict as a rule of a linter."""
    return {
        "id": verdict.value,
        "shortDescription": {"text": APPEARANCE[verdict].meaning},
        "defaultConfiguration": {"level": _level(verdict)},
    }


def _other_rule(name: str, level: str, meaning: str) -> dict[str, Any]:
    """A rule for what is no verdict."""
    return {
        "id": name,
        "shortDescription": {"text": meaning},
        "defaultConfiguration": {"level": level},
    }


def _found(record: Record, refused: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Rule, name of a matrix or of what else it is about, and message of each result."""
    for matrix in record.matrices:
        if matrix.status in ("not_finite", "failed"):
            yield NOT_JUDGED, matrix.name, matrix.note or matrix.status
        for verdict in FINDINGS:
            if any(row.verdict is verdict for row in matrix.directions):
                yield verdict.value, matrix.name, _message(matrix, verdict)
    for row in record.skipped:
        if row.lost:
            yield NOT_JUDGED, row.name, row.reason
    yield from ((REFUSED, name, f"{name}: NOT repaired: {why}") for name, why in refused.items())
    yield from ((DOUBT, about, doubt) for about, doubt in doubts(record).items())
    if (settings := settings_of(record)) is not None:
        yield SETTINGS, "recipe", settings


def _message(matrix: Matrix, verdict: Verdict) -> str:
    """How many directions of a matrix have a verdict, and the lowest score."""
    scores = [row.score for row in matrix.directions if row.verdict is verdict]
    number = count(len(scores), f"{verdict.value} direction")
    return f"{matrix.name}: {number}, lowest score {min(scores):.3f}"


def _place(record: Record) -> str:
    """The fine-tune as a relative or absolute URI."""
    path = PurePath(record.inputs.tuned.path)
    uri = quote(path.as_posix())
    return f"file://{uri}" if path.is_absolute() else uri


def _result(place: str, rule: str, name: str, message: str) -> dict[str, Any]:
    """One result at the place of the fine-tune; its matrix is the logical location."""
    return {
        "ruleId": rule,
        "level": OTHER[rule][0] if rule in OTHER else _level(Verdict(rule)),
        "message": {"text": printable(message)},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": place},
                    "region": {"startLine": 1},
                },
                "logicalLocations": [{"fullyQualifiedName": printable(name), "kind": "member"}],
            }
        ],
        "partialFingerprints": {"matrix/v1": f"{rule}:{printable(name)}"},
    }
