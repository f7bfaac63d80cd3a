"""Full fine-tuning against LoRA at the same accuracy: the table of this example.

    python examples/minilm_wordnet/table.py BASE RUNS

Trains MiniLM in full and by LoRA of rank 1 and 8, three seeds each (about half an hour on one
core), unless the run already lies in the folder RUNS; audits every run; writes ``table.json``
beside this file and prints the table.  The pooler is counted apart: this base was trained with
mean pooling, which never touched it, so it is still a random matrix (its bias is exactly zero), and
whatever is trained there is new to it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import bulkedge

METHODS = {
    "full": ["--method", "full"],
    "lora-r1": ["--method", "lora", "--rank", "1"],
    "lora-r8": ["--method", "lora", "--rank", "8"],
}
SEEDS = (0, 1, 2)
HERE = Path(__file__).parent


def train(base: Path, out: Path, options: list[str]) -> dict:
    """The run in ``out``, trained now if it is not there yet."""
    if not (out / "training.json").is_file():
        command = [sys.executable, HERE / "train.py", base, out, *options]
        subprocess.run([str(part) for part in command], check=True)  # noqa: S603
    return json.loads((out / "training.json").read_text())


def count(base: Path, tuned: Path) -> dict[str, int]:
    """Intruder dimensions in the encoder and in the pooler, by verdict."""
    recipe = bulkedge.Recipe(include=("encoder.*", "pooler.*"))
    counts = dict.fromkeys(
        ("encoder_matrices", "encoder_rotated", "encoder_intruder", "pooler_paper"), 0
    )
    for matrix in bulkedge.audit(base, tuned, recipe=recipe).matrices:
        if matrix.name.startswith("pooler."):
            counts["pooler_paper"] += matrix.new_directions
            continue
        counts["encoder_matrices"] += 1
        for direction in matrix.directions:
            if direction.verdict.value in ("rotated", "intruder"):
                counts[f"encoder_{direction.verdict.value}"] += 1
    return counts


def table(rows: list[dict]) -> str:
    """The table in Markdown: mean over the seeds, and each seed's count."""
    lines = [
        "| fine-tune | trained parameters | accuracy | new directions in 36 matrices, by seed |",
        "|---|---|---|---|",
    ]
    for name in METHODS:
        runs = [row for row in rows if row["name"] == name]
        accuracy = [100 * row["accuracy"] for row in runs]
        counts = [row["encoder_rotated"] + row["encoder_intruder"] for row in runs]
        lines.append(
            f"| {name} | {runs[0]['trained_parameters']:,} | {statistics.mean(accuracy):.1f} % "
            f"({min(accuracy):.1f} to {max(accuracy):.1f}) | {', '.join(map(str, counts))} |"
        )
    return "\n".join(lines)


def show(rows: list[dict]) -> None:
    """Print the table."""
    print(table(rows))


def main() -> None:
    """Train, audit, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("runs", type=Path)
    arguments = parser.parse_args()
    rows = []
    for seed in SEEDS:
        for name, options in METHODS.items():
            out = arguments.runs / f"{name}-seed{seed}"
            training = train(arguments.base, out, [*options, "--seed", str(seed)])
            del training["seconds"]  # says more about the machine than about the method
            rows.append({"name": name, **training, **count(arguments.base, out)})
    (HERE / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
