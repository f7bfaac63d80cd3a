"""What holding and watching cost: MiniLM under a LoRA of rank 8; holders at their defaults.

    python benchmarks/monitor.py BASE

The same training runs free, held by each holder, and watched, in turn step by step in one run.
Times are those of the processor, which other programs on the machine leave as they are; what is
done after a step is timed by itself, and its share is one of the free steps with the same batches.
"""

from __future__ import annotations

import argparse
import copy
import functools
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
from bulkedge.tune import (
    AdapterHolder,
    DriftClip,
    IntruderPenalty,
    Monitor,
    RankController,
    SpikeClip,
)

STEPS = 24
WARM_UP = 80
"""Steps of :data:`SMALL` texts before, after which a part of the layers is at its limit."""
SMALL = 2
TEXTS = 20
"""How many batches the moments are of."""
PER_CALL = 2
"""How many layers are looked at in turn; all at once cost as much more as there are more."""
LIMIT = 0.01
"""Of drift, which most layers reach."""


Way = Callable[[torch.nn.Module, torch.optim.Optimizer], Callable[[], Any]]
"""From a model and its optimiser to what is done after each step."""


def hook(holder: AdapterHolder, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """All that a holder does after a step once it is attached, to be timed by itself."""
    handle = holder.attach(optimizer)
    (found,) = optimizer._optimizer_step_post_hooks.values()
    handle.remove()
    return functools.partial(_call, found, optimizer, holder=holder)


def _call(after: Callable[[Any], None], optimizer: torch.optim.Optimizer, *, holder: Any) -> None:
    after(optimizer)


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
    small = example.batches(list(examples["train"]), tokenizer, categories, SMALL)
    with Moments(model) as moments, torch.no_grad():
        for _ in range(TEXTS):
            model(**next(stream))
    begun = time.process_time()
    monitor = Monitor(watched := copy.deepcopy(model), per_call=PER_CALL)
    begun = time.process_time() - begun
    known = monitor.thresholds
    ways: dict[str, tuple[torch.nn.Module, Way]] = {
        "free": (model, lambda *_: lambda: None),
        "edge": (copy.deepcopy(model), lambda x, y: hook(SpikeClip(x, thresholds=known), y)),
        "leading": (copy.deepcopy(model), lambda x, y: hook(SpikeClip(x, of="leading"), y)),
        "drift": (copy.deepcopy(model), lambda x, y: hook(DriftClip(x, moments, LIMIT), y)),
        "watched": (watched, lambda *_: monitor.step),
    }
    free, after_seconds, after, at_limit = train(ways, small, stream, options.steps)
    # layers differ in size and in how hard they are to judge: all of them, the second time around
    monitor.check()
    start = time.process_time()
    monitor.check()
    look = (time.process_time() - start) / len(monitor.matrices) * monitor.per_call
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
        "layers_at_limit": at_limit,
        "step_ms": round(1e3 * step, 1),
        "pass_ms": round(1e3 * look * len(monitor.matrices) / monitor.per_call, 1),
        "look_ms": round(1e3 * look, 1),
        "begin_s": round(begun, 2),
        "overhead_percent": round(100 * look / (monitor.every * step), 2),
        "over_free_percent": {
            name: round(100 * sum(own) / sum(free), 2) for name, own in after_seconds.items()
        },
        "each_step_ms": {name: round(_milliseconds(f), 1) for name, f in actions.items()},
    }
    if options.print:
        print(measured)
    else:
        store("monitor", measured)


def train(
    ways: Any, small: Any, stream: Any, steps: int
) -> tuple[list[float], dict[str, list[float]], dict[str, Any], dict[str, int]]:
    """The seconds of each free step, those after it of each way, and what is done after it.

    Last, how many layers each holder changed at the last step.
    """
    optimizers, after, held = {}, {}, {}
    for name, (model, make) in ways.items():
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizers[name] = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
        after[name] = make(model, optimizers[name])
        if name != "watched":
            held |= {name: after[name]}
    free: list[float] = []
    beyond: dict[str, list[float]] = {name: [] for name in ways if name != "free"}
    for turn in range(-WARM_UP, steps):
        batch = next(small if turn < 0 else stream)
        for name, (model, _) in ways.items():
            if turn < 0 and name in ("free", "watched"):
                continue  # their cost does not change as they train
            start = time.process_time()
            loss = model(**batch).loss
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            middle = time.process_time()
            after[name]()
            if turn < 0:
                continue
            if name == "free":
                free.append(middle - start)
            else:
                beyond[name].append(time.process_time() - middle)
    holders = {name: hold.keywords["holder"] for name, hold in held.items() if name != "free"}
    return free, beyond, after, {name: holder.clipped for name, holder in holders.items()}


def _milliseconds(action: Callable[[], Any]) -> float:
    """Median of ten."""
    action()
    seconds = []
    for _ in range(10):
        start = time.process_time()
        action()
        seconds.append(time.process_time() - start)
    return 1e3 * statistics.median(seconds)


if __name__ == "__main__":
    main()
