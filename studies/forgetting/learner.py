"""MiniLM with a head for each task, trained by one of the methods, and its update afterwards."""

from __future__ import annotations

import copy
import random
import time
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from material import BASE, batches, kept, settings, task
from methods import lora_options
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import bulkedge
from bulkedge.tune import (
    DriftPenalty,
    IntruderPenalty,
    OrthonormalFactors,
    RankController,
    SpikeClip,
)
from bulkedge.tune.peft import SpectralConfig

LIMITS = {"clip": SpikeClip, "control": RankController}


@cache
def tokenizer() -> Any:
    """MiniLM's."""
    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


def encode(texts: list[str], longest: int | None = None) -> Any:
    """Token tensors, padded to the longest."""
    return tokenizer()(
        texts, padding=True, truncation=True,
        max_length=longest or settings()["most_tokens"], return_tensors="pt",
    )  # fmt: skip


def matrices(encoder: nn.Module) -> dict[str, nn.Linear]:
    """The 36 linear layers of an encoder without adapters, by name."""
    return {
        name: module
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("encoder.")
    }


def load_encoder() -> Any:
    """The base, its pooler taken off, nothing to be trained."""
    encoder = AutoModel.from_pretrained(BASE, local_files_only=True)
    encoder.pooler = None
    return encoder.requires_grad_(False)


class Head(nn.Module):
    """A pooler on the first token, started from the base's, and a classifier."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        base = AutoModel.from_pretrained(BASE, local_files_only=True)
        self.pooler: nn.Linear = copy.deepcopy(base.pooler.dense).requires_grad_(True)
        self.dropout = nn.Dropout(settings()["head_dropout"])
        self.classifier = nn.Linear(self.pooler.out_features, classes)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Logits of last hidden states."""
        return self.classifier(self.dropout(torch.tanh(self.pooler(states[:, 0].float()))))


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Mean-pooled embeddings."""
    weights = mask[..., None].float()
    return (states.float() * weights).sum(1) / weights.sum(1)


@dataclass
class Learner:
    """An encoder that goes from task to task, and the heads that it has.

    Attributes:
        method: As in the configuration.
        seed: Of heads, adapters, batches and dropout.
        encoder: Without adapters between tasks.
        heads: By task.
        base: The weights before any training.
    """

    method: str
    seed: int
    encoder: Any = field(default_factory=load_encoder)
    heads: dict[str, Head] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.base:
            self.base = {n: m.weight.detach().clone() for n, m in matrices(self.encoder).items()}

    @property
    def updates(self) -> dict[str, Tensor]:
        """ΔW of every matrix, in float64."""
        return {n: m.weight.detach().double() - self.base[n].double()
                for n, m in matrices(self.encoder).items()}  # fmt: skip

    def learn(self, name: str, rate: float, steps: int) -> dict[str, Any]:
        """Train on a task, merge the update; what there is to tell of the training."""
        random.seed(self.seed)
        torch.manual_seed(100 * self.seed + len(self.heads))
        head = self.heads[name] = Head(len(task(name).categories))
        run = Run(self, name, head, rate, steps)
        told = run.train()
        if self.method == "full":
            run.model.requires_grad_(False)
        else:
            self.encoder = run.model.merge_and_unload().requires_grad_(False)
        for each in self.heads.values():
            each.eval().requires_grad_(False)
        return told


class Run:
    """One training: the model as the method wraps it, and what is called around each step."""

    def __init__(self, learner: Learner, name: str, head: Head, rate: float, steps: int) -> None:
        self.learner, self.task, self.head, self.steps = learner, task(name), head, steps
        self.kind, _, self.extra = learner.method.partition("+")
        learner.encoder.eval()
        moments = base_moments(learner.encoder) if self.extra == "drift-penalty" else None
        self.model: Any = adapt(learner.encoder, self.kind)
        self.holders, self.penalty = self._helpers(moments)
        own = [p for p in self.model.parameters() if p.requires_grad]
        groups = [{"params": own, "lr": rate},
                  {"params": list(head.parameters()), "lr": settings()["head_rate"]}]  # fmt: skip
        self.trained = sum(p.numel() for p in own)
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LinearLR(
            self.optimizer, 1.0, 0.0, total_iters=steps
        )
        self.draw = random.Random(learner.seed + 1)

    def _helpers(self, moments: bulkedge.Moments | None) -> tuple[list[Any], Any]:
        """What is called after each step, and what is added to the loss."""
        what, _, where = self.extra.partition("-")
        if self.kind.startswith("orthonormal"):
            return [OrthonormalFactors(self.model)], None
        if what in LIMITS:
            more = {"start": 4} if what == "control" else {}
            return [LIMITS[what](self.model, of=where, **more)], None
        if moments is not None:
            return [], DriftPenalty(self.model, moments, weight=settings()["drift_penalty"])
        if self.extra == "intruder-penalty":
            return [], IntruderPenalty(self.model, weight=settings()["penalty"])
        return [], None

    def train(self) -> dict[str, Any]:
        """All steps, or fewer if the method stops early."""
        started, seen = time.process_time(), 0.0
        rows = batches(self.task.train, lambda row: len(row[1]), self.steps, self.learner.seed)
        step = 0
        for step, batch in enumerate(rows, start=1):
            self.model.train()
            self.head.train()
            replayed = self.extra == "replay" and step % settings()["replay"]["every"] == 0
            self._step(self._replay() if replayed else self._loss(batch))
            if self.learner.method.endswith("-early") and step % settings()["early"]["every"] == 0:
                now = self.accuracy(self.task.validation[: settings()["early"]["texts"]])
                if now < seen + settings()["early"]["gain"]:
                    break
                seen = now
        return {
            "steps": step, "trained": self.trained,
            "training_seconds": round(time.process_time() - started, 1),
        }  # fmt: skip

    def _step(self, loss: Tensor) -> None:
        if self.penalty is not None:
            loss = loss + self.penalty()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        for holder in self.holders:
            holder.step()
        self.schedule.step()

    def _states(self, tokens: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(**tokens).last_hidden_state

    def _loss(self, batch: list[tuple[str, str]]) -> Tensor:
        labels = torch.tensor([self.task.categories.index(category) for category, _ in batch])
        states = self._states(encode([gloss for _, gloss in batch]))
        return nn.functional.cross_entropy(self.head(states), labels)

    def _replay(self) -> Tensor:
        """Kept texts: one minus the cosine to the base's embeddings."""
        some = self.draw.sample(range(len(kept())), settings()["batch"])
        tokens = encode([kept()[i] for i in some], 64)
        now = pooled(self._states(tokens), tokens["attention_mask"])
        away = 1 - torch.cosine_similarity(now, wanted()[some]).mean()
        return settings()["replay"]["weight"] * away

    @torch.no_grad()
    def accuracy(self, rows: list[tuple[str, str]]) -> float:
        """Share of glosses filed under their own category, as the model is now."""
        self.model.eval()
        self.head.eval()
        rows = sorted(rows, key=lambda row: len(row[1]))
        right = 0
        for start in range(0, len(rows), 64):
            some = rows[start : start + 64]
            found = self.head(self._states(encode([gloss for _, gloss in some]))).argmax(-1)
            right += sum(
                self.task.categories[i] == c for i, (c, _) in zip(found, some, strict=True)
            )
        return right / len(rows)


