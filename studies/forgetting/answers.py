"""The questions of plan.md, answered from the stored lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from estimates import (
    Curve,
    Estimate,
    Line,
    Resampled,
    cluster,
    inner_errors,
    left_out_r2,
    mean,
    ranks,
    rho,
    smooth,
    spearman,
)
from material import settings

STATISTICS = ("count", "energy", "excess", "frobenius", "spectral", "moved", "drift")
OUTCOMES = ("mrr", "structure", "recall")
NAN = float("nan")
Keep = Callable[[Line], bool]


def everything(line: Line) -> bool:
    """No line is left out."""
    return True


@dataclass(frozen=True)
class Data:
    """What is stored.

    Attributes:
        base: The base's figures on the whole sets and on the few.
        cells: Trained cells.
        interventions: What was done to them.
        outcome: What forgetting is of: a key of the figures.
        smooth: Whether scaling curves are joined by cubics and not by lines.
    """

    base: Line
    cells: list[Line]
    interventions: list[Line]
    outcome: str = "mrr"
    smooth: bool = False
    curves: dict[str, Curve] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Data:
        """The lines of a folder."""

        def lines(name: str) -> list[Line]:
            text = (folder / f"{name}.jsonl").read_text(encoding="utf-8")
            return [json.loads(line) for line in text.splitlines()]

        return cls(lines("base")[0], lines("cells"), lines("interventions"))

    def only(self, keep: Keep, outcome: str | None = None) -> Data:
        """Some of the lines, or another outcome."""
        return Data(
            self.base,
            [line for line in self.cells if keep(line)],
            [line for line in self.interventions if keep(line)],
            outcome or self.outcome,
        )

    def forgetting(self, line: Line) -> float:
        """One minus the outcome over the base's; of an intervention on the fewer pairs."""
        base = self.base["few" if "what" in line else "whole"][self.outcome]
        return 1 - line["figures"][self.outcome] / base

    @cached_property
    def single(self) -> list[Line]:
        """Trained cells of one task alone."""
        return [line for line in self.cells if len(line["tasks"]) == 1]

    @cached_property
    def by_cell(self) -> dict[str, list[Line]]:
        """The interventions of each cell that has its whole curve."""
        found: dict[str, list[Line]] = {}
        for line in self.interventions:
            found.setdefault(line["cell"], []).append(line)
        return {name: rows for name, rows in found.items() if _whole(rows)}

    @cached_property
    def treated(self) -> list[Line]:
        """All interventions on cells that have their whole curve."""
        return [line for rows in self.by_cell.values() for line in rows]

    def curve(self, cell: str) -> Curve:
        """The scaling curve of a cell."""
        if cell not in self.curves:
            rows = [r for r in self.by_cell[cell] if r["what"] in ("scaled", "as trained")]
            rows.sort(key=lambda row: row["setting"])
            curve = Curve(
                np.array([row["setting"] for row in rows]),
                np.array([self.forgetting(row) for row in rows]),
                np.array([task_of(row) for row in rows]),
                self.trained(cell)["weights"]["frobenius"],
            )
            self.curves[cell] = smooth(curve) if self.smooth else curve
        return self.curves[cell]

    def trained(self, cell: str) -> Line:
        """A cell as trained, on the fewer texts."""
        return next(row for row in self.by_cell[cell] if row["what"] == "as trained")


def _whole(rows: list[Line]) -> bool:
    """Whether every scale was measured; a run may have been ended before."""
    scales = {row["setting"] for row in rows if row["what"] in ("scaled", "as trained")}
    return scales >= {1.0, *settings()["scales"]}


def task_of(line: Line) -> float:
    """Accuracy on the task that the cell was trained on last."""
    return line["figures"][f"task {line['tasks'][-1]}"]


# --- Q1: which statistic predicts forgetting


def predictors(data: Data) -> dict[str, dict[str, Estimate]]:
    """ρ of each statistic with forgetting: over trained cells, and within interventions."""
    names = [cluster(line) for line in data.single]
    f = [data.forgetting(line) for line in data.single]
    found = {}
    for name in STATISTICS:
        found[name] = {
            "cells": rho(names, [line["weights"][name] for line in data.single], f),
            "within": mean(*within(data, name)),
        }
    return found


def within(data: Data, name: str) -> tuple[list[float], list[str]]:
    """ρ of a statistic with forgetting among the interventions of each cell, and its cluster."""
    found, names = [], []
    for rows in data.by_cell.values():
        f = [data.forgetting(row) for row in rows]
        found.append(spearman([row["weights"][name] for row in rows], f))
        names.append(cluster(rows[0]))
    return found, names


