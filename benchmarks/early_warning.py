"""The early warning against what happened: short LoRA runs of MiniLM at several learning rates.

    python benchmarks/early_warning.py BASE

The strength of every layer's update is logged at step 20, from which a forecast is made, and at the
end.  The exponents of ``bulkedge.tune._forecast`` are those of the runs with a linear schedule; the
cosine runs, of another rank, came after they were chosen.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import torch
from common import Cells
from transformers import AutoTokenizer, get_scheduler

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/minilm_wordnet"))
import train as example

from bulkedge.tune import SpikeClip
from bulkedge.tune._forecast import strengths_of
from bulkedge.tune.trainer._rates import rates_of

RUNS = [
    {"schedule": schedule, "rate": rate, "rank": 8}
    for schedule in ("linear", "constant_with_warmup")
    for rate in (5e-4, 1e-3, 2e-3, 4e-3)
]
OTHERS = [{"schedule": "cosine", "rate": rate, "rank": 2} for rate in (2e-3, 4e-3)]
STEPS, SEEN, WARM_UP, BATCH = 120, 20, 10, 4


def main() -> None:
    """Train at each rate and schedule."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = Cells("early_warning")
    for of in RUNS + OTHERS:
        cells.measure(of, lambda of=of: train(options.base, **of))


def train(base: Path, schedule: str, rate: float, rank: int) -> dict[str, Any]:
    """One run: the strengths over θ_k and the sum of the learning rates, early and at the end."""
    random.seed(0)
    torch.manual_seed(0)
    texts = example.load_examples()
    categories = sorted({category for category, _ in texts["train"]})
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    model = example.add_lora(example.load_base(base, categories), rank, 2.0 * rank).train()
    stream = example.batches(list(texts["train"]), tokenizer, categories, BATCH)
    holder = SpikeClip(model, of="leading")  # for its thresholds: it is not attached
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0
    )
    scheduler = get_scheduler(schedule, optimizer, WARM_UP, STEPS)
    rates, found = rates_of(scheduler, STEPS), []
    for step in range(1, STEPS + 1):
        loss = model(**next(stream)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step in (SEEN, STEPS):
            found.append(strengths_of(holder.matrices, holder.thresholds))
    early, late = (list(strengths.values()) for strengths in found)
    return {
        "sums": [sum(rates[:SEEN]), sum(rates)],
        "early": [round(x, 5) for x in early],
        "late": [round(x, 5) for x in late],
    }


if __name__ == "__main__":
    main()
