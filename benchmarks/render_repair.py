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
        f"{row['after']['encoder']}, {row['after']['pooler']}",
        accuracy,
        f"{100 * row['changed']:.0f} %" if "changed" in row else "",
        ("grows" if row["rank_grown"] else "as it was") if "rank_grown" in row else "",
        f"{row['seconds']:.0f} s" if "seconds" in row else "",
        f"{row['peak_MB']} MB" if "peak_MB" in row else "",
    ]
    return f"| {' | '.join(cells)} |"


BESIDE = {
    ("as trained", 1.0): ("as trained", "as trained"),
    ("scaled", 0.8): ("`Rescale(uniform=0.8)`", None),
    ("scaled", 0.7): ("`Rescale(uniform=0.7)`", None),
    ("scaled", 0.5): ("`Rescale(uniform=0.5)`", None),
    ("scaled", 0.4): ("`Rescale(uniform=0.4)`", None),
    ("budget", 0.4): ('`Rescale(level=0.4, of="edge")`', None),
    ("cut at the edge", 0.4): (
        "spikes cut at 0.4 θ_c, as `Clip(level=0.4)` does in one round",
        None,
    ),
    ("repair: scale", ""): ("`Scale()`", "scale, keep 0"),
    ("repair: project", ""): ("`Project()`", "project"),
    ("repair: shrink", ""): ("`Shrink()`", "shrink"),
    ("PEFT's reduce_intruder_dimension", 0.0): ("PEFT's function, λ = 0", "PEFT, λ 0"),
    ("protect", 1.0): ("`Protect(…, strength=1)`", None),
}
"""Cells of ``protect.py`` by method and setting: what they are called, and in ``repair.json``."""
BESIDE_HEAD = """| r = 8 | task | retrieval | drift | new directions |
|---|---|---|---|---|
"""


def beside_table(cells: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """Scaling beside the repairs: what is kept of the task and of what nobody trained.

    Args:
        cells: Of ``protect.jsonl``.
        rows: Of ``repair.json``, for the counts of new directions in the encoder.
    """
    counts = {r["method"]: r["after"]["encoder"] for r in rows if r["adapter"] == "lora-r8"}
    found = {
        (cell["of"]["method"], cell["of"]["setting"]): cell["figures"]
        for cell in cells
        if cell["of"].get("adapter") == "nouns, r = 8, seed 0" and "texts" not in cell["of"]
    }
    lines = []
    for key, (name, counted) in BESIDE.items():
        figures = found[key]
        cell = [name, f"{100 * figures['task']:.1f} %", f"{100 * figures['recall']:.1f} %",
                f"{figures['drift']:.4f}", str(counts[counted]) if counted else ""]  # fmt: skip
        lines.append(f"| {' | '.join(cell)} |")
    return BESIDE_HEAD + "\n".join(lines)
