"""Every table and figure of docs/study.md from the stored lines.

    python studies/forgetting/analyse.py

Fills the marks of docs/study.md, README.md and docs/faq.md as benchmarks/render.py does, and draws
docs/figures/study_*.svg.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import claims
import figures
import numpy as np
import tables
from answers import (
    Data,
    accumulate,
    against_scaling,
    bend,
    later,
    mean_of,
    paired,
    predictors,
    primary,
    sequences,
    some,
)
from material import RESULTS, ROOT

FIGURES = ROOT / "docs/figures"


def values(folder: Path = RESULTS) -> dict[str, Any]:
    """Values of the marks of docs/study.md."""
    data = Data.read(folder)
    return analysed(folder) | {
        "rates": rates(folder),
        "where": where(folder),
        "counts": counts(data, folder),
        "reruns": reruns(folder),
        "base": data.base["whole"] | {"probe": 100 * data.base["whole"]["probe"]},
    }


def analysed(folder: Path) -> dict[str, Any]:
    """All tables, and the figures that the text quotes."""
    data = Data.read(folder)
    return {
        "methods A": tables.methods(data, "A"),
        "methods B": tables.methods(data, "B"),
        "primary": claims.primary_table(data),
        "predictors": tables.predictor_table(data),
        "arms": tables.arm_table(data),
        "doses": tables.dose_table(data),
        "sequences": tables.sequence_table(data),
        "later": later_table(data),
        "common": tables.common_table(data),
        "gaps": tables.method_table(data),
        "claims": claims.claims_table(data),
        "attacks": claims.attacks(data),
        "said": said(data),
        "of": means(data),
        "kept": kept_table(data),
    }


def means(data: Data) -> dict[str, dict[str, str]]:
    """Each method on task A as trained, over seeds; and what is left of A after B and C."""
    found = {}
    for method in tables.LABELS:
        its = [c for c in data.cells if c["method"] == method and c["tasks"] == "A"]
        if its:
            last = [row[2] for row in sequences(data) if row[0]["method"] == method]
            found[method] = {
                "task": f"{np.mean([100 * tables.task_of(c) for c in its]):.1f}",
                "kept": f"{100 - np.mean([100 * data.forgetting(c) for c in its]):.0f}",
                "mrr": f"{np.mean([c['figures']['mrr'] for c in its]):.3f}",
                "count": f"{np.mean([c['weights']['count'] for c in its]):.0f}",
                "drift": f"{np.mean([c['weights']['drift'] for c in its]):.4f}",
                "steps": f"{min(c['steps'] for c in its)}",
                "norm": f"{np.mean([c['weights']['frobenius'] for c in its]):.0f}",
            }
            if last:
                left = [100 * c["figures"]["task A"] for c in last]
                found[method]["A after C"] = f"{np.mean(left):.1f}"
    return found


def kept_table(data: Data) -> str:
    """Exploratory: a method less LoRA r = 8 of the same seed, as trained on A and after A, B, C."""
    rows = []
    for method in tables.LABELS:
        cells = [tables.LABELS[method]]
        for tasks in ("A", "AB", "ABC"):
            own = _by_seed(data, method, tasks)
            other = _by_seed(data, "lora-r8", tasks)
            seeds = sorted(own.keys() & other.keys())
            less = [[(data.forgetting(x) - data.forgetting(y)),
                     100 * (x["figures"]["task A"] - y["figures"]["task A"])]
                    for x, y in ((own[s], other[s]) for s in seeds)]  # fmt: skip
            for column, digits in ((0, 2), (1, 1)):
                texts = [f"{row[column]:+.{digits}f}".replace("-", "−") for row in less]
                cells.append(", ".join(texts))
        if method != "lora-r8" and cells[1]:
            rows.append(cells)
    return tables.table(
        ["method, by seed", "after A: forgetting", "A, points", "after A, B: forgetting",
         "A, points", "after A, B, C: forgetting", "A, points"], rows,
    )  # fmt: skip


def _by_seed(data: Data, method: str, tasks: str) -> dict[int, dict[str, Any]]:
    its = [c for c in data.cells if c["method"] == method and c["tasks"] == tasks]
    return {c["seed"]: c for c in its}


def said(data: Data) -> dict[str, str]:
    """Figures within sentences."""
    rows, first, rho = against_scaling(data), primary(data), predictors(data)
    found = {name: claims.shown(name, estimate) for name, estimate in first.items()}
    found |= claims.few_values(data)
    found |= by_task(data)
    found |= {f"rho {name}": its["cells"].text() for name, its in rho.items()}
    found |= {f"within {name}": its["within"].text() for name, its in rho.items()}
    for what, setting in {(row.what, row.setting) for row in rows}:
        its = some(rows, what, [setting])
        of = f"{what} {setting:g}"
        found |= {
            f"{of} task": mean_of(its, "task").text(1, 100),
            f"{of} f": mean_of(its, "f").text(),
            f"{of} task at f": mean_of(its, "task_at_f").text(1, 100),
            f"{of} f at task": mean_of(its, "f_at_task").text(),
            f"{of} f at norm": mean_of(its, "f_at_norm").text(),
            f"{of} task at norm": mean_of(its, "task_at_norm").text(1, 100),
        }
    if some(rows, "project"):
        project = ("project", 1.0), ("project, aligned", 1.0)
        found["project control f"] = paired(rows, *project, "f").text()
        found["project control task"] = paired(rows, *project, "task").text(1, 100)
        deleted = ("λ", 0.0), ("λ, aligned", 0.0)
        found["λ control task"] = paired(rows, *deleted, "task").text(1, 100)
    won, of = claims.wins(tables.protect_rows(rows))
    found |= {"protect won": str(won), "protect of": str(of), "bend": bend(data).text(1, 100)}
    found |= {name: estimate.text(0 if "count" in name else 2)
              for name, estimate in accumulate(data).items()}  # fmt: skip
    return found | recovered(data)


def by_task(data: Data) -> dict[str, str]:
    """P5 on each task."""
    found = {}
    for letter in sorted({line["tasks"] for line in data.single}):
        part = data.only(lambda line, letter=letter: line["tasks"] == letter)
        found[f"P5 on {letter}"] = claims.shown("P5", primary(part)["P5"])
    return found


def recovered(data: Data) -> dict[str, str]:
    """What of the lost retrieval comes back, and for what cost."""
    found = {}
    for what, _, setting in tables.DOSES:
        its = tables.back(data, what, setting)
        if its:
            share, cost = np.mean(its, axis=0)
            found[f"{what} {setting:g} back"] = f"{share:.0f}"
            found[f"{what} {setting:g} cost"] = f"{cost:.1f}"
    return found


def later_table(data: Data) -> str:
    """ρ of statistics with what task A loses afterwards."""
    rows = [[tables.NAMES[name], estimate.text()] for name, estimate in later(data).items()]
    return tables.table(["statistic after B and C", "ρ with the loss of A's accuracy"], rows)


def counts(data: Data, folder: Path) -> dict[str, int]:
    """How much there is."""
    treated = {line["cell"] for line in data.interventions}
    finished = [json.loads(line) for line in _text(folder, "finished").splitlines()]
    return {
        "cells": len(data.cells),
        "interventions": len(data.interventions),
        "treated": len(treated),
        "single": len(data.single),
        "sequences": len(sequences(data)),
        "seeds": len({line["seed"] for line in data.cells}),
        "tuned": len({line["method"] for line in _lines(folder, "tuning")}),
        "ends": sum(_at_end(rows) for rows in _tried(folder).values()),
        "finished": len(finished),
        "without": sum(not line["new"] for line in finished),
        "minutes": round(sum(_seconds(folder)) / 60),
    }


def _tried(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Rates of each method with their accuracy, ascending."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in _lines(folder, "tuning"):
        found.setdefault(line["method"], []).append((line["rate"], line["accuracy"]))
    return {method: sorted(rows) for method, rows in found.items()}


def _at_end(rows: list[tuple[float, float]]) -> bool:
    """Whether the best rate is the lowest or the highest."""
    best = min(rows, key=lambda row: (-row[1], row[0]))
    return best in (rows[0], rows[-1])


def _text(folder: Path, name: str) -> str:
    path = folder / f"{name}.jsonl"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _text(folder, name).splitlines()]


def _seconds(folder: Path) -> list[float]:
    names = ("tuning", "cells", "interventions")
    return [line["seconds"] for name in names for line in _lines(folder, name)]


def rates(folder: Path) -> str:
    """What was tried, and the accuracy on validation texts."""
    found: dict[str, list[str]] = {}
    for line in sorted(_lines(folder, "tuning"), key=lambda line: line["rate"]):
        text = f"{line['rate']:g}: {100 * line['accuracy']:.1f}"
        found.setdefault(line["method"], []).append(text)
    rows = [[tables.LABELS[m], *found[m]] for m in tables.LABELS if m in found]
    return tables.table(["method", *["rate: accuracy, %"] * 3], rows)


def reruns(folder: Path) -> str:
    """Cells that were trained again."""
    rows = [
        [
            line["cell"],
            *(
                f"{100 * line['away'][key]:+.2f}"
                for key in (f"task {line['cell'].split('/')[1][-1]}", "mrr", "recall")
            ),
        ]
        for line in _lines(folder, "reruns")
    ]
    return tables.table(["cell", "task accuracy, points away", "MRR", "recall@1"], rows)


def where(folder: Path) -> str:
    """Commits and machine."""
    places = [line["where"] for name in ("tuning", "cells", "interventions")
              for line in _lines(folder, name)]  # fmt: skip
    commits = Counter(place["commit"] for place in places)
    place = places[-1]
    return (
        f"*Commit {', '.join(commits)}; {place['processor']}, {place['cores']} cores, "
        f"{place['threads']} thread a process; Python {place['python']}, torch {place['torch']}.*"
    )


def short(folder: Path = RESULTS) -> dict[str, Any]:
    """What README.md and docs/faq.md quote."""
    data = Data.read(folder)
    return {"said": said(data), "of": means(data), "counts": counts(data, folder)}


def main() -> None:
    """Pages and figures."""
    import render

    quoting = ("before-you-train", "faq", "fine-tuning", "study")
    for name in ("README.md", *(f"docs/{name}.md" for name in quoting)):
        page, make = ROOT / name, render.FILLED.get(name)
        if make is not None:
            page.write_text(render.fill(page.read_text("utf-8"), make()), encoding="utf-8")
    figures.draw(Data.read(RESULTS), FIGURES)


if __name__ == "__main__":
    main()
