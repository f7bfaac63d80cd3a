"""How much weaker an update must be to have no new direction: as expected, and as measured.

    python benchmarks/law_adapters.py        # first: the adapters
    python benchmarks/weaker.py

The two adapters of the example and those of ``law_adapters.py`` that are trained fast on nouns,
without the pooler; the slow ones have no new directions.  Each is audited with
``--critical-scale``, and, where it has new directions, rescaled to the scale that the audit without
that option gives, and to the measured one: how many are left.  On the two of the example the search
is compared with a grid from 0.1 to 1 in steps of 1 %, by the eigenproblems of ``law_exact.py``:
what is new there below the measured scale of a matrix; and the audit is timed with the option and
without.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import Cells
from law import SHIPPED
from law_adapters import BASE, adapters
from law_exact import lowest_score

import bulkedge
from bulkedge.comparison import load, make_plan
from bulkedge.records import Recipe, Record
from bulkedge.report.scale import rounded_down, weaker
from bulkedge.triplet import thin_svd

RECIPE = Recipe(exclude=("pooler.*",))
GRID = tuple(0.1 * 1.01**i for i in range(232))


def folders() -> dict[str, Path]:
    """The adapters by name; of rank 1 one, as α/r is α/√r there."""
    fast = [a for a in adapters() if a.fast and a.part == "noun" and (a.rank > 1 or not a.rslora)]
    return SHIPPED | {a.name: a.folder for a in fast}


def as_expected(record: Record) -> Record:
    """The record as it would be without the measured scales."""
    rows = [
        row.model_copy(update={"critical_scale": row.critical_scale.model_copy(
            update={"low": None, "high": None})})
        for row in record.matrices if row.critical_scale is not None
    ]  # fmt: skip
    recipe = record.recipe.model_copy(update={"critical_scale": False})
    return record.model_copy(update={"matrices": rows, "recipe": recipe})


def left_at(folder: Path, scale: float) -> int:
    """How many new directions the copy has that is rescaled to a scale."""
    with tempfile.TemporaryDirectory() as name:
        method = bulkedge.Rescale(uniform=scale)
        done = bulkedge.repair(BASE, folder, Path(name) / "copy", method=method, recipe=RECIPE)
    return (done.after or done.before).summary.new_directions


def on_grid(folder: Path) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """The scales of the grid at which something of a matrix is new, with the lowest score."""
    for comparison in make_plan(BASE, folder, RECIPE).comparisons:
        pair = load(comparison, torch.device("cpu"))
        if pair.spikes is None:
            raise SystemExit(f"{folder}: {comparison.base.name} has no update of two factors")
        svd = thin_svd(pair.base.double())
        score = lowest_score(svd, pair.spikes.P, pair.spikes.Q, RECIPE.top_k)
        scores = ((scale, score(scale)) for scale in GRID)
        yield comparison.base.name, [(s, x) for s, x in scores if x < RECIPE.epsilon]


def audited(folder: Path, *, critical_scale: bool) -> tuple[Record, float]:
    """An audit, and the seconds of the processor that it took."""
    recipe, begun = (
        RECIPE.model_copy(update={"critical_scale": critical_scale}),
        time.process_time(),
    )
    return bulkedge.audit(BASE, folder, recipe=recipe), time.process_time() - begun


def figures(folder: Path) -> dict[str, Any]:
    """What is expected and measured of one adapter, and what each leaves."""
    record, seconds = audited(folder, critical_scale=True)
    judged = [row for row in record.matrices if row.critical_scale and row.scale_curve]
    low = {row.name: row.critical_scale.low for row in judged if row.critical_scale}
    found: dict[str, Any] = {
        "new": record.summary.new_directions,
        "tried": [len(row.scale_curve.judged) for row in judged if row.scale_curve],
    }
    if folder in SHIPPED.values():
        new, times = dict(on_grid(folder)), seconds / audited(folder, critical_scale=False)[1]
        below = {name: [x for s, x in rows if s <= (low[name] or 0)] for name, rows in new.items()}
        found["grid"] = {
            "matrices": len(new),
            "times": round(times, 2),
            "new": sum(bool(scales) for scales in new.values()),
            "missed": {name: scores for name, scores in below.items() if scores},
        }
    told = {"expected": weaker(as_expected(record)), "measured": weaker(record)}
    for name, limit in told.items():
        if limit is not None and 0 < limit.scale < 1:
            found[name] = limit.scale
            found[f"{name}_left"] = left_at(folder, float(rounded_down(limit.scale)))
    return found


def main() -> None:
    """Every adapter that is there, stored one by one."""
    torch.set_num_threads(1)
    cells = Cells("weaker")
    for name, folder in folders().items():
        if not (folder / "adapter_config.json").exists():
            raise SystemExit(f"{folder}: missing; run law_adapters.py first")
        cells.measure({"adapter": name}, lambda folder=folder: figures(folder))


if __name__ == "__main__":
    main()