def adapt(encoder: Any, kind: str) -> Any:
    """The encoder as a method wraps it: its 36 matrices and nothing else are trained."""
    name, _, rank = kind.removesuffix("-slow").removesuffix("-early").partition("-r")
    if name == "full":
        for module in matrices(encoder).values():
            module.weight.requires_grad_(True)
        return encoder
    r = int(rank)
    shared: dict[str, Any] = {"r": r, "target_modules": list(matrices(encoder))}
    if name in ("additive", "rotational"):
        return get_peft_model(encoder, SpectralConfig(variant=name, **shared))
    return get_peft_model(encoder, LoraConfig(**shared, **lora_options(name, r)))


@torch.no_grad()
def moments_of(encoder: Any, texts: list[str]) -> bulkedge.Moments:
    """Second moments of the inputs of the 36 matrices on texts."""
    encoder.eval()
    texts = sorted(texts, key=len)
    with bulkedge.Moments(encoder, include="encoder.*") as moments:
        for start in range(0, len(texts), 64):
            encoder(**encode(texts[start : start + 64], 64))
    return moments


def base_moments(encoder: Any) -> bulkedge.Moments:
    """On the kept texts."""
    return moments_of(encoder, kept())


@cache
@torch.no_grad()
def wanted() -> Tensor:
    """The base's embeddings of the kept texts."""
    encoder, found = load_encoder().eval(), []
    for start in range(0, len(kept()), 64):
        tokens = encode(kept()[start : start + 64], 64)
        found.append(pooled(encoder(**tokens).last_hidden_state, tokens["attention_mask"]))
    return torch.cat(found)