def rho_difference(data: Data, one: str, other: str) -> Estimate:
    """ρ(one, f) − ρ(other, f) over trained cells."""
    names = [cluster(line) for line in data.single]
    f = np.array([data.forgetting(line) for line in data.single])
    x, y = (np.array([line["weights"][n] for line in data.single]) for n in (one, other))
    if not names:
        return mean([], [])
    drawn = Resampled(names)
    return drawn.estimate(drawn.spearman(x, f) - drawn.spearman(y, f))


def within_difference(data: Data, one: str, other: str) -> Estimate:
    """The same among the interventions of each cell, the mean over cells."""
    (a, names), (b, _) = within(data, one), within(data, other)
    return mean(np.subtract(a, b).tolist(), names)


def added(data: Data, rows: list[Line] | None = None) -> dict[str, dict[str, Estimate]]:
    """Left-one-cluster-out R² of ranks: each statistic alone; what it adds to drift, to size."""
    rows = data.single if rows is None else rows
    names = [cluster(line) for line in rows]
    y = ranks([data.forgetting(line) for line in rows])
    X = {n: ranks([line["weights"][n] for line in rows]) for n in STATISTICS}
    errors = {(n,): left_out_r2(names, X[n][:, None], y) for n in STATISTICS}
    for first in ("drift", "frobenius"):
        for n in STATISTICS:
            if n != first:
                both = np.column_stack([X[first], X[n]])
                errors[first, n] = left_out_r2(names, both, y)

    drawn = Resampled(names)

    def r2(*key: str) -> np.ndarray:
        return 1 - drawn.sums(errors[key][:, 0]) / drawn.sums(errors[key][:, 1])

    found: dict[str, dict[str, Estimate]] = {}
    for n in STATISTICS:
        found[n] = {"alone": drawn.estimate(r2(n))}
        for first in ("drift", "frobenius"):
            if n != first:
                found[n][first] = drawn.estimate(r2(first, n) - r2(first))
    return found


# --- Q2, Q4, Q5: interventions against scaling of the same cell


@dataclass(frozen=True)
class Against:
    """One intervention on one cell, and scaling of that cell.

    Attributes:
        cell: Of which cell.
        cluster: Its cluster.
        what: The intervention.
        setting: Its setting.
        f: Forgetting less that of the cell as trained.
        task: Accuracy less that of the cell as trained.
        task_at_f: Accuracy less that of scaling at equal forgetting.
        f_at_task: Forgetting less that of scaling at equal accuracy.
        f_at_norm: Forgetting less that of scaling of equal norm.
        task_at_norm: Accuracy less that of scaling of equal norm.
    """

    cell: str
    cluster: str
    what: str
    setting: float
    f: float
    task: float
    task_at_f: float
    f_at_task: float
    f_at_norm: float
    task_at_norm: float


def against_scaling(data: Data) -> list[Against]:
    """Every intervention; of scaling itself only what it does to the cell as trained."""
    found = []
    for cell, rows in data.by_cell.items():
        curve, trained = data.curve(cell), data.trained(cell)
        for row in rows:
            if row["what"] == "as trained":
                continue
            f, task = data.forgetting(row), task_of(row)
            if row["what"] == "scaled":  # is on the curve
                less = f - data.forgetting(trained), task - task_of(trained)
                found.append(
                    Against(cell, cluster(row), "scaled", row["setting"], *less, *[NAN] * 4)
                )
                continue
            f_norm, task_norm = curve.at_norm(row["weights"]["frobenius"])
            found.append(Against(
                cell, cluster(row), row["what"], row["setting"], f - data.forgetting(trained),
                task - task_of(trained), task - curve.at_forgetting(f), f - curve.at_task(task),
                f - f_norm, task - task_norm,
            ))  # fmt: skip
    return found


def mean_of(rows: Iterable[Against], key: str) -> Estimate:
    """The mean of a comparison over cells."""
    rows = list(rows)
    return mean([getattr(row, key) for row in rows], [row.cluster for row in rows])


def some(rows: list[Against], what: str, at: Iterable[float] | None = None) -> list[Against]:
    """One intervention at some settings."""
    known = None if at is None else set(at)
    return [r for r in rows if r.what == what and (known is None or r.setting in known)]


def paired(
    rows: list[Against], one: tuple[str, float], other: tuple[str, float], key: str
) -> Estimate:
    """One intervention less another on the same cells."""
    a = {r.cell: r for r in rows if (r.what, r.setting) == one}
    b = {r.cell: r for r in rows if (r.what, r.setting) == other}
    both = sorted(set(a) & set(b))
    return mean(
        [getattr(a[c], key) - getattr(b[c], key) for c in both], [a[c].cluster for c in both]
    )


