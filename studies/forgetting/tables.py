"""The study's tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from answers import (
    COMPARED,
    PROTECT,
    STATISTICS,
    Against,
    Data,
    added,
    against_scaling,
    common_tasks,
    mean_of,
    predictors,
    sequences,
    some,
    task_of,
)
from estimates import Estimate, Line, mean

NAMES = {
    "count": "new directions (count)",
    "energy": "their share of energy",
    "excess": "Σ(θ/θ_k − 1)₊",
    "frobenius": "‖ΔW‖_F",
    "spectral": "‖ΔW‖₂/‖W0‖₂",
    "moved": "leading space moved",
    "drift": "drift on kept texts",
}
LEAST_LOST = 0.1
"""Cells that forgot less have no share that could come back."""
LABELS = {
    "full": "full", "lora-r1": "LoRA r = 1", "lora-r8": "LoRA r = 8", "lora-r64": "LoRA r = 64",
    "lora-r8+drift-penalty": "r = 8, drift penalty", "lora-r8+replay": "r = 8, replay",
    "rslora-r8": "α/√r, r = 8", "pissa-r8": "PiSSA r = 8", "lora-r8+clip-edge": "r = 8, clip at θ_c",
    "orthonormal-r8": "orthonormal r = 8", "additive-r8": "additive r = 8",
    "rotational-r64": "rotational r = 64", "lora-r8+clip-leading": "r = 8, clip at θ_k",
    "lora-r16+control-edge": "ranks controlled at θ_c",
    "lora-r16+control-leading": "ranks controlled at θ_k",
    "lora-r8+intruder-penalty": "r = 8, intruder penalty", "lora-r8-slow": "r = 8, a quarter of the rate",
    "lora-r8-early": "r = 8, stopped early",
}  # fmt: skip
ARMS: tuple[tuple[str, str, float], ...] = (
    *(("scaled", "scaled by {:g}", x) for x in (0.85, 0.7, 0.5, 0.3)),
    *(("protect", "protect, λ = {:g}", x) for x in (0.1, 0.3, 1.0, 3.0, 10.0)),
    ("budget", "layers scaled to θ_k", 1.0), ("budget edge", "layers scaled to θ_c", 1.0),
    ("clip", "spikes clipped at θ_c", 1.0), ("shrink", "shrink", 1.0), ("project", "project", 1.0),
    ("project, aligned", "project, along aligned directions", 1.0),
    *(("λ", "new directions × {:g}", x) for x in (0.75, 0.5, 0.0)),
    *(("λ, aligned", "as many aligned directions × {:g}", x) for x in (0.5, 0.0)),
    ("high", "layers beyond θ_k weaker", 1.0), ("low", "the others weaker, same norm", 1.0),
)  # fmt: skip


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _over(lines: list[Line], value: Callable[[Line], float], digits: int = 1) -> str:
    """The mean over seeds, and the ends."""
    found = [value(line) for line in lines]
    if not found:
        return ""
    text = f"{statistics.mean(found):.{digits}f}"
    if len(found) == 1:
        return text
    return f"{text} ({min(found):.{digits}f} to {max(found):.{digits}f})"


def methods(data: Data, tasks: str = "A") -> str:
    """Each method as trained on a task: mean and ends over seeds."""
    rows = []
    for method, label in LABELS.items():
        its = [c for c in data.cells if c["method"] == method and c["tasks"] == tasks]
        if its:
            rows.append([
                label, str(len(its)), f"{its[0]['rate']:g}",
                _over(its, lambda c: 100 * task_of(c)),
                _over(its, lambda c: c["figures"]["mrr"], 3),
                _over(its, lambda c: c["figures"]["structure"], 2),
                _over(its, lambda c: 100 * c["figures"]["probe"]),
                _over(its, lambda c: c["weights"]["count"], 0),
                _over(its, lambda c: c["weights"]["frobenius"]),
                _over(its, lambda c: c["weights"]["drift"], 4),
                _over(its, lambda c: c["weights"]["over_edge"]),
            ])  # fmt: skip
    return table(
        ["method", "seeds", "rate", "task, %", "retrieval, MRR", "structure", "probe, %",
         "new directions", "‖ΔW‖_F", "drift", "largest ‖ΔW‖₂/θ_c"], rows,
    )  # fmt: skip


def predictor_table(data: Data) -> str:
    """Q1."""
    found, more = predictors(data), added(data)
    rows = []
    for name in STATISTICS:
        its, plus = found[name], more[name]
        rows.append([
            NAMES[name], its["cells"].text(), its["within"].text(), plus["alone"].text(),
            plus["drift"].text() if "drift" in plus else "",
            plus["frobenius"].text() if "frobenius" in plus else "",
        ])  # fmt: skip
    return table(
        ["statistic", "ρ with forgetting, trained cells", "within interventions",
         "R² alone", "added to drift", "added to ‖ΔW‖_F"], rows,
    )  # fmt: skip


def arm_table(data: Data) -> str:
    """Q2, Q4, Q5: every intervention against the cell as trained, and against scaling it."""
    found, rows = against_scaling(data), []
    for what, label, setting in ARMS:
        its = some(found, what, [setting])
        if its:
            left = "" if what == "scaled" else str(mean_of(its, "task_at_f").rows)
            rows.append([
                label.format(setting), str(len(its)), mean_of(its, "task").text(1, 100),
                mean_of(its, "f").text(), mean_of(its, "task_at_f").text(1, 100), left,
                mean_of(its, "f_at_task").text(), mean_of(its, "f_at_norm").text(),
                mean_of(its, "task_at_norm").text(1, 100),
            ])  # fmt: skip
    return table(
        ["intervention", "cells", "task, points", "forgetting",
         "task at equal forgetting, against scaling", "cells compared", "forgetting at equal task",
         "forgetting at equal norm", "task at equal norm"], rows,
    )  # fmt: skip


DOSES = (
    *(("scaled", "scaled by {:g}", x) for x in (0.85, 0.7, 0.5, 0.3)),
    *(("protect", "protect, λ = {:g}", x) for x in (0.1, 0.3, 1.0, 3.0, 10.0)),
)


def back(data: Data, what: str, setting: float) -> list[tuple[float, float]]:
    """Of each cell: the share of the lost retrieval that comes back, and the task's cost."""
    found = []
    for rows in data.by_cell.values():
        trained = next(row for row in rows if row["what"] == "as trained")
        lost = data.forgetting(trained)
        its = [row for row in rows if (row["what"], row["setting"]) == (what, setting)]
        if its and lost > LEAST_LOST:
            share = (lost - data.forgetting(its[0])) / lost
            found.append((100 * share, 100 * (task_of(trained) - task_of(its[0]))))
    return found


