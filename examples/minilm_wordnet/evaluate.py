"""Accuracy of an adapter on the 4,000 test glosses, loaded by stock PEFT.

    python examples/minilm_wordnet/evaluate.py BASE ADAPTER

Needs the extra ``[hf]``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peft import PeftModel
from train import accuracy, load_base, load_examples
from transformers import AutoTokenizer


def main() -> None:
    """Load, test, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    arguments = parser.parse_args()
    examples = load_examples()
    categories = sorted({category for category, _ in examples["train"]})
    tokenizer = AutoTokenizer.from_pretrained(arguments.base, local_files_only=True)
    model = PeftModel.from_pretrained(load_base(arguments.base, categories), arguments.adapter)
    print(accuracy(model, examples["test"], tokenizer, categories))


if __name__ == "__main__":
    main()
