"""What ``IntruderMonitor()`` costs as it stands: MiniLM under a LoRA of rank 8 in a ``Trainer``.

    python benchmarks/monitor_default.py BASE

Runs of several lengths with the monitor at its defaults.  Its share is the time of all its checks,
the full pass before training and the one at its end included, over the time of the whole run.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from common import store
from transformers import AutoTokenizer, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/minilm_wordnet"))
import train as example

from bulkedge.tune import IntruderMonitor

STEPS = (120, 1000)
BATCH = 16


def main() -> None:
    """Train for each number of steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("--steps", type=int, nargs="*", default=STEPS)
    parser.add_argument("--print", action="store_true", help="store nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured = {f"{steps}_steps": run(options.base, steps) for steps in options.steps}
    if options.print:
        print(measured)
    else:
        store("monitor_default", measured)


def run(base: Path, steps: int) -> dict[str, Any]:
    """One run: its seconds, those of the checks, and at how many steps there were any."""
    random.seed(0)
    torch.manual_seed(0)
    examples = example.load_examples()["train"]
    categories = sorted({category for category, _ in examples})
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    random.shuffle(examples)
    data = [
        {"input_ids": tokens["input_ids"][0], "labels": int(tokens["labels"][0])}
        for tokens in (
            example.encode([one], tokenizer, categories) for one in examples[: BATCH * steps]
        )
    ]
    model = example.add_lora(example.load_base(base, categories), 8, 16.0)
    monitor = IntruderMonitor()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            learning_rate=2e-3,
            per_device_train_batch_size=BATCH,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=data,  # pyright: ignore[reportArgumentType]
            processing_class=tokenizer,
            callbacks=[monitor],
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    watched: Any = monitor.monitor
    return {
        "layers": len(watched.matrices),
        "seconds": round(seconds, 1),
        "check_seconds": round(watched.check_seconds, 2),
        "every": watched.every,
        "checks": len(monitor.history),
        "overhead_percent": round(100 * watched.seconds / seconds, 1),
    }


if __name__ == "__main__":
    main()