def bend(data: Data) -> Estimate:
    """How far interpolation lies below inner points of the curves: in the task at equal f."""
    errors, names = [], []
    for cell, rows in data.by_cell.items():
        found = inner_errors(data.curve(cell))
        errors += found
        names += [cluster(rows[0])] * len(found)
    return mean(errors, names)


PROTECT = (0.3, 1.0, 3.0)


def primary(data: Data) -> dict[str, Estimate]:
    """P1 to P8."""
    rows = against_scaling(data)
    return {
        "P1": rho_difference(data, "drift", "count"),
        "P2": within_difference(data, "drift", "count"),
        "P3": within_difference(data, "drift", "frobenius"),
        "P4": paired(rows, ("high", 1.0), ("low", 1.0), "f"),
        "P5": mean_of(some(rows, "protect", PROTECT), "task_at_f"),
        "P6": mean_of(some(rows, "λ", [0.0]), "task_at_f"),
        "P7": paired(rows, ("λ", 0.0), ("λ, aligned", 0.0), "f"),
        "P8": at_common_task(data, "lora-r64", "lora-r1"),
    }


# --- Q6: methods at equal accuracy

COMPARED = ("lora-r1", "lora-r8", "lora-r64", "rslora-r8", "orthonormal-r8")


def common_tasks(data: Data, methods: Iterable[str]) -> dict[str, float]:
    """For each task and seed that has all these methods: the largest accuracy that all reach."""
    found = {}
    for end in sorted({name.split("/", 1)[1] for name in data.by_cell}):
        cells = [f"{method}/{end}" for method in methods]
        if all(cell in data.by_cell for cell in cells):
            found[end] = min(float(data.curve(cell).task.max()) for cell in cells)
    return found


def common_pairs(data: Data, one: str, other: str) -> dict[str, float]:
    """Forgetting of one method less another's, both scaled to the largest common accuracy."""
    return {
        end: data.curve(f"{one}/{end}").at_task(task) - data.curve(f"{other}/{end}").at_task(task)
        for end, task in common_tasks(data, (one, other)).items()
    }


def at_common_task(data: Data, one: str, other: str) -> Estimate:
    """The mean of these pairs."""
    found = common_pairs(data, one, other)
    return mean(list(found.values()), list(found))


# --- Q3: sequences


def sequences(data: Data) -> list[tuple[Line, Line, Line]]:
    """The cells after A, B and C of each method and seed that has gone so far."""
    known = {line["cell"]: line for line in data.cells}
    found = []
    for line in data.cells:
        if line["tasks"] == "ABC":
            first, second = (line["cell"].replace("/ABC/", f"/{t}/") for t in ("A", "AB"))
            if first in known and second in known:
                found.append((known[first], known[second], line))
    return found


def accumulate(data: Data) -> dict[str, Estimate]:
    """What grows from task to task."""
    rows = sequences(data)
    names = [cluster(row[0]) for row in rows]
    f = np.array([[data.forgetting(line) for line in row] for row in rows]).reshape(-1, 3)
    counts = np.array([[line["weights"]["count"] for line in row] for row in rows]).reshape(-1, 3)
    lost = np.array([[row[0]["figures"]["task A"] - line["figures"]["task A"] for line in row]
                     for row in rows]).reshape(-1, 3)  # fmt: skip
    lora = [i for i, row in enumerate(rows) if row[0]["method"] != "full"]
    of = [names[i] for i in lora]
    return {
        "count, A to C": mean(counts[lora, 2] - counts[lora, 0], of),
        "f, B": mean(f[:, 1] - f[:, 0], names),
        "f, C": mean(f[:, 2] - f[:, 1], names),
        "speed": mean((f[:, 2] - f[:, 1]) - (f[:, 1] - f[:, 0]), names),
        "A lost after B": mean(lost[:, 1], names),
        "A lost after C": mean(lost[:, 2], names),
    }


def later(data: Data) -> dict[str, Estimate]:
    """ρ of each statistic after B and C with the loss of task A's accuracy since A."""
    rows = [(row[0], line) for row in sequences(data) for line in row[1:]]
    names = [cluster(line) for _, line in rows]
    lost = np.array([a["figures"]["task A"] - b["figures"]["task A"] for a, b in rows])
    found = {}
    for name in STATISTICS:
        found[name] = rho(names, [line["weights"][name] for _, line in rows], lost.tolist())
    return found


def count_pairs(data: Data, one: str, other: str) -> dict[str, float]:
    """New directions of one method less another's, for each task and seed that has both."""
    known = {(r["method"], r["tasks"], r["seed"]): r["weights"]["count"] for r in data.single}
    ends = sorted({key[1:] for key in known})
    return {
        f"{end}": known[(one, *end)] - known[(other, *end)]
        for end in ends
        if (one, *end) in known and (other, *end) in known
    }
