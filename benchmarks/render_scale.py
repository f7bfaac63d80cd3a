"""The tables of docs/scale.md: measured costs of one matrix, summed over the shapes of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from render_protect import table
from scale_models import MODELS, Costs, Model

from bulkedge.records.document import MAX_RECORD_BYTES

HOUR, GIGABYTE = 3_600.0, 1e9
CORES = 64
EXACT_WIDTH, SKETCH, SMALL_SKETCH = 4_096, 1_024, 256
"""As ``bulkedge moments`` has them by default; and a smaller sketch."""


class Scale:
    """What was measured, by part.

    Args:
        cells: Of ``scale.jsonl``.
        turns: Rows of ``before_after.json``.
        budget: Of ``budget.json``.
        protect: Cells of ``protect_cost.jsonl``.
        dry_runs: Rows of ``dry_run.json``.
    """

    def __init__(
        self,
        cells: Iterable[dict[str, Any]],
        turns: Iterable[dict[str, Any]],
        budget: dict[str, Any],
        protect: Iterable[dict[str, Any]],
        dry_runs: Iterable[dict[str, Any]],
    ) -> None:
        self.dry_runs = list(dry_runs)
        self.cells = [cell["of"] | cell["figures"] for cell in cells]
        known = {tuple(r["shape"]): r["after"]["seconds"] for r in turns if r["kind"] == "trained"}
        known |= {tuple(c["shape"]): c["seconds"] for c in self.of("matrices")}
        self.audit = Costs(known)
        self.budget = Costs({tuple(r["shape"]): r["cpu_seconds"] for r in budget["matrices"]})
        found = {(c["of"]["sides"], c["of"]["inputs"]): c["figures"] for c in protect}
        self.exact = {n: f for (sides, n), f in found.items() if sides == "one"}
        (self.sketch,) = ((n, f) for (sides, n), f in found.items() if sides == "sketches")

    def of(self, part: str) -> list[dict[str, Any]]:
        """The cells of a part."""
        return [cell for cell in self.cells if cell["part"] == part]

    def values(self) -> dict[str, Any]:
        """Of docs/scale.md."""
        return {
            "models": self.models(),
            "plans": self.plans(),
            "used": self.used(),
            "moments": self.moments(),
            "clusters": self.clusters(),
            "of": self.figures(),
        }

    def hours(self, model: Model, costs: Costs, *, cubic: bool = False) -> float:
        """Of one processor, all matrices."""
        each = model.shapes().items()
        return sum(count * costs.of(shape, cubic=cubic) for shape, count in each) / HOUR

    def protect_hours(self, model: Model) -> float:
        """Of one processor: what is made once of each pair of moments, and an update a matrix."""
        pairs = sum(count * self._pair(n, "once") for n, count in model.widths().items())
        shapes = model.shapes().items()
        return (pairs + sum(count * self._pair(n, "update") for (_, n), count in shapes)) / HOUR

    def _pair(self, n: int, what: str) -> float:
        """Seconds for an input of a width, as moments are by default."""
        if n > EXACT_WIDTH:
            width, figures = self.sketch
            return figures[what] * n / width
        return Costs({(m, m): figures[what] for m, figures in self.exact.items()}).of((n, n))

    def models(self) -> str:
        """What each model is, and what an audit of it takes."""
        rows = []
        for model in MODELS:
            shapes = model.shapes()
            m, n = max(shapes, key=lambda shape: shape[0] * shape[1])
            size = sum(2 * m * n * count for (m, n), count in shapes.items()) / GIGABYTE
            low, high = (self.hours(model, self.audit, cubic=cubic) for cubic in (False, True))
            rows.append(
                [model.name, f"{sum(shapes.values()):,}", f"{m:,} × {n:,}", f"{size:,.0f} GB",
                 _range(low, high), _range(low / CORES, high / CORES),
                 _hours(self.hours(model, self.budget))]
            )  # fmt: skip
        return table(
            "| model | matrices | largest | bfloat16 | audit, processor time "
            f"| on {CORES} cores | budget, processor time |",
            rows,
        )

    def plans(self) -> str:
        """What a dry run takes and says."""
        rows = [
            [plan["model"], f"{plan['files']}", f"{plan['seconds']:.1f} s",
             f"{plan['memory'] / 1e6:,.0f} MB", f"{plan['gigabytes_of_memory']:.1f} GB"]
            for plan in self.of("plans")
        ]  # fmt: skip
        return table("| model | files | dry run | its memory | memory of a job, expected |", rows)

    def used(self) -> str:
        """What a dry run expects, and what the audit used."""
        rows = [
            [f"{row['matrices']} of {row['shape'][0]} × {row['shape'][1]}",
             f"{row['expected_gigabytes']:.2f} GB", f"{row['gigabytes']:.2f} GB",
             f"{row['expected_seconds']:.1f} s", f"{row['seconds']:.1f} s"]
            for row in self.dry_runs
        ]  # fmt: skip
        return table(
            "| matrices | memory, expected | used | time of a core, expected | used |", rows
        )

    def moments(self) -> str:
        """What moments and protecting take."""
        rows = []
        for model in MODELS:
            widths = model.widths().items()
            exact = sum(count * 4 * n * n for n, count in widths) / GIGABYTE
            default = sum(count * 4 * _default(n) for n, count in widths) / GIGABYTE
            small = sum(count * 4 * n * (SMALL_SKETCH + 1) for n, count in widths) / GIGABYTE
            widest = max(n for n, _ in widths)
            width, figures = self.sketch
            memory = figures["memory"] * widest / width / GIGABYTE
            rows.append(
                [model.name, f"{sum(count for _, count in widths):,}", f"{exact:,.0f} GB",
                 f"{default:,.0f} GB", f"{small:,.0f} GB", _hours(self.protect_hours(model)),
                 f"{memory:.1f} GB"]
            )  # fmt: skip
        return table(
            "| model | inputs of their own | file of moments, exact | by default | `--rank 256` for all "
            "| protect, processor time | memory of a job |",
            rows,
        )

    def clusters(self) -> str:
        """The scheduler for Ray on simulated nodes."""
        kinds = {
            "plain": "alike",
            "lost and slow": "1 % slow by 10 times, 1 % lost",
        }
        rows = [
            [f"{cell['nodes']:,}", kinds[cell["kind"]], f"{cell['share']:,.1f} s",
             f"{cell['largest']:,.1f} s",
             f"{cell['ended']:,.1f} s", f"{cell['tries_lost']}",
             f"{1e3 * cell['driver'] / cell['matrices']:.2f} ms",
             f"{cell['driver']:.1f} s"]
            for cell in self.of("cluster")
        ]  # fmt: skip
        return table(
            "| nodes | they are | work over nodes | longest matrix | ended after | tries lost | scheduler, a matrix | in all |",
            rows,
        )

    def figures(self) -> dict[str, Any]:
        """Of the prose."""
        (rows,), (processes,) = self.of("rows"), self.of("processes")
        most = sum(MODELS[-1].shapes().values())
        bytes_ = rows["journal_bytes"]
        return {
            "row": {
                "kilobytes": bytes_ / 1e3,
                "append": 1e3 * rows["append_seconds"],
                "disk": 1e3 * rows["append_clock_seconds"],
                "resume": 1e3 * rows["resume_seconds"],
                "most": MAX_RECORD_BYTES / bytes_,
                "largest": most * bytes_ / 1e6,
                "resume_all": most * rows["resume_seconds"],
                "limit": MAX_RECORD_BYTES / 1e6,
                "busy": most * (processes["seconds"] + rows["append_seconds"]),
                "waits": most * (processes["seconds"] + rows["append_clock_seconds"]),
            },
            "process": 1e3 * processes["seconds"],
            "expert": self.audit.of((2_048, 7_168)),
        }  # fmt: skip


def _default(n: int) -> int:
    """Numbers of a moment as it is kept by default."""
    return n * n if n <= EXACT_WIDTH else n * (SKETCH + 1)


def _hours(value: float) -> str:
    return f"{60 * value:.0f} min" if value < 1 else f"{value:,.1f} h"


def _range(low: float, high: float) -> str:
    return _hours(low) if high < 1.05 * low else f"{_hours(low)} to {_hours(high)}"
