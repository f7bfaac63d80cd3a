"""The table of docs/repair.md, from its stored result."""

from __future__ import annotations

from typing import Any

HEAD = """| adapter | method | new directions: encoder, pooler | accuracy | changed | rank | time | memory |
|---|---|---|---|---|---|---|---|
"""


def repair_table(rows: list[dict[str, Any]]) -> str:
    """Every method on every adapter."""
    return HEAD + "\n".join(_row(row) for row in rows)


def _row(row: dict[str, Any]) -> str:
    """One method on one adapter; PEFT's accuracy as written in parentheses."""
    accuracy = f"{100 * row['accuracy']:.1f} %"
    if (written := row.get("accuracy_as_written")) is not None:
        accuracy += f" ({100 * written:.1f} %)"
    cells = [
        row["adapter"],
        row["method"],
        f"{row['after']['encoder']}, {row['after'].get('pooler', 'left out')}",
        accuracy,
        f"{100 * row['changed']:.0f} %" if "changed" in row else "",
        ("grows" if row["rank_grown"] else "as it was") if "rank_grown" in row else "",
        f"{row['seconds']:.0f} s" if "seconds" in row else "",
        f"{row['peak_MB']} MB" if "peak_MB" in row else "",
    ]
    return f"| {' | '.join(cells)} |"
