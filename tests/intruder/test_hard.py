"""Certificates where rounding is worst: no interval and no verdict contradicts exact arithmetic."""

from pathlib import Path

import pytest

from intruder import hard

JOURNAL = Path(__file__).parents[2] / "build/hard_certificates.jsonl"
SEEDS = 1000
"""Of ten certificates each."""
EACH = 25

# bases on which bounds of rounding that were measured on random matrices gave wrong verdicts
KNOWN = (24, 54, 78, 96, 168)


@pytest.mark.parametrize("seed", [*range(24), *KNOWN[1:]])
def test_no_certificate_is_wrong(seed):
    found = hard.check(seed, updates=2 if seed not in KNOWN else 4)
    assert found["wrong"] == []
    assert found["directions"] >= found["certificates"]


def test_the_families_have_tiny_values_and_still_decide():
    found = [hard.check(seed, updates=1) for seed in range(18)]
    assert min(row["least"] for row in found) < 1e-9
    assert {row["family"] for row in found} == set(hard.FAMILIES)
    decided, directions = (sum(row[key] for row in found) for key in ("decided", "directions"))
    assert decided > 0.3 * directions


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, EACH))
def test_ten_thousand_certificates(first):
    """Resumed from where a run was stopped."""
    rows = hard.resumed(range(first, first + EACH), JOURNAL)
    assert [wrong for row in rows for wrong in row["wrong"]] == []
