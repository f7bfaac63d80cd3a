"""Ways to fine-tune, side by side: accuracy, intruders, time per step.  MiniLM on WordNet glosses.

    python benchmarks/finetune.py BASE RUNS [--grid] [--seeds 0 1 2] [--methods ...] [--jobs 2]
    python benchmarks/finetune.py BASE RUNS --times

Every method trains the same steps on the same batches, the head in full; each run is a process of
its own and is kept in the folder RUNS.  ``--grid`` first tries learning rates on the first seed,
with the last 1,000 training glosses held out, and stores which was best.  The counts come from
``bulkedge.audit`` of what was saved: an adapter, or the merged model where it is none.  ``--times``
measures the time of a step, one method after the other in one process.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, store
from methods import lora_options
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/minilm_wordnet"))
import train as example

import bulkedge
from bulkedge.tune import IntruderPenalty, OrthonormalFactors, RankController, SpikeClip
from bulkedge.tune.peft import SpectralConfig, export_lora

STEPS, GRID_STEPS, BATCH, HELD_OUT, TIMED = 300, 150, 16, 1000, 32
PENALTY, STRONG = 0.03, 0.3
# rank, and the learning rates that are tried
METHODS: dict[str, tuple[int, tuple[float, ...]]] = {
    "full": (0, (1e-4, 2e-4, 4e-4)),
    "lora-r1": (1, (3e-3, 6e-3, 1e-2)),
    "lora-r8": (8, (2e-3, 4e-3, 8e-3)),
    "lora-r64": (64, (5e-4, 1e-3, 2e-3)),
    "rslora-r8": (8, (5e-4, 1e-3, 2e-3)),
    "orthonormal-r8": (8, (3e-3, 1e-2, 3e-2)),
    "pissa-r8": (8, (5e-4, 1e-3, 2e-3)),
    "additive-r8": (8, (2e-4, 5e-4, 1e-3)),
    "rotational-r64": (64, (2e-3, 5e-3, 1e-2)),
    "lora-r8+clip": (8, ()),
    "lora-r8+penalty": (8, ()),
    "lora-r8+strong-penalty": (8, ()),
    "lora-r16+controller": (16, ()),
    "lora-r8-slow": (8, ()),
    "lora-r8-slow+clip": (8, ()),
}
LIKE = {"lora-r8+strong-penalty": "lora-r8", "lora-r16+controller": "lora-r8"}
"""Whose learning rate it has, where that is not the part before the plus."""
SLOW = 2e-3
"""The learning rate of the slow ones: that of the example, which trains longer."""


def adapt(model: torch.nn.Module, method: str, rank: int) -> Any:
    """The model, wrapped as the method has it."""
    kind = method.split("-")[0]
    if kind == "full":
        return model
    shared = {"task_type": TaskType.SEQ_CLS, "r": rank, "target_modules": "all-linear"}
    if kind in ("additive", "rotational"):
        return get_peft_model(model, SpectralConfig(variant=kind, **shared))
    return get_peft_model(model, LoraConfig(**shared, **lora_options(kind, rank)))


def helpers(model: Any, method: str) -> tuple[list[Any], IntruderPenalty | None]:
    """What is called after each step, and what is added to the loss."""
    if method.startswith("orthonormal"):
        return [OrthonormalFactors(model)], None
    extra = method.partition("+")[2]
    if extra == "clip":
        return [SpikeClip(model)], None
    if extra == "controller":
        return [RankController(model, start=4)], None
    if extra.endswith("penalty"):
        return [], IntruderPenalty(model, weight=STRONG if "strong" in extra else PENALTY)
    return [], None


def train(model: Any, method: str, stream: Iterator[Any], rate: float, steps: int) -> list[float]:
    """AdamW with a linear decay to zero; the seconds of each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    held, penalty = helpers(model, method)
    model.train()
    seconds = []
    for _ in range(steps):
        batch = next(stream)
        start = time.perf_counter()
        loss = model(**batch).loss
        if penalty is not None:
            loss = loss + penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for holder in held:
            holder.step()
        schedule.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def run_one(base: Path, out: Path, method: str, seed: int, rate: float, *, grid: bool) -> None:
    """Train, test, save, audit one run; writes ``run.json`` last."""
    torch.set_num_threads(1)
    random.seed(seed)
    torch.manual_seed(seed)
    examples = example.load_examples()
    categories = sorted({category for category, _ in examples["train"]})
    if grid:
        examples = {"train": examples["train"][:-HELD_OUT], "test": examples["train"][-HELD_OUT:]}
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    model = adapt(example.load_base(base, categories), method, METHODS[method][0])
    stream = example.batches(list(examples["train"]), tokenizer, categories, BATCH)
    train(model, method, stream, rate, GRID_STEPS if grid else STEPS)
    row = {
        "method": method,
        "seed": seed,
        "learning_rate": rate,
        "parameters": sum(
            p.numel()
            for name, p in model.named_parameters()
            if p.requires_grad and "classifier" not in name
        ),
        "accuracy": example.accuracy(model, examples["test"], tokenizer, categories),
    }
    if not grid:
        row |= audited(base, save(model, method, out))
    out.mkdir(parents=True, exist_ok=True)
    (out / "run.json").write_text(json.dumps(row, indent=1) + "\n")


