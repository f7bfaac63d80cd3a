"""A record for continuous integration as JUnit: for the test tab of most services."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

from bulkedge._errors import printable
from bulkedge.records import Record

from .doubts import doubts, part_of, settings_of
from .gate import (
    DOUBT,
    MAX_DRIFT,
    NOT_JUDGED,
    NOT_REPAIRED,
    UNKNOWN,
    Failure,
    Gate,
    Refused,
    Repairs,
)

CLASSES = {
    NOT_JUDGED: "bulkedge.lost",
    NOT_REPAIRED: "bulkedge.repair",
    MAX_DRIFT: "bulkedge.gate",
    DOUBT: "bulkedge.doubt",
}
"""The classes of test cases that are of no matrix, by the rule of what fails in them."""


def to_junit(
    records: Record | Mapping[str, Record],
    gate: Gate | None = None,
    refused: Mapping[str, Refused] | None = None,
    repairs: Repairs | None = None,
) -> str:
    """One test case per matrix, as JUnit XML.

    Args:
        records: What to write; several by their names.
        gate: What is a failure; ``Gate()`` if None.
        refused: Why a repair refused matrices, by the names of the records; each is an error.
            That of one record alone has the name ``""``.
        repairs: What was repaired before these audits, in sentences, by the names of the records.

    Returns:
        XML.  What could not be judged is an error, and a doubt that fails no build a test that was
        skipped.
    """
    gate, refused, repairs = gate or Gate(), refused or {}, repairs or {}
    if isinstance(records, Record):
        root = _suite(records, gate, refused.get("", {}), repairs.get("", ()))
    else:
        root = ElementTree.Element("testsuites", name="bulkedge audit")
        for name, record in records.items():
            told = refused.get(name, {}), repairs.get(name, ())
            root.append(_suite(record, gate, *told, name))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(
        root, encoding="unicode"
    ) + "\n"  # fmt: skip


def _suite(
    record: Record, gate: Gate, refused: Refused, repair: Sequence[str], name: str = ""
) -> ElementTree.Element:
    """The cases of one audit."""
    title = ", ".join(filter(None, ("bulkedge audit", printable(name), part_of(record))))
    suite = ElementTree.Element("testsuite", name=title)
    facts = {"settings": settings_of(record), "repair": printable("; ".join(repair))}
    if any(facts.values()):
        properties = ElementTree.SubElement(suite, "properties")
        for key, value in facts.items():
            if value:
                ElementTree.SubElement(properties, "property", name=key, value=value)
    failures = gate.failures(record, refused)
    of_matrices: dict[str, list[Failure]] = {}
    for failure in failures:
        if failure.of_matrix:
            of_matrices.setdefault(failure.about, []).append(failure)
    for matrix in record.matrices:
        case = _case(suite, matrix.name, "bulkedge")
        if found := of_matrices.get(matrix.name):
            _add(case, found)
    others = [failure for failure in failures if not failure.of_matrix]
    for failure in others:
        _add(_case(suite, failure.about, CLASSES[failure.rule]), [failure])
    if gate.max_drift is not None and not any(f.rule == MAX_DRIFT for f in others):
        _case(suite, "mean drift", CLASSES[MAX_DRIFT])
    failed = {failure.about for failure in others if failure.rule == DOUBT}
    for about, doubt in doubts(record).items():
        if about not in failed:
            case = _case(suite, about, CLASSES[DOUBT])
            ElementTree.SubElement(case, "skipped", message=f"doubt: {printable(doubt)}")
    suite.set("tests", str(len(suite.findall("testcase"))))
    for kind, plural in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        suite.set(plural, str(len(suite.findall(f"testcase/{kind}"))))
    suite.set("time", f"{record.run.seconds:.3f}")
    return suite


def _add(case: ElementTree.Element, failures: Sequence[Failure]) -> None:
    """Why a case failed: an error where something could not be judged."""
    unknown = [failure for failure in failures if failure.code == UNKNOWN]
    told = unknown or failures
    options = ", ".join(dict.fromkeys(f.option for f in told if f.option))
    message = "; ".join(failure.message for failure in told)
    element = ElementTree.SubElement(
        case,
        "error" if unknown else "failure",
        message=printable(f"{options}: {message}" if options else message),
    )
    element.text = "\n".join(printable(line) for f in told for line in f.details) or None


def _case(suite: ElementTree.Element, name: str, kind: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", name=printable(name), classname=kind)