def dose_table(data: Data) -> str:
    """How much comes back at which strength: means over cells, and the ends."""
    rows = []
    for what, label, setting in DOSES:
        its = back(data, what, setting)
        if its:
            texts = [
                f"{statistics.mean(x):.{d}f} ({min(x):.{d}f} to {max(x):.{d}f})".replace("-", "−")
                for x, d in zip(zip(*its, strict=True), (0, 1), strict=True)
            ]
            rows.append([label.format(setting), str(len(its)), *texts])
    return table(["", "cells", "of the lost retrieval back, %", "cost in the task, points"], rows)


def protect_rows(found: list[Against]) -> list[Against]:
    """Protect at the strengths of P5."""
    return some(found, "protect", PROTECT)


def sequence_table(data: Data) -> str:
    """Q3: means over seeds after A, B, C."""
    rows = []
    for method, label in LABELS.items():
        its = [row for row in sequences(data) if row[0]["method"] == method]
        if not its:
            continue

        def each(value: Callable[[Line], float], digits: int, its: list = its) -> str:
            means = (statistics.mean(value(row[i]) for row in its) for i in range(3))
            return " → ".join(f"{x:.{digits}f}" for x in means)

        rows.append([
            label, str(len(its)), each(lambda c: c["weights"]["count"], 0),
            each(lambda c: c["weights"]["energy"], 2), each(lambda c: c["weights"]["drift"], 3),
            each(data.forgetting, 2), each(lambda c: 100 * c["figures"]["task A"], 1),
            f"{statistics.mean(100 * row[1]['figures']['task B'] for row in its):.1f}",
            f"{statistics.mean(100 * row[2]['figures']['task C'] for row in its):.1f}",
        ])  # fmt: skip
    return table(
        ["method", "seeds", "new directions after A → B → C", "their energy", "drift",
         "forgetting of retrieval", "accuracy on A, %", "on B after B", "on C after C"], rows,
    )  # fmt: skip


def common_table(data: Data) -> str:
    """Q6: scaled to the accuracy that all reach."""
    rows = []
    for end, task in common_tasks(data, [m for m in COMPARED if m != "orthonormal-r8"]).items():
        cells = []
        for method in COMPARED:
            name = f"{method}/{end}"
            f = data.curve(name).at_task(task) if name in data.by_cell else float("nan")
            cells.append(f"{f:.3f}" if f == f else "–")
        rows.append([end.replace("/", ", seed "), f"{100 * task:.1f}", *cells])
    return table(["task", "accuracy, %", *(LABELS[m] for m in COMPARED)], rows)


def method_gaps(data: Data) -> dict[str, Estimate]:
    """Forgetting of each treated method less that of LoRA r = 8, scaled to the same accuracy."""
    found = {}
    for method in LABELS:
        values, names = [], []
        for cell in data.by_cell:
            own, tasks, seed = cell.split("/")
            other = f"lora-r8/{tasks}/{seed}"
            if own == method != "lora-r8" and other in data.by_cell:
                trained = data.trained(cell)
                at = data.curve(other).at_task(task_of(trained))
                values.append(data.forgetting(trained) - at)
                names.append(f"{tasks}{seed}")
        if values:
            found[method] = mean(values, names)
    return found


def method_table(data: Data) -> str:
    """Q4 of methods."""
    rows = [
        [LABELS[m], str(e.rows), e.text(3)] for m, e in method_gaps(data).items() if m in LABELS
    ]
    return table(
        ["method", "cells compared", "forgetting less that of LoRA r = 8 scaled to its accuracy"],
        rows,
    )
