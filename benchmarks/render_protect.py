"""The tables of docs/protect.md: protecting a fine-tune against scaling it, and against the rest.

Two methods are compared at equal retention: between the settings that were tried, the task is
interpolated linearly over what is kept; beyond the last of them it is unknown.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

Cell = dict[str, Any]
SHIPPED = {"lora_r1": "nouns, r = 1, seed 0", "lora_r8": "nouns, r = 8, seed 0"}
ABILITIES = ("recall", "mrr", "structure")
"""Retrieval by the share of first places and by mean reciprocal rank; likenesses."""
PROTECTED = ("protect", "two-sided")
"""Arms of the causal model."""
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Student's t for a 95 % interval of a mean, by the number of values."""


class Results:
    """The stored cells, by what they are of."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        self.cells = flat(cells)

    @property
    def adapters(self) -> list[str]:
        """Those with a grid that is whole."""
        names = dict.fromkeys(c["adapter"] for c in self.cells if c["method"] == "scaled")
        return [name for name in names if len(self.of(name, "protect")) > 1]

    def of(self, adapter: str, *methods: str, texts: str | None = None) -> list[Cell]:
        """The cells of some methods, by their settings."""
        found = [
            c
            for c in self.cells
            if c["adapter"] == adapter and c["method"] in methods and c.get("texts") == texts
        ]
        return sorted(found, key=lambda c: c["setting"])

    def others(self, adapter: str) -> list[Cell]:
        """Methods that are neither scaling nor protecting, in the order of their measurement."""
        plain = ("as trained", "scaled", "files", "another ridge")
        cells = [c for c in self.cells if c["adapter"] == adapter and c["method"] not in plain]
        return [c for c in cells if not c["method"].startswith(("protect", "two-sided"))]

    def one(self, adapter: str, method: str, setting: float) -> Cell:
        """The cell of a setting."""
        (cell,) = (c for c in self.of(adapter, method) if c["setting"] == setting)
        return cell

    def curve(self, adapter: str, method: str, ability: str) -> list[tuple[float, float]]:
        """What is kept and the task, over the strengths of a method, from the adapter as trained."""
        cells = self.of(adapter, "as trained", method)
        return sorted((c[ability], c["task"]) for c in cells)

    def base(self, adapter: str) -> Cell:
        """What the base does on the texts of an adapter's part of speech."""
        (cell,) = self.of(f"none, {adapter.split(',')[0]}", "base")
        return cell

    def gain(
        self, adapter: str, cell: Cell, ability: str = "recall", than: str = "scaled"
    ) -> float | None:
        """How much more of the task a cell keeps than a method at the same retention; in points."""
        known = between(self.curve(adapter, than, ability), cell[ability])
        return None if known is None else 100 * (cell["task"] - known)

    def in_words(self, adapter: str, cell: Cell, ability: str, than: str = "scaled") -> str:
        """The same in words; of one that keeps more than any setting, the gain over the last."""
        gain = self.gain(adapter, cell, ability, than)
        kept, task = self.curve(adapter, than, ability)[-1]
        if gain is None and cell[ability] > kept and cell["task"] > task:
            return f"≥ {100 * (cell['task'] - task):+.1f}"
        return points(gain)

    def gain_at_half(self, adapter: str, ability: str = "recall") -> float | None:
        """The task of protect at the retention of scaling by 0.5, less scaling's; in points."""
        half = self.one(adapter, "scaled", 0.5)
        known = between(self.curve(adapter, "protect", ability), half[ability])
        return None if known is None else 100 * (known - half["task"])


def flat(cells: Iterable[Cell]) -> list[Cell]:
    """What cells are of, and their figures."""
    return [cell["of"] | cell["figures"] for cell in cells]


def between(curve: list[tuple[float, float]], at: float) -> float | None:
    """The value of a line through points at a place; None outside of them."""
    for (left, before), (right, after) in pairwise(curve):
        if left <= at <= right:
            part = (at - left) / (right - left) if right > left else 0.0
            return before + (after - before) * part
    return None


def interval(values: list[float]) -> str:
    """Mean and 95 % interval."""
    half = T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.1f} ± {half:.1f}"


def percent(value: float | None) -> str:
    """A share in per cent."""
    return "beyond" if value is None else f"{100 * value:.1f} %"


def points(value: float | None) -> str:
    """A difference in points."""
    return "beyond" if value is None else f"{value:+.1f}"


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _arm(cell: Cell) -> str:
    symbol = {
        "protect": "protect, λ = {:g}", "two-sided": "two-sided, λ = {:g}",
        "scaled": "scaled by {:g}",
    }  # fmt: skip
    return symbol.get(cell["method"], cell["method"]).format(cell["setting"])