def save(model: Any, method: str, out: Path) -> Path:
    """What an audit reads: an adapter, or a merged model."""
    if method.startswith(("additive", "rotational")):
        export_lora(model, out / "saved")
    elif method.startswith("pissa"):
        model.merge_and_unload().save_pretrained(out / "saved")
    else:
        model.save_pretrained(out / "saved")
    return out / "saved"


def audited(base: Path, saved: Path) -> dict[str, Any]:
    """Verdicts in the 36 matrices of the encoder, and the strongest update over its threshold."""
    recipe = bulkedge.Recipe(include=("encoder.*",))
    rows = bulkedge.audit(base, saved, recipe=recipe).matrices
    verdicts = [d.verdict.value for row in rows for d in row.directions]
    strengths = [
        row.spectral_norm_update / row.threshold
        for row in rows
        if row.threshold and row.spectral_norm_update is not None
    ]
    return {
        "intruder": verdicts.count("intruder"),
        "rotated": verdicts.count("rotated"),
        "matrices": len(rows),
        "strongest": round(max(strengths), 2),
    }


def in_process(base: Path, out: Path, method: str, seed: int, rate: float, *, grid: bool) -> Any:
    """The row of a run, computed in a process of its own unless it is there."""
    if not (out / "run.json").is_file():
        command = [sys.executable, __file__, str(base), str(out), "--one", method]
        command += ["--seeds", str(seed), "--rate", str(rate), *(["--grid"] if grid else [])]
        with (out.parent / f"{out.name}.log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
    row = json.loads((out / "run.json").read_text())
    print(row, flush=True)
    return row


def in_parallel(jobs: int, calls: list[Callable[[], Any]]) -> list[Any]:
    """The results of all calls, some at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda call: call(), calls))


def choose_rates(base: Path, runs: Path, methods: list[str], jobs: int) -> None:
    """Try the learning rates of each method, and store the rows."""
    runs = runs / "grid"
    runs.mkdir(parents=True, exist_ok=True)
    calls = [
        lambda m=method, r=rate: in_process(base, runs / f"{m}-{r}", m, 0, r, grid=True)
        for method in methods
        for rate in METHODS[method][1]
    ]
    store(
        "finetune_rates",
        {"rows": in_parallel(jobs, calls), "held_out": HELD_OUT, "steps": GRID_STEPS},
    )


def chosen_rates() -> dict[str, float]:
    """The best learning rate of each method; what adds to LoRA has that of LoRA."""
    rows = json.loads((RESULTS / "finetune_rates.json").read_text())["measured"]["rows"]
    rates = {}
    for method in METHODS:
        if "slow" in method:
            rates[method] = SLOW
            continue
        plain = LIKE.get(method, method.partition("+")[0])
        mine = [row for row in rows if row["method"] == plain]
        rates[method] = max(mine, key=lambda row: row["accuracy"])["learning_rate"]
    return rates


def measure_times(base: Path, methods: list[str]) -> None:
    """The median step of each method, and that over a step of plain LoRA of rank 8."""
    torch.set_num_threads(1)
    examples = example.load_examples()
    categories = sorted({category for category, _ in examples["train"]})
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    times = {}
    for method in methods:
        random.seed(0)
        torch.manual_seed(0)
        model = adapt(example.load_base(base, categories), method, METHODS[method][0])
        stream = example.batches(list(examples["train"]), tokenizer, categories, BATCH)
        seconds = train(model, method, stream, 1e-4, TIMED)
        times[method] = round(1e3 * statistics.median(seconds[2:]), 1)
        print(method, times[method], flush=True)
    store("finetune_times", {"step_ms": times, "steps": TIMED - 2})


def main() -> None:
    """Run what is missing, store everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--grid", action="store_true", help="try learning rates")
    parser.add_argument("--times", action="store_true", help="measure the time of a step")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        run_one(a.base, a.runs, a.one, a.seeds[0], a.rate, grid=a.grid)
        return
    if a.times:
        measure_times(a.base, a.methods)
        return
    if a.grid:
        choose_rates(a.base, a.runs, a.methods, a.jobs)
        return
    rates = chosen_rates()
    a.runs.mkdir(parents=True, exist_ok=True)
    calls = [
        lambda m=method, s=seed: in_process(
            a.base, a.runs / f"{m}-seed{s}", m, s, rates[m], grid=False
        )
        for seed in a.seeds
        for method in a.methods
    ]
    rows = in_parallel(a.jobs, calls)
    store("finetune", {"rows": rows, "steps": STEPS, "batch": BATCH, "penalty": [PENALTY, STRONG]})


if __name__ == "__main__":
    main()
