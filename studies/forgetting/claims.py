"""The claims that are judged, and the attacks on the conclusions, as plan.md names them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
from answers import (
    Against,
    Data,
    accumulate,
    against_scaling,
    common_pairs,
    count_pairs,
    mean_of,
    predictors,
    primary,
    sequences,
    some,
    task_of,
)
from estimates import Estimate, Line, cluster, mean, rho, spearman
from tables import table

SEED, PAPER, LAW, NOTES = "seed 001", "arXiv:2410.21228", "arXiv:2607.23711", "independent notes"


def word(estimate: Estimate, side: int) -> str:
    """What an interval says of a claim that expects a sign."""
    return {side: "supported", -side: "contradicted", 0: "undecided"}[estimate.sign]


def _single_counts(data: Data, methods: Callable[[str], bool]) -> Estimate:
    its = [line for line in data.single if methods(line["method"])]
    return mean([line["weights"]["count"] for line in its], [cluster(line) for line in its])


def _in_sequence(data: Data) -> Estimate:
    """The mean ρ of count and forgetting over A, B, C."""
    rows = [row for row in sequences(data) if row[0]["method"] != "full"]
    values = [
        spearman(
            [line["weights"]["count"] for line in row], [data.forgetting(line) for line in row]
        )
        for row in rows
    ]
    return mean(values, [cluster(row[0]) for row in rows])


def _largest_over_edge(data: Data) -> Estimate:
    its = [line for line in data.single if line["method"] == "full"]
    return mean([line["weights"]["over_edge"] for line in its], [f"{line['cell']}" for line in its])


def _saturation(data: Data, name: str) -> Estimate:
    """ρ of a statistic with forgetting among the cells with more new directions than the median."""
    its = [line for line in data.single if line["weights"]["count"] > 0]
    if not its:
        return Estimate(float("nan"))
    middle = np.median([line["weights"]["count"] for line in its])
    its = [line for line in its if line["weights"]["count"] >= middle]
    f = [data.forgetting(line) for line in its]
    return rho([cluster(line) for line in its], [line["weights"][name] for line in its], f)


def listed(values: Iterable[float], digits: int, factor: float = 1.0) -> str:
    """Values where there are too few for an interval."""
    texts = (f"{factor * x:+.{digits}f}".replace("-", "−") for x in values if x == x)
    return ", ".join(texts) or "–"


def few_values(data: Data) -> dict[str, str]:
    """The values of the primary comparisons that may have too few clusters."""
    deleted = some(against_scaling(data), "λ", [0.0])
    return {
        "P6 values": listed((row.task_at_f for row in deleted), 1, 100),
        "P8 values": listed(common_pairs(data, "lora-r64", "lora-r1").values(), 2),
    }


def claims(data: Data) -> list[tuple[str, str, str, str]]:
    """Claim, whose, our figure, verdict."""
    rows, first = against_scaling(data), primary(data)
    count = predictors(data)["count"]["cells"]
    lora = _single_counts(data, lambda m: m in ("lora-r1", "lora-r8", "lora-r64"))
    full = _single_counts(data, lambda m: m == "full")
    grown, within = accumulate(data)["count, A to C"], _in_sequence(data)
    edge = _largest_over_edge(data)
    budget = some(rows, "budget", [1.0])
    moved, cost = mean_of(budget, "f"), mean_of(budget, "task")
    half = some(rows, "λ", [0.5])
    gone = mean_of(some(rows, "project"), "f_at_norm")
    control = mean_of(some(rows, "project, aligned"), "f_at_norm")
    counted, energy = _saturation(data, "count"), _saturation(data, "energy")
    found = [
        (f"LoRA writes new directions, full fine-tuning does not ({PAPER}, {SEED})",
         f"mean count: LoRA {lora.text(0)}, full {full.text(1)}",
         "supported" if lora.sign > 0 and full.value < 1 else "undecided"),
        (f"their count goes with forgetting ({PAPER}, {SEED})", f"ρ = {count.text()} over trained cells",
         word(count, 1)),
        (f"they accumulate over tasks ({PAPER}, {SEED})", f"count after C less after A: {grown.text(0)}",
         word(grown, 1)),
        (f"in sequences forgetting goes with them ({PAPER})", f"mean ρ within a sequence {within.text()}",
         word(within, 1)),
        *_by_method(data),
        (f"λ < 1 on them lowers forgetting ({PAPER})",
         f"λ = 0.5: forgetting {mean_of(half, 'f').text()}, task {mean_of(half, 'task').text(1, 100)} points",
         word(mean_of(half, "f"), -1)),
        (f"and more than scaling the update to the same task accuracy ({PAPER}, implied)",
         f"λ = 0.5: forgetting at equal task {mean_of(half, 'f_at_task').text()}",
         word(mean_of(half, "f_at_task"), -1)),
        (f"layers beyond the threshold carry forgetting, not size ({LAW})",
         f"those weaker less the others weaker, equal norm: forgetting {first['P4'].text()}",
         word(first["P4"], -1)),
        (f"a spike budget lowers forgetting ({LAW})", f"θ_k: forgetting {moved.text()}", word(moved, -1)),
        (f"at no cost in the task, within a point ({LAW})", f"θ_k: task {cost.text(1, 100)} points",
         "contradicted" if cost.sign < 0 else "undecided" if (cost.low or -1) < -0.01 else "supported"),
        (f"more than uniform scaling of the same norm ({LAW}, implied)",
         f"θ_k: forgetting at equal norm {mean_of(budget, 'f_at_norm').text()}",
         word(mean_of(budget, "f_at_norm"), -1)),
        (f"full fine-tuning stays 100 to 200 times below the thresholds ({LAW})",
         f"largest ‖ΔW‖₂/θ_c over layers, by cell: {_ends(data)}",
         "contradicted" if edge.value > 0.05 else "supported"),
        (f"at equal norm deleting them does not improve retention ({NOTES})",
         f"project: forgetting at equal norm {gone.text()}; along aligned directions {control.text()}", word(gone, 1)),
        (f"the count saturates, their energy does not ({NOTES})",
         f"ρ with forgetting among the upper half by count: count {counted.text()}, energy {energy.text()}",
         "supported" if energy.sign > 0 and counted.sign <= 0 else "undecided"),
    ]  # fmt: skip
    return [(claim, figure, verdict) for claim, figure, verdict in found]


def _ends(data: Data) -> str:
    its = sorted(line["weights"]["over_edge"] for line in data.single if line["method"] == "full")
    return f"{its[0]:.2f} to {its[-1]:.2f}" if its else "–"


def _by_method(data: Data) -> list[tuple[str, str, str]]:
    """What rank, α/√r and spectral adapters do to the count."""
    found = []
    for claim, one, other in (
        ("more rank lowers the count", "lora-r64", "lora-r1"),
        ("α/√r lowers it", "rslora-r8", "lora-r8"),
        ("an additive spectral adapter lowers it", "additive-r8", "lora-r8"),
        ("a rotational one lowers it", "rotational-r64", "lora-r8"),
        ("orthonormal factors lower it", "orthonormal-r8", "lora-r8"),
    ):
        pairs = count_pairs(data, one, other)
        less = mean(list(pairs.values()), list(pairs))
        verdict = word(less, -1) if less.low is not None else f"undecided: {less.rows} pairs"
        text = less.text(1) if less.low is not None else listed(pairs.values(), 0)
        found.append((f"{claim} ({SEED})", f"{one} less {other}: {text}", verdict))
    return found


def claims_table(data: Data) -> str:
    """In Markdown."""
    return table(["claim", "our figure", "verdict"], [list(row) for row in claims(data)])


QUESTIONS = {
    "P1": "drift less count: ρ over trained cells",
    "P2": "drift less count: ρ within interventions",
    "P3": "drift less ‖ΔW‖_F: ρ within interventions",
    "P4": "layers beyond θ_k weaker less the others: forgetting at equal norm",
    "P5": "protect: task at equal forgetting, against scaling",
    "P6": "new directions deleted: task at equal forgetting, against scaling",
    "P7": "new less aligned directions deleted: forgetting",
    "P8": "r = 64 less r = 1: forgetting at equal task",
}
IN_POINTS = ("P5", "P6")


def shown(name: str, estimate: Estimate) -> str:
    """In points of the task where it is one."""
    return estimate.text(1, 100) if name in IN_POINTS else estimate.text()


def primary_table(data: Data) -> str:
    """P1 to P8."""
    rows = [
        [name, QUESTIONS[name], shown(name, e), str(e.clusters), str(e.rows),
         "yes" if e.clear else "no"]
        for name, e in primary(data).items()
    ]  # fmt: skip
    return table(["", "comparison", "estimate (95 %)", "clusters", "values", "clear"], rows)


def _terciles(data: Data) -> list[tuple[str, Callable[[Line], bool]]]:
    """Cells of the lowest, middle and highest accuracy for their task."""
    place: dict[str, float] = {}
    for letter in ("A", "B"):
        its = sorted((line for line in data.single if line["tasks"] == letter), key=task_of)
        place |= {line["cell"]: i / len(its) for i, line in enumerate(its)}
    ends = [("lowest", 0.0, 1 / 3), ("middle", 1 / 3, 2 / 3), ("highest", 2 / 3, 1.0)]
    return [
        (
            f"cells of the {name} task accuracy",
            lambda line, a=a, b=b: a <= place.get(line["cell"], -1) < b,
        )
        for name, a, b in ends
    ]


def attacks(data: Data, names: tuple[str, ...] = ("P1", "P2", "P3", "P5", "P6")) -> str:
    """The primary comparisons again, on parts of the data and with other outcomes."""
    parts: list[tuple[str, Data]] = [
        ("as planned", data),
        ("structure for retrieval", data.only(lambda _: True, "structure")),
        ("recall@1 for MRR", data.only(lambda _: True, "recall")),
        ("scaling curves of cubics for lines", replace(data, smooth=True, curves={})),
        ("without full fine-tuning", data.only(lambda line: line["method"] != "full")),
    ]
    for letter in sorted({line["tasks"] for line in data.single}):
        parts.append((f"task {letter} alone", data.only(lambda line, t=letter: line["tasks"] == t)))
    for seed in sorted({line["seed"] for line in data.single}):
        parts.append((f"seed {seed} alone", data.only(lambda line, s=seed: line["seed"] == s)))
    parts += [(name, data.only(keep)) for name, keep in _terciles(data)]
    rows = []
    for label, part in parts:
        found = primary(part)
        rows.append([label, *(shown(name, found[name]) for name in names)])
    rows.append(["any one method left out: the ends", *_left_out(data, names)])
    return table(["", *(f"{name}: {QUESTIONS[name]}" for name in names)], rows)


def _left_out(data: Data, names: tuple[str, ...]) -> list[str]:
    """The least and the most of each comparison when a method is left out."""
    methods = sorted({line["method"] for line in data.single})
    found = [primary(data.only(lambda line, m=m: line["method"] != m)) for m in methods]
    cells = []
    for name in names:
        values = [each[name].value for each in found if np.isfinite(each[name].value)]
        if not values:
            cells.append("–")
            continue
        low, high = min(values), max(values)
        ends = (Estimate(x, clusters=1, rows=1) for x in (low, high))
        cells.append(" to ".join(shown(name, e) for e in ends))
    return cells


def wins(rows: list[Against], key: str = "task_at_f") -> tuple[int, int]:
    """How many comparisons an intervention wins, of how many."""
    values = [getattr(row, key) for row in rows if np.isfinite(getattr(row, key))]
    return sum(value > 0 for value in values), len(values)
