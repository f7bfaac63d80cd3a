"""Protecting a causal model: trained here from scratch, fine-tuned by LoRA on another kind of text.

python benchmarks/protect_causal.py

The base is a small Llama that learns documentation: the docstrings of Python's standard library,
numpy, torch and transformers.  The fine-tunes learn dictionary: WordNet's noun glosses, from the
example.  What is measured is the perplexity of each kind on held-out text; everything goes through
files, by ``bulkedge.collect_moments``, ``bulkedge.repair`` and stock PEFT.  Five minutes on one
core; each cell is stored once it is measured.
"""

from __future__ import annotations

import ast
import math
import random
import sysconfig
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from common import Cells
from peft import LoraConfig, PeftModel, get_peft_model
from protect_adapters import BUILD, glosses
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

import bulkedge
from bulkedge.repairing.solve import RIDGE

PLACE = BUILD / "causal"
BASE = PLACE / "base"
SOURCES = (
    ("stdlib", "*.py"), ("purelib", "numpy/*/*.py"), ("purelib", "torch/nn/**/*.py"),
    ("purelib", "transformers/*.py"),
)  # fmt: skip
VOCABULARY, LENGTH, BATCH = 1_024, 128, 16
STEPS, TUNING_STEPS = 300, 100
RATE, TUNING_RATE = 3e-3, 3e-3
RANKS_AND_SEEDS = ((8, 0), (8, 1))
SCALES = (0.8, 0.6, 0.4, 0.2, 0.3, 0.5, 0.7)
STRENGTHS = (0.3, 1.0, 3.0)
TEXTS, TEST_BLOCKS = 400, 64
END = "<|end|>"


def docstrings(folder: Path, pattern: str) -> Iterator[str]:
    """Of all modules in a folder."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    for file in sorted(folder.glob(pattern)):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            if text and text.count(" ") > 5:
                yield text


@cache
def texts(kind: str) -> dict[str, list[str]]:
    """``documentation`` or ``dictionary``, by split."""
    if kind == "dictionary":
        return {split: [text for _, text in rows] for split, rows in glosses("noun").items()}
    paths = sysconfig.get_paths()
    found = [text for path, pattern in SOURCES for text in docstrings(Path(paths[path]), pattern)]
    found = sorted(set(found))
    random.Random(0).shuffle(found)
    return {"test": found[:500], "train": found[500:]}


@cache
def tokenizer() -> Any:
    """Byte pairs of both kinds of text."""
    if not (BASE / "tokenizer.json").exists():
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        some = [text[:500] for kind in ("documentation", "dictionary")
                for text in texts(kind)["train"][:4_000]]  # fmt: skip
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(
            some,
            trainers.BpeTrainer(
                vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet,
                show_progress=False,
            ),
        )  # fmt: skip
        PreTrainedTokenizerFast(
            tokenizer_object=made, eos_token=END, pad_token=END, model_max_length=LENGTH
        ).save_pretrained(BASE)
    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


@cache
def blocks(kind: str, split: str) -> Tensor:
    """The texts one after another, in rows of one length."""
    known = texts(kind)[split]
    ids = [i for row in tokenizer()(known, truncation=False)["input_ids"] for i in (*row, 0)]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)


def train(model: torch.nn.Module, kind: str, *, steps: int, rate: float, seed: int) -> None:
    """AdamW, warmed up, with a linear decay to zero."""
    known, generator = blocks(kind, "train"), torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 - step / steps)
    )
    model.train()
    for step in range(steps):
        batch = known[torch.randint(len(known), (BATCH,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{kind}, step {step}: {float(loss):.2f}", flush=True)
    model.eval()


def make_base() -> None:
    """Train the base, once."""
    tokenizer()
    if not (BASE / "model.safetensors").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=LENGTH,
            bos_token_id=0, eos_token_id=0, pad_token_id=None,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        train(model, "documentation", steps=STEPS, rate=RATE, seed=0)
        model.save_pretrained(BASE)


def make_adapter(rank: int, seed: int) -> Path:
    """Fine-tune it, once."""
    folder = PLACE / f"lora-r{rank}-s{seed}"
    if not (folder / "adapter_model.safetensors").exists():
        torch.manual_seed(seed)
        config = LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear"
        )
        model = get_peft_model(LlamaForCausalLM.from_pretrained(BASE), config)
        train(model, "dictionary", steps=TUNING_STEPS, rate=TUNING_RATE, seed=seed)
        model.save_pretrained(folder)
    return folder


@torch.no_grad()
def perplexities(adapter: Path | None, scale: float = 1.0) -> dict[str, float]:
    """Of both kinds of held-out text."""
    model: Any = LlamaForCausalLM.from_pretrained(BASE)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.mul_(scale)
    model.eval()
    found = {}
    for kind in ("documentation", "dictionary"):
        losses = [
            float(model(input_ids=batch, labels=batch).loss)
            for batch in blocks(kind, "test")[:TEST_BLOCKS].split(16)
        ]
        found[kind] = round(math.exp(sum(losses) / len(losses)), 4)
    return found


@cache
def moments(kind: str, adapter: Path | None = None) -> bulkedge.Moments:
    """Of the base on documentation, of a fine-tune on dictionary."""
    kept = texts(kind)["train"][:TEXTS]
    return bulkedge.collect_moments(BASE, kept, tuned=adapter, curvatures=True)


def protected(adapter: Path, strength: float, sides: str) -> dict[str, float]:
    """Perplexities of the repaired adapter."""
    method = bulkedge.Protect(
        moments("documentation"),
        moments("dictionary", adapter),
        strength=strength,
        sides=sides,
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        record = bulkedge.repair(BASE, adapter, out, method=method)
        drifts = [row.drift_after for row in record.matrices if row.drift_after is not None]
        return perplexities(out) | {"drift": round(sum(drifts) / len(drifts), 6)}


def main() -> None:
    """Train, measure, store."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    cells = Cells("protect_causal")
    make_base()
    cells.measure({"adapter": "none", "method": "base", "setting": 0}, partial(perplexities, None))
    for rank, seed in RANKS_AND_SEEDS:
        adapter = make_adapter(rank, seed)

        def add(
            method: str,
            setting: float,
            figures: Any,
            rank: int = rank,
            seed: int = seed,
            **more: Any,
        ) -> None:
            of = {"adapter": f"r = {rank}, seed {seed}", "method": method, "setting": setting}
            cells.measure(of | more, figures)

        add("as trained", 1.0, partial(perplexities, adapter))
        for strength in STRENGTHS:
            for method, sides in (("protect", "one"), ("two-sided", "two")):
                found = partial(protected, adapter, strength, sides)
                add(method, strength, found, ridge=RIDGE)
        for scale in SCALES:
            add("scaled", scale, partial(perplexities, adapter, scale))


if __name__ == "__main__":
    main()
