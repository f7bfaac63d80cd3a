"""The table of docs/fine-tuning.md on real trainers."""

from __future__ import annotations

from typing import Any


def trainer_table(found: dict[str, Any]) -> str:
    """A row for each trainer, a column for each holder and kind of adapter."""
    cells = {tuple(name.split(" | ")): cell for name, cell in found["cells"].items()}
    columns = sorted({key[1:] for key in cells}, key=lambda x: (x[1] != "LoRA", x))
    trainers = sorted({key[0] for key in cells})
    lines = [
        "| trainer | " + " | ".join(f"{holder}, {kind}" for holder, kind in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for trainer in trainers:
        row = [_cell(cells.get((trainer, *column))) for column in columns]
        lines.append(f"| {trainer} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def versions(found: dict[str, Any]) -> str:
    """What the runs were made with."""
    return ", ".join(f"{name} {version}" for name, version in found["versions"].items())


def _cell(cell: float | str | None) -> str:
    if cell is None:
        return ""
    return "refused" if isinstance(cell, str) else f"{cell:.4f}"
