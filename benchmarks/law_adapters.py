"""Train the adapters on which ``law.py`` compares predictions: MiniLM on WordNet glosses.

    python benchmarks/law_adapters.py [--wordnet /usr/share/wordnet]

Plain LoRAs of six ranks, two learning rates and both scales (α/r, α/√r), on nouns and verbs in
turn; with orthonormal factors, whose spikes have one strength, 0.5 or 1.5; and by PiSSA, converted
by PEFT to a LoRA of twice the rank on the base as it was.  100 short steps each, some 15 seconds on
one core: these are not adapters to use, but updates as training makes them.  Each lands in
``build/law/adapters/NAME``, once; what is there already is kept.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from protect_adapters import BASE, ROOT, categories_of, example, fit, train_missing
from torch.optim.optimizer import register_optimizer_step_post_hook

from bulkedge.tune import OrthonormalFactors

BUILD = ROOT / "build/law/adapters"
RANKS = (1, 2, 4, 8, 16, 64)
STEPS, BATCH = 100, 8
ORTHONORMAL = {False: 0.5, True: 1.5}
"""The one strength of all spikes with orthonormal factors: with α/r, with α/√r."""


@dataclass(frozen=True)
class Trained:
    """How an adapter was trained: kind, rank, whether fast, whether under α/√r, on what glosses."""

    kind: str
    rank: int
    fast: bool
    rslora: bool
    part: str

    @property
    def name(self) -> str:
        """As in the results."""
        rate, scale = "fast" if self.fast else "slow", "rs" if self.rslora else "r"
        return f"{self.kind}-{self.rank}-{rate}-{scale}-{self.part}"

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return BUILD / self.name

    @property
    def learning_rate(self) -> float:
        """2e-3 or 6e-3, lower for high ranks, whose updates add up; more for orthonormal ones."""
        rate = (6e-3 if self.fast else 2e-3) * min(1.0, (8 / self.rank) ** 0.5)
        return {"plain": 1.0, "orthonormal": 5.0, "pissa": 0.25}[self.kind] * rate

    @property
    def alpha(self) -> float:
        """The α of its configuration."""
        if self.kind == "orthonormal":
            strength = ORTHONORMAL[self.rslora]
            return strength * (self.rank**0.5 if self.rslora else self.rank)
        return float(self.rank)


def adapters() -> list[Trained]:
    """All of them, in the order of training: the kinds in turn."""
    found = []
    for fast, rslora in ((False, False), (True, True), (True, False), (False, True)):
        for number, rank in enumerate(RANKS):
            parts = ("noun", "verb") if (number + fast) % 2 else ("verb", "noun")
            found.append(Trained("plain", rank, fast, rslora, parts[0]))
            if fast == rslora:
                # PiSSA stays under α/r, as PEFT converts it there alone
                found.append(
                    Trained("orthonormal", rank, fast, rslora, parts[1])
                    if number % 2 == fast
                    else Trained("pissa", rank, fast, False, parts[1])
                )
    return found


def set_aside() -> set[str]:
    """The names that are kept for the end: the third whose digests are the smallest."""
    names = sorted(a.name for a in adapters())
    names.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return set(names[: len(names) // 3])


def prepared(adapter: Trained, categories: list[str]) -> Any:
    """The base with an untrained adapter of that kind."""
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        use_rslora=adapter.rslora,
        target_modules="all-linear",
        init_lora_weights="pissa" if adapter.kind == "pissa" else True,
    )
    model = get_peft_model(example.load_base(BASE, categories), config)
    config.base_model_name_or_path = example.BASE_NAME
    return model


def train(adapter: Trained) -> None:
    """Train one adapter as the example does, and write it."""
    random.seed(0)
    torch.manual_seed(adapter.rank)
    model = prepared(adapter, categories_of(adapter.part))
    start, saving = BUILD / f"{adapter.name}-start", {}
    if adapter.kind == "pissa":
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(start)
        model.peft_config["default"].init_lora_weights = "pissa"
        saving = {"path_initial_model_for_weight_conversion": str(start)}
    held = OrthonormalFactors(model) if adapter.kind == "orthonormal" else None
    hook = register_optimizer_step_post_hook(lambda *_: held.step() if held else None)
    facts = asdict(adapter) | {"alpha": adapter.alpha}
    try:
        fit(model, adapter, steps=STEPS, batch=BATCH, facts=facts, **saving)
    finally:
        hook.remove()
        shutil.rmtree(start, ignore_errors=True)


if __name__ == "__main__":
    train_missing(adapters(), train, __doc__)
