"""Fine-tune MiniLM to file WordNet noun glosses under their category, in full or by LoRA.

    python examples/minilm_wordnet/train.py BASE OUT --method lora --rank 8
    python examples/minilm_wordnet/train.py BASE OUT --method full

``BASE`` is the model folder that ``make minilm`` fetches.  OUT receives what stock PEFT or
transformers writes (an adapter folder, or a model folder), and ``training.json``: every setting,
and the accuracy on the 4,000 test glosses.  Needs the extra ``[hf]``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from rich.progress import track
from transformers import AutoModelForSequenceClassification, AutoTokenizer

BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
GLOSSES = Path(__file__).with_name("glosses.tsv.gz")
MAX_TOKENS = 32
# chosen so that all three arrive at the same accuracy in 500 steps; linear decay to zero
LEARNING_RATE = {("lora", 1): 3e-3, ("lora", 8): 2e-3, ("full", None): 1e-4}


def load_examples(path: Path = GLOSSES) -> dict[str, list[tuple[str, str]]]:
    """``{"train": [(category, gloss), ...], "test": [...]}``."""
    examples: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        split, category, gloss = line.split("\t")
        examples[split].append((category, gloss))
    return examples


def load_base(base: Path, categories: list[str]) -> torch.nn.Module:
    """MiniLM with a fresh classification head."""
    return AutoModelForSequenceClassification.from_pretrained(
        base,
        local_files_only=True,
        id2label=dict(enumerate(categories)),
        label2id={category: i for i, category in enumerate(categories)},
    )


def add_lora(model: torch.nn.Module, rank: int, alpha: float) -> torch.nn.Module:
    """A LoRA of one rank on every linear layer, the head trained in full."""
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=alpha, target_modules="all-linear"
    )
    model = get_peft_model(model, config)
    # PEFT has noted where the base lay on this disk; write its public name into the adapter instead
    config.base_model_name_or_path = BASE_NAME
    return model


def batches(examples, tokenizer, categories, size):
    """Tokenised batches with their labels, for ever, reshuffled at each pass."""
    while True:
        random.shuffle(examples)
        for start in range(0, len(examples) - size + 1, size):
            yield encode(examples[start : start + size], tokenizer, categories)


def encode(examples, tokenizer, categories):
    """Token tensors with ``labels``, padded to the longest of the batch."""
    tokens = tokenizer(
        [gloss for _, gloss in examples],
        padding=True,
        truncation=True,
        max_length=MAX_TOKENS,
        return_tensors="pt",
    )
    tokens["labels"] = torch.tensor([categories.index(category) for category, _ in examples])
    return tokens


def train(model, stream, *, steps: int, learning_rate: float) -> None:
    """AdamW with a linear decay to zero."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model.train()
    for _ in track(range(steps), description="training"):
        loss = model(**next(stream)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model, examples, tokenizer, categories, size: int = 64) -> float:
    """Share of the glosses filed under their own category."""
    model.eval()
    right = 0
    # sorted by length: batches without padding run about twice as fast
    examples = sorted(examples, key=lambda example: len(example[1]))
    for start in track(range(0, len(examples), size), description="testing"):
        batch = encode(examples[start : start + size], tokenizer, categories)
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(examples)


def main() -> None:
    """Train, test, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=["lora", "full"], required=True)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, help="default: twice the rank")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", type=int, help="number of test glosses; default: all 4,000")
    arguments = parser.parse_args()
    lora = arguments.method == "lora"
    rank = arguments.rank if lora else None
    alpha = (arguments.alpha or 2.0 * rank) if lora else None
    learning_rate = arguments.learning_rate or LEARNING_RATE.get((arguments.method, rank), 2e-3)

    random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    examples = load_examples()
    categories = sorted({category for category, _ in examples["train"]})
    tokenizer = AutoTokenizer.from_pretrained(arguments.base, local_files_only=True)
    model = load_base(arguments.base, categories)
    if lora:
        model = add_lora(model, rank, alpha)

    started = time.perf_counter()
    stream = batches(examples["train"], tokenizer, categories, arguments.batch)
    train(model, stream, steps=arguments.steps, learning_rate=learning_rate)
    report = {
        "method": arguments.method,
        "rank": rank,
        "alpha": alpha,
        "steps": arguments.steps,
        "batch": arguments.batch,
        "learning_rate": learning_rate,
        "seed": arguments.seed,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "accuracy": accuracy(model, examples["test"][: arguments.test], tokenizer, categories),
        "seconds": round(time.perf_counter() - started),
    }

    model.save_pretrained(arguments.out)
    (arguments.out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    (arguments.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
