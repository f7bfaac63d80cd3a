"""What holding and watching cost: MiniLM under a LoRA of rank 8, everything at its defaults.

    python benchmarks/monitor.py BASE

The same training runs free, held by each holder, and watched, in turn step by step in one run;
ratios are medians over the steps, each over the free step with the same batch.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import store
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/minilm_wordnet"))
import train as example

from bulkedge import Moments
from bulkedge.tune import DriftClip, IntruderPenalty, Monitor, RankController, SpikeClip

STEPS = 100
WARM_UP = 2
TEXTS = 20
"""How many batches the moments are of."""
LIMIT = 0.01
"""Of drift, which most layers reach."""


def main() -> None:
    """Train a little in several ways; then time what else may be done at each step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--print", action="store_true", help="store nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    examples = example.load_examples()
    categories = sorted({category for category, _ in examples["train"]})
    tokenizer = AutoTokenizer.from_pretrained(options.base, local_files_only=True)
    model = example.add_lora(example.load_base(options.base, categories), 8, 16.0)
    stream = example.batches(list(examples["train"]), tokenizer, categories, 16)
    with Moments(model) as moments, torch.no_grad():
        for _ in range(TEXTS):
            model(**next(stream))
    begun = time.perf_counter()
    monitor = Monitor(watched := copy.deepcopy(model))
    begun = time.perf_counter() - begun
    known = monitor.thresholds
    ways: dict[str, tuple[torch.nn.Module, Callable[[torch.nn.Module], Callable[[], Any]]]] = {
        "free": (model, lambda _: lambda: None),
        "edge": (copy.deepcopy(model), lambda x: SpikeClip(x, thresholds=known).step),
        "leading": (copy.deepcopy(model), lambda x: SpikeClip(x, of="leading").step),
        "drift": (copy.deepcopy(model), lambda x: DriftClip(x, moments, LIMIT).step),
        "watched": (watched, lambda _: monitor.step),
    }
    seconds, after = train(ways, stream, options.steps)
    free = seconds["free"]
    # layers differ in size and in how hard they are to judge: all of them, the second time around
    monitor.check()
    start = time.perf_counter()
    monitor.check()
    look = (time.perf_counter() - start) / len(monitor.matrices) * monitor.per_call
    penalty = IntruderPenalty(model)
    actions = {
        "clip": after["edge"],
        "drift": after["drift"],
        "controller": RankController(model, start=8, thresholds=known).step,
        "penalty": lambda: penalty().backward(),
    }
    step = statistics.median(free)
    measured = {
        "layers": len(monitor.matrices),
        "every": monitor.every,
        "per_call": monitor.per_call,
        "steps": options.steps,
        "step_ms": round(1e3 * step, 1),
        "look_ms": round(1e3 * look, 1),
        "begin_s": round(begun, 2),
        "overhead_percent": round(100 * look / (monitor.every * step), 2),
        "over_free": {name: round(_ratio(own, free), 4) for name, own in seconds.items()},
        "each_step_ms": {name: round(_milliseconds(f), 1) for name, f in actions.items()},
    }
    if options.print:
        print(measured)
    else:
        store("monitor", measured)


def train(ways: Any, stream: Any, steps: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """The seconds of each step of each way, and what each does after its steps."""
    after = {name: make(model) for name, (model, make) in ways.items()}
    optimizers = {}
    for name, (model, _) in ways.items():
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizers[name] = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(steps + WARM_UP):
        batch = next(stream)
        for name, (model, _) in ways.items():
            start = time.perf_counter()
            loss = model(**batch).loss
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            after[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: own[WARM_UP:] for name, own in seconds.items()}, after


def _ratio(own: list[float], free: list[float]) -> float:
    """The median of the ratios of steps with the same batch."""
    return statistics.median(x / y for x, y in zip(own, free, strict=True))


def _milliseconds(action: Callable[[], Any]) -> float:
    """Median of ten."""
    action()
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


if __name__ == "__main__":
    main()
