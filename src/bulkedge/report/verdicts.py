"""How each verdict is shown: its words, its colours, and whether it is a finding.

Every view reads this table, in its order: a new verdict has one entry here.
"""

from __future__ import annotations

from dataclasses import dataclass

from bulkedge._verdict import COUNTED, Verdict


@dataclass(frozen=True)
class Appearance:
    """How a verdict is shown.

    Attributes:
        several: What a list of matrices with such directions is called: "with intruders".
        meaning: What it says, in one line.
        ink: Colour in a printed figure, and the mark of its points there.
        mark: A marker of matplotlib.
        light: Colour on a light page.
        dark: Colour on a dark page.
        style: Style of its count in a terminal, as rich names it; empty for none.
        clauses: What a sentence on new directions says of one with this verdict, and of several;
            empty for a verdict that is not new.
    """

    several: str
    meaning: str
    ink: str
    mark: str
    light: str
    dark: str
    style: str = ""
    clauses: tuple[str, str] = ("", "")


# The colours are distinguishable without colour vision; those of figures are Okabe and Ito's.
APPEARANCE = {
    Verdict.ALIGNED: Appearance(
        several="aligned",
        meaning="A direction that the base had.",
        ink="#0072B2", mark="o", light="#0072b2", dark="#56b4e9",
    ),
    Verdict.ROTATED: Appearance(
        several="rotated",
        meaning="New, but mostly within the space of the base's leading directions (twice as many "
        "as are judged): what was there has turned.",
        ink="#E69F00", mark="s", light="#b35c00", dark="#e69f00",
        clauses=(
            "lies mostly within the base's leading space",
            "lie mostly within the base's leading space",
        ),
    ),
    Verdict.INTRUDER: Appearance(
        several="intruders",
        meaning="New, and mostly outside the space of the base's leading directions.",
        ink="#D55E00", mark="D", light="#c0271d", dark="#ff7b6b", style="red",
        clauses=("does not", "do not"),
    ),
    Verdict.UNDECIDED: Appearance(
        several="undecided",
        meaning="The proved interval of the score contains the limit.",
        ink="#999999", mark="x", light="#6b5b95", dark="#b9a7e8",
    ),
}  # fmt: skip
"""Each verdict, in the order in which verdicts are listed."""

EXPECTED = Verdict.ALIGNED
"""The verdict on a direction that nothing happened to; tables do not count it."""

REPORTED = tuple(verdict for verdict in APPEARANCE if verdict is not EXPECTED)
"""The verdicts that tables and summaries list."""


def is_counted(verdict: Verdict) -> bool:
    """Whether a verdict counts as new, and so is listed even where there is none."""
    return verdict in COUNTED
