"""The tables of docs/repair.md, from their stored results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from render_protect import SHIPPED, Cell, Results, between, percent, table

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


BESIDE = {
    "as trained": "as trained",
    "rescale, uniform 0.7": "`Rescale(uniform=0.7)`",
    "rescale, uniform 0.5": "`Rescale(uniform=0.5)`",
    "rescale, level 1 (θ_k)": "`Rescale(level=1)`",
    "rescale, level 1, of edge (θ_c)": '`Rescale(level=1, of="edge")`',
    "clip": "`Clip()`",
    "scale, keep 0.5": "`Scale(0.5)`",
    "project": "`Project()`",
    "shrink": "`Shrink()`",
    "PEFT, λ 0.5": "PEFT's function, λ = 0.5",
    "protect": "`Protect(…, strength=1)`",
}
"""Methods of ``rescale.py``, in the order of the table, and what they are called."""


class Beside:
    """Every method on both adapters, and what scaling leaves at its norm and at its retrieval.

    Args:
        cells: Of ``rescale.jsonl``.
        results: Of ``protect.jsonl``, for the scales in between and for protecting.
    """

    def __init__(self, cells: Iterable[dict[str, Any]], results: Results) -> None:
        self.results = results
        self.known: dict[str, dict[str, Cell]] = {}
        for cell in cells:
            self.known.setdefault(cell["of"]["adapter"], {})[cell["of"]["method"]] = cell["figures"]
        for label, adapter in SHIPPED.items():
            counts = results.one(adapter, "files", 1.0)
            found = results.one(adapter, "protect", 1.0) | {"new": counts["intruders_after"]}
            self.known[label.replace("_", "-")]["protect"] = found

    def at_norm(self, label: str, norm: float, figure: str) -> float | None:
        """A figure of the update as a whole, scaled to a norm."""
        adapter = SHIPPED[label.replace("-", "_")]
        trained = self.known[label]["as trained"]["norm"]
        cells = self.results.of(adapter, "as trained", "scaled")
        return between(sorted((c["setting"] * trained, c[figure]) for c in cells), norm)

    def gain(self, label: str, cell: Cell) -> float | None:
        """How much more of the task a method keeps than scaling to its retrieval, in points."""
        return self.results.gain(SHIPPED[label.replace("-", "_")], cell)

    def table(self) -> str:
        """All of them."""
        return table(
            "| adapter | method | accuracy | retrieval | new directions | ‖ΔW‖ | drift "
            "| scaled to that norm: accuracy, retrieval | against scaling to that retrieval |",
            (self._row(label, method) for label in self.known for method in BESIDE),
        )

    def _row(self, label: str, method: str) -> list[str]:
        cell = self.known[label][method]
        scaled = [self.at_norm(label, cell["norm"], figure) for figure in ("task", "recall")]
        plain = method == "as trained" or "uniform" in method
        gain = self.gain(label, cell)
        return [
            label, BESIDE[method], percent(cell["task"]), percent(cell["recall"]),
            str(cell["new"]), f"{cell['norm']:.1f}", f"{cell['drift']:.4f}",
            "" if plain else ", ".join(percent(value) for value in scaled),
            "" if plain or gain is None else f"{gain:+.1f}",
        ]  # fmt: skip

    def figures(self) -> dict[str, float]:
        """The figures of the prose: gains over scaling, of the methods that take parts."""
        parts = ("clip", "scale, keep 0.5", "project", "shrink", "PEFT, λ 0.5")
        layers = ("rescale, level 1 (θ_k)", "rescale, level 1, of edge (θ_c)")
        found: dict[str, float] = {}
        for name, methods in (("parts", parts), ("layers", layers), ("protect", ("protect",))):
            gains = [self.gain(label, cells[m]) for label, cells in self.known.items()
                     for m in methods]  # fmt: skip
            known = [gain for gain in gains if gain is not None]
            found |= {f"{name}_low": min(known), f"{name}_high": max(known)}
        back = [
            100 * (cell["recall"] - at)
            for label, cells in self.known.items()
            for m in parts
            if (at := self.at_norm(label, (cell := cells[m])["norm"], "recall")) is not None
        ]
        return found | {"norm_low": min(back), "norm_high": max(back)}
