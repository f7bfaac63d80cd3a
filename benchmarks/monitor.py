"""What watching costs: MiniLM under a LoRA of rank 8, the monitor at its defaults.

python benchmarks/monitor.py BASE
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from common import store
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/minilm_wordnet"))
import train as example

from bulkedge.tune import IntruderPenalty, Monitor, RankController, SpikeClip

STEPS = 100


def main() -> None:
    """Train a little, once watched; then time what else may be done at each step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path)
    base = parser.parse_args().base
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    examples = example.load_examples()
    categories = sorted({category for category, _ in examples["train"]})
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    model = example.add_lora(example.load_base(base, categories), 8, 16.0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    start = time.perf_counter()
    monitor = Monitor(model)
    begun = time.perf_counter() - start
    stream = example.batches(list(examples["train"]), tokenizer, categories, 16)
    model.train()
    steps = []
    for _ in range(STEPS):
        batch = next(stream)
        start = time.perf_counter()
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps.append(time.perf_counter() - start)
        monitor.step()
    # layers differ in size and in how hard they are to judge: all of them, the second time around
    monitor.look()
    start = time.perf_counter()
    monitor.look()
    look = (time.perf_counter() - start) / len(monitor.matrices) * monitor.per_call
    known = monitor.thresholds
    penalty = IntruderPenalty(model)
    actions = {
        "clip": SpikeClip(model, thresholds=known).step,
        "controller": RankController(model, start=8, thresholds=known).step,
        "penalty": lambda: penalty().backward(),
    }
    step = statistics.median(steps)
    store(
        "monitor",
        {
            "layers": len(monitor.matrices),
            "every": monitor.every,
            "per_call": monitor.per_call,
            "step_ms": round(1e3 * step, 1),
            "look_ms": round(1e3 * look, 1),
            "begin_s": round(begun, 2),
            "overhead_percent": round(100 * look / (monitor.every * step), 2),
            "each_step_ms": {name: round(_milliseconds(f), 1) for name, f in actions.items()},
        },
    )


def _milliseconds(action) -> float:
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