def grid_table(results: Results) -> str:
    """Both shipped adapters, every strength."""
    rows = []
    for label, adapter in SHIPPED.items():
        arms = ("as trained", "protect", "scaled")
        for cell in (cell for arm in arms for cell in results.of(adapter, arm)):
            protect = cell["method"] == "protect"
            gains = [
                results.in_words(adapter, cell, ability) if protect else "" for ability in ABILITIES
            ]
            rows.append(
                [label.replace("_", "-"), _arm(cell), percent(cell["task"]),
                 percent(cell["recall"]), f"{cell['mrr']:.3f}", f"{cell['structure']:.2f}", *gains,
                 f"{cell['drift']:.4f}"]
            )  # fmt: skip
    return table(
        "| adapter | arm | task | retrieval | reciprocal rank | likenesses "
        "| against scaling to that retrieval | to that rank | to those likenesses | drift |",
        rows,
    )


def adapters_table(results: Results) -> str:
    """Every adapter, at the retention of scaling by 0.5."""
    rows = []
    for adapter in results.adapters:
        trained, half = results.one(adapter, "as trained", 1.0), results.one(adapter, "scaled", 0.5)
        rows.append(
            [adapter, percent(results.base(adapter)["recall"]),
             f"{percent(trained['task'])}, {percent(trained['recall'])}",
             f"{percent(half['task'])}, {percent(half['recall'])}",
             *(points(results.gain_at_half(adapter, ability)) for ability in ABILITIES),
             *(_gains(results, adapter, strength) for strength in (0.3, 1.0, 3.0))]
        )  # fmt: skip
    return table(
        "| adapter | the base's retrieval | as trained: task, retrieval | scaled by 0.5 "
        "| protect at that retrieval | at that reciprocal rank | at those likenesses "
        "| λ = 0.3 | λ = 1 | λ = 3 |",
        rows,
    )


def _gains(results: Results, adapter: str, strength: float) -> str:
    """What protecting keeps more than scaling, for each ability; nothing if it was not measured."""
    cells = [c for c in results.of(adapter, "protect") if c["setting"] == strength]
    return ", ".join(results.in_words(adapter, c, a) for c in cells for a in ABILITIES)


def methods_table(results: Results) -> str:
    """Other methods on the shipped adapters, against scaling and protecting to the same retention."""
    rows = []
    for label, adapter in SHIPPED.items():
        for cell in results.others(adapter):
            rows.append(
                [label.replace("_", "-"), cell["method"], str(cell["setting"]),
                 percent(cell["task"]), percent(cell["recall"]), f"{cell['structure']:.2f}",
                 *(", ".join(results.in_words(adapter, cell, a, than) for a in ABILITIES)
                   for than in ("scaled", "protect"))]
            )  # fmt: skip
    return table(
        "| adapter | method | setting | task | retrieval | likenesses | against scaling "
        "| against protect |",
        rows,
    )


def texts_table(results: Results) -> str:
    """Other texts for C_b."""
    adapter = SHIPPED["lora_r8"]
    cells = [c for c in results.cells if c["adapter"] == adapter and c["setting"] == 1.0]
    cells = [c | {"texts": c.get("texts", "800")} for c in cells if c["method"] == "protect"]
    counted = sorted((c for c in cells if c["texts"].isdigit()), key=lambda c: int(c["texts"]))
    rows = [(f"{int(c['texts']):,} of the kind to be kept", c) for c in counted]
    rows += [(c["texts"], c) for c in cells if not c["texts"].isdigit()]
    others = [c for c in results.cells if c["method"].startswith("protect ")]
    rows += [(f"800, {c['method'].removeprefix('protect ')}", c) for c in others]
    return table(
        "| texts for C_b | λ | task | retrieval | likenesses | against scaling to that retrieval "
        "| to that reciprocal rank | to those likenesses |",
        (
            [texts, f"{c['setting']:g}", percent(c["task"]), percent(c["recall"]),
             f"{c['structure']:.2f}",
             *(results.in_words(adapter, c, ability) for ability in ABILITIES)]
            for texts, c in rows
        ),
    )  # fmt: skip


