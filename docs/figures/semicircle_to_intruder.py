"""The figures and numbers of docs/from-semicircle-to-intruder.md.

    python docs/figures/semicircle_to_intruder.py

Writes the SVGs and ``semicircle_to_intruder.json`` beside this file, in half a minute on one
thread.  Steps 5 to 7 read MiniLM (``make minilm``) and the shipped adapter of rank 1; the figures
take matplotlib.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from noise_steps import beyond_the_edge, noise, outlier, transition, vector
from real_steps import bearing, real_lora, real_weights
from steps import HERE, Step, save

STORED = HERE / "semicircle_to_intruder.json"
SEED = 0


def walk() -> list[Step]:
    """All steps, in the order of the page."""
    generator = torch.Generator().manual_seed(SEED)
    trials = transition(generator, shape=(100, 400), repeats=100)
    return [
        noise(generator),
        beyond_the_edge(generator, shape=(100, 200), draws=2000),
        outlier(trials),
        vector(trials),
        real_weights(),
        real_lora(),
        bearing(),
    ]


def numbers(steps: list[Step]) -> dict[str, Any]:
    """What is stored: the quotes by section and name."""
    return {
        str(section): {name: each._asdict() for name, each in step.quotes.items()}
        for section, step in enumerate(steps, 1)
    }


def main() -> None:
    """Write every figure, and the numbers."""
    torch.set_num_threads(1)
    steps = walk()
    for step in steps:
        save(step)
    stored = {"seed": SEED, "quoted": numbers(steps)}
    STORED.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {STORED}")


if __name__ == "__main__":
    main()
