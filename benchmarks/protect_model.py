"""MiniLM with updates put on it, and what it still does: the task, and what the base could do."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from protect_adapters import BASE, BUILD, EXAMPLE, example, glosses
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

TASK_TEXTS, PAIRS, LIKENESSES = 1_500, 1_000, 500
"""Test glosses, pairs to be found, and definitions whose likenesses are compared."""
STORED = "base_model.model.bert."


@dataclass(frozen=True)
class Update:
    """One layer's ``ΔW = scale · B A``."""

    B: Tensor
    A: Tensor
    scale: float

    @cached_property
    def dense(self) -> Tensor:
        """ΔW in float64."""
        return self.scale * self.B.double() @ self.A.double()


class Tuned:
    """An adapter as PEFT wrote it: an update for each layer of the encoder, and the rest."""

    def __init__(self, folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        self.head = {
            name.removeprefix("base_model.model."): value
            for name, value in tensors.items()
            if "lora" not in name
        }
        found: dict[str, Update] = {}
        for name, A in tensors.items():
            if name.endswith(".lora_A.weight"):
                B = tensors[name.replace("lora_A", "lora_B")]
                layer = name.removesuffix(".lora_A.weight").removeprefix(STORED)
                found[layer] = Update(B, A, _alpha(config, layer) / len(A))
        self.pooler = found.pop("pooler.dense")
        self.updates = found

    @property
    def dense(self) -> dict[str, Tensor]:
        """ΔW of every layer of the encoder."""
        return {name: update.dense for name, update in self.updates.items()}


def _alpha(config: dict[str, Any], layer: str) -> float:
    """α of a layer, which a repair that changed its rank has stored by name."""
    known = config["alpha_pattern"]
    return known.get(get_pattern_key(known, f"bert.{layer}"), config["lora_alpha"])


class Batches:
    """Texts, tokenised once, those of like length together."""

    def __init__(self, tokenizer: Any, texts: list[str], size: int = 64) -> None:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        self.order = torch.tensor(order)
        self.tokens = [
            tokenizer(
                [texts[i] for i in order[start : start + size]],
                padding=True, truncation=True, max_length=64, return_tensors="pt",
            )
            for start in range(0, len(order), size)
        ]  # fmt: skip

    def rows(self, found: list[Tensor]) -> Tensor:
        """What was found for each batch, in the order of the texts."""
        rows = torch.cat(found)
        return torch.empty_like(rows).index_copy_(0, self.order, rows)


def load_pairs(part: str) -> dict[str, list[tuple[str, str]]]:
    """Definitions and example sentences of what adapters of a part were *not* trained on."""
    name = "pairs.tsv.gz" if part == "noun" else "noun_pairs.tsv.gz"
    path = BUILD / name if (BUILD / name).exists() else EXAMPLE / name
    found: dict[str, list[tuple[str, str]]] = {}
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        split, definition, sentence = line.split("\t")
        found.setdefault(split, []).append((definition, sentence))
    return found


class Bench:
    """One task: its model, test sets and base figures.

    Evaluated in bfloat16, which is twice as fast here; every arm alike.
    """

    def __init__(self, part: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.examples, self.pairs = glosses(part), load_pairs(part)
        self.categories = sorted({category for category, _ in self.examples["train"]})
        tokenizer = self.tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
        self.model = example.load_base(BASE, self.categories).eval()
        self.base = {
            name: module.weight.detach().clone()
            for name, module in self.model.bert.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        self.model.to(dtype)
        test = self.examples["test"][:TASK_TEXTS]
        definitions, sentences = zip(*self.pairs["test"][:PAIRS], strict=True)
        self.labels = torch.tensor([self.categories.index(category) for category, _ in test])
        self.task = Batches(tokenizer, [gloss for _, gloss in test])
        self.definitions = Batches(tokenizer, list(definitions))
        self.sentences = Batches(tokenizer, list(sentences))
        self.likenesses = self._likenesses(self._embed(self.definitions))

    @torch.no_grad()
    def put(self, updates: Mapping[str, Tensor], tuned: Tuned | None = None) -> None:
        """Give the model its base weights and updates; pooler and head as trained."""
        updates = dict(updates)
        if tuned is not None:
            updates["pooler.dense"] = tuned.pooler.dense
            self.model.load_state_dict(tuned.head, strict=False)
        for name, W0 in self.base.items():
            weight = self.model.bert.get_submodule(name).weight
            weight.copy_(W0 + updates[name] if name in updates else W0)

    def row(self, updates: Mapping[str, Tensor], tuned: Tuned | None = None) -> dict[str, float]:
        """All figures of a model.

        *task* is the accuracy on test glosses; *recall* and *mrr* are of finding example sentences
        by definitions; *structure* is Spearman's correlation of the cosines between definitions
        with those of the base.
        """
        self.put(updates, tuned)
        definitions, sentences = self._embed(self.definitions), self._embed(self.sentences)
        likeness = definitions @ sentences.mT
        ranks = 1 + (likeness > likeness.diagonal()[:, None]).sum(1)
        found = {
            "recall": float((ranks == 1).double().mean()),
            "mrr": float((1 / ranks).double().mean()),
            "structure": spearman(self._likenesses(definitions), self.likenesses),
        }
        return found if tuned is None else {"task": self._accuracy()} | found

    @torch.no_grad()
    def _embed(self, texts: Batches) -> Tensor:
        """Mean-pooled embeddings of unit length."""
        found = []
        for tokens in texts.tokens:
            states = self.model.bert(**tokens).last_hidden_state.float()
            mask = tokens["attention_mask"][..., None]
            found.append((states * mask).sum(1) / mask.sum(1))
        return texts.rows([torch.nn.functional.normalize(rows, dim=1) for rows in found])

    @torch.no_grad()
    def _accuracy(self) -> float:
        """Share of the test glosses filed under their own category."""
        found = [self.model(**tokens).logits.argmax(-1) for tokens in self.task.tokens]
        return float((self.task.rows(found) == self.labels).double().mean())

    def _likenesses(self, embeddings: Tensor) -> Tensor:
        """Cosines of all pairs of the first definitions."""
        some = embeddings[:LIKENESSES]
        above = torch.triu_indices(len(some), len(some), offset=1)
        return (some @ some.mT)[above[0], above[1]]


def spearman(x: Tensor, y: Tensor) -> float:
    """Correlation of the ranks of two samples without ties."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (x, y)])
    return float(torch.corrcoef(ranks)[0, 1])
