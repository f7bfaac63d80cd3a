"""Run the study: tune rates, train, evaluate, intervene; what is stored is not done again.

    python studies/forgetting/run.py [--processes 2] [--minutes 75]
    python studies/forgetting/run.py --cell lora-r8/A/0
    python studies/forgetting/run.py --quick FOLDER

One JSON line for each trained cell and each intervention lands in ``results/``, with commit and
machine.  A run that was ended goes on where it was.  ``--cell`` trains one cell again and says how
far it is from the stored one.  ``--quick`` runs a toy of two methods in a folder, in a minute or
two, and analyses it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import material
import torch
from material import RESULTS, ROOT, settings
from transformers import logging as transformers_logging

CLAIMS = ROOT / "build/study"
TOY: dict[str, Any] = {
    "steps": {"A": 6, "B": 4, "C": 4}, "test": 64, "pairs": 64, "structure": 32, "validation": 64,
    "task_moment_texts": 32, "few": {"pairs": 32, "test": 32}, "scales": [0.0, 0.5],
    "strengths": [1.0], "tuning": {"steps": 3, "seed": 0}, "sequences": ["lora-r8"],
    "core": ["lora-r8"], "alone": [], "seeds": 1,
}  # fmt: skip
TOY_METHODS = ("full", "lora-r8")


def main() -> None:
    """Tune, then the grid; or one cell."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=360, help="no new job after that time")
    parser.add_argument("--cell", action="append", default=[], help="train it again and compare")
    parser.add_argument("--quick", type=Path, help="a toy, in this folder")
    parser.add_argument("--only-tune", action="store_true", help="the rates alone")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if a.quick:
        make_toy()
    from store import Store

    store = Store(a.quick or RESULTS, (a.quick or CLAIMS) / "claims")
    if a.cell:
        for name in a.cell:
            again(name, store)
    elif a.worker is not None or a.quick:
        work_through(store, a.worker or time.time() + 3600, only_tune=a.only_tune)
        if a.quick:
            analyse_toy(a.quick)
    else:
        start(a.processes, time.time() + 60 * a.minutes, only_tune=a.only_tune)


def start(processes: int, stop: float, *, only_tune: bool) -> None:
    """So many workers, each a process of one thread."""
    command = [sys.executable, __file__, "--worker", str(stop), *["--only-tune"] * only_tune]
    running = [subprocess.Popen(command) for _ in range(processes)]
    codes = [worker.wait() for worker in running]
    if any(codes):
        raise SystemExit("a worker failed; see above")


def work_through(store: Any, stop: float, *, only_tune: bool) -> None:
    """Rates first, then jobs, those that no other process does."""
    import grid

    tries = [(m, r) for m, its in settings()["methods"].items() for r in its.get("rates", ())]
    while waiting := _untried(store, tries):
        if time.time() > stop or not any(_try(store, *each) for each in waiting):
            time.sleep(2)  # another process has the last ones
        if time.time() > stop:
            return
    if only_tune:
        return
    bench, jobs, began, mine = grid.Bench(), grid.jobs(), time.time(), 0
    with store.claim("base") as free:
        if free:
            bench.base(store)
    for job in jobs:
        with store.claim(job.name) as free:
            if not free or grid.done(job, store) or time.time() > stop:
                continue
            grid.work(job, bench, store, stop)
            mine += 1
        left = sum(not grid.done(job, store) for job in jobs)
        hours = left * (time.time() - began) / mine / 3600
        print(f"{len(jobs) - left} of {len(jobs)} jobs; at most {hours:.1f} h left", flush=True)


def _untried(store: Any, tries: list[tuple[str, float]]) -> list[tuple[str, float]]:
    known = {(line["method"], line["rate"]) for line in store.lines("tuning")}
    return [each for each in tries if each not in known]


def _try(store: Any, method: str, rate: float) -> bool:
    """Tune with one rate unless another process does; whether it was done."""
    import grid

    with store.claim(f"tune {method} {rate}") as free:
        if not free or not _untried(store, [(method, rate)]):
            return False
        grid.tune(store, method, rate)
        print(f"tuned {store.lines('tuning')[-1]}", flush=True)
        return True


def again(name: str, store: Any) -> None:
    """Train one cell again, store how far its figures are from the stored ones."""
    import grid

    stored = {line["cell"]: line for line in store.lines("cells")}
    if name not in stored:
        raise SystemExit(f"no cell {name!r} is stored; those that are: {', '.join(stored)}")
    method, tasks, seed = name.split("/")
    job = grid.Job(method, int(seed), tasks, treated=False)
    *_, (_, _, line) = grid.cells(job, grid.Bench(), store)
    before, now = stored[name]["figures"], line["figures"]
    away = {key: round(now[key] - value, 5) for key, value in before.items()}
    store.append("reruns", {"cell": name, "stored": before, "again": now, "away": away,
                            "stored_by": stored[name]["where"]["commit"]})  # fmt: skip
    print(f"{name}: away by {away}")


def make_toy() -> None:
    """Settings of a toy."""
    settings().update(TOY)
    methods = settings()["methods"]
    settings()["methods"] = {
        name: methods[name] | {"rates": methods[name]["rates"][1:2]} for name in TOY_METHODS
    }


def analyse_toy(folder: Path) -> None:
    """The analysis of what the toy stored."""
    import analyse

    print(analyse.analysed(folder).keys())


if __name__ == "__main__":
    sys.path.insert(0, str(material.HERE))
    main()