def gains(results: Results) -> dict[str, Any]:
    """The figures of the prose."""
    found: dict[str, Any] = {"more": len(results.adapters) - len(SHIPPED)}
    for label, adapter in SHIPPED.items():
        cell, trained = (
            results.one(adapter, "protect", 1.0), results.one(adapter, "as trained", 1.0)
        )  # fmt: skip
        lost = results.base(adapter)["recall"] - trained["recall"]
        found[f"{label}_gain"] = results.gain(adapter, cell)
        found[f"{label}_half"] = results.gain_at_half(adapter)
        half = results.one(adapter, "scaled", 0.5)
        found[f"{label}_room"] = 100 * (trained["task"] - half["task"])
        found[f"{label}_back"] = 100 * (cell["recall"] - trained["recall"]) / lost
        found[f"{label}_cost"] = 100 * (trained["task"] - cell["task"])
    for ability in ABILITIES:
        halves = [results.gain_at_half(adapter, ability) for adapter in results.adapters]
        known = [half for half in halves if half is not None]
        found[f"{ability}_half"] = {
            "low": min(known), "high": max(known), "count": len(known),
            "better": sum(half > 0 for half in known),
        }  # fmt: skip
        cells = [(a, c) for a in results.adapters for c in results.of(a, "protect")]
        points = [gain for a, c in cells if (gain := results.gain(a, c, ability)) is not None]
        found[f"{ability}_points"] = {
            "count": len(points), "worse": sum(point < 0 for point in points), "low": min(points),
            "beyond": len(cells) - len(points),
        }  # fmt: skip
    return found


def others(results: Results) -> dict[str, Any]:
    """Other methods on the shipped adapters against protect, where they can be compared."""
    found = [
        gain
        for adapter in SHIPPED.values()
        for cell in results.others(adapter)
        if "replay" not in cell["method"]
        for ability in ABILITIES
        if (gain := results.gain(adapter, cell, ability, "protect")) is not None
    ]
    return {"count": len(found), "better": sum(gain > 0 for gain in found), "high": max(found)}


def seeds(results: Results) -> str:
    """Gains at the retention of scaling by 0.5 over seeds, with 95 % intervals, in sentences."""
    return " ".join(filter(None, (_over_seeds(results, part) for part in ("nouns", "verbs"))))


def _over_seeds(results: Results, part: str) -> str:
    names = [name for name in results.adapters if name.startswith(f"{part}, r = 2,")]
    found = []
    for ability, by in zip(ABILITIES, ("retrieval", "reciprocal rank", "likenesses"), strict=True):
        values = [results.gain_at_half(name, ability) for name in names]
        known = [value for value in values if value is not None]
        if len(known) == len(names) > 2:  # an interval over some of them would be of a choice
            found.append(f"{interval(known)} points by {by}")
    if not found:
        return ""
    return f"Over {len(names)} seeds of rank 2 on {part} (95 % intervals): {', '.join(found)}."


def causal_table(cells: Iterable[Cell]) -> str:
    """Perplexities of the causal model, and of scaling to the same perplexity of documentation."""
    known = flat(cells)
    arms = ["base", "as trained", *PROTECTED, "scaled"]
    known.sort(key=lambda c: (c["adapter"], arms.index(c["method"]), c["setting"]))
    rows = []
    for cell in known:
        curve = _perplexities(known, cell["adapter"])
        mine = cell["method"] in PROTECTED
        scaled = between(curve, cell["documentation"]) if mine else None
        rows.append(
            [cell["adapter"], "the base" if cell["method"] == "base" else _arm(cell),
             f"{cell['dictionary']:.1f}", f"{cell['documentation']:.1f}",
             "" if not mine else "beyond" if scaled is None else f"{scaled:.1f}"]
        )  # fmt: skip
    return table(
        "| adapter | arm | perplexity of dictionary (task) | of documentation (kept) "
        "| dictionary, scaled to that documentation |",
        rows,
    )


def causal_figures(cells: Iterable[Cell]) -> dict[str, Any]:
    """At how many strengths protecting is better than scaling, and by how much; for each arm."""
    known = flat(cells)
    found = {}
    for method in PROTECTED:
        ratios = []
        for cell in (c for c in known if c["method"] == method):
            scaled = between(_perplexities(known, cell["adapter"]), cell["documentation"])
            if scaled is not None:
                ratios.append(100 * (1 - cell["dictionary"] / scaled))
        found[method] = {
            "count": len(ratios), "better": sum(r > 0 for r in ratios),
            "low": min(ratios, default=0.0), "high": max(ratios, default=0.0),
        }  # fmt: skip
    return found


def _perplexities(cells: list[Cell], adapter: str) -> list[tuple[float, float]]:
    """What scaling leaves: the perplexity of documentation, and that of dictionary."""
    methods = ("as trained", "scaled")
    chosen = [c for c in cells if c["adapter"] == adapter and c["method"] in methods]
    return sorted((c["documentation"], c["dictionary"]) for c in chosen)
