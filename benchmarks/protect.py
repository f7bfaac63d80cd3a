"""Protecting a fine-tune against scaling it, and against everything else that needs no training.

python benchmarks/protect.py [--wordnet FOLDER] [--adapter NAME] [PLAN ...]

MiniLM with LoRAs on categories of WordNet's glosses: the two of examples/minilm_wordnet and those
that ``protect_adapters.py`` trains.  *Task* is their accuracy on test glosses.  What the base could
do and no fine-tune was trained for is finding example sentences by definitions of other parts of
speech, and the likenesses between these definitions.  Moments are taken on other such pairs (base)
and on training glosses (task).  In every arm the pooler is as trained: it is not pretrained, and no
figure of what is kept depends on it.  Each cell is stored once it is measured; a run goes on where
the last was ended.
"""

from __future__ import annotations

import argparse
import inspect
import random
import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import protect_arms as arms
import torch
from common import Cells
from protect_adapters import ADAPTERS, BUILD, Adapter, glosses, make_data, train
from protect_arms import Arm, Layer
from protect_model import Bench, Tuned, load_pairs
from torch import Tensor
from transformers import logging as transformers_logging

import bulkedge

SHIPPED = [adapter for adapter in ADAPTERS if adapter.shipped]
TRAINED = [adapter for adapter in ADAPTERS if not adapter.shipped]
SCALES = (0.5, 0.3, 0.7, 0.4, 0.9, 0.2, 0.6, 0.8)
STRENGTHS = (1.0, 3.0, 0.3, 0.1)
STRONGEST = 10.0
"""Tried on verbs, too, of which scaling by 0.5 already keeps nearly all that the base could do."""
SKETCHES = (8, 32, 128)
OF_SEEDS = [a for a in TRAINED if a.seed or (a.part, a.rank) == ("verb", 2)]
KEPT, GLOSSES = 800, 600
"""Texts for C_b, and for C_t."""
OTHERS: tuple[tuple[str, Arm, tuple[float, ...]], ...] = (
    ("budget", arms.budget, (0.4,)),
    ("cut at the edge", arms.cut, (0.4,)),
    ("off the base's leading vectors", arms.off_leading, (32, 128)),
    ("on the null space of C_b", arms.on_null_space, (16, 64)),
    ("largest entries", arms.trimmed, (0.1,)),
    ("random entries", arms.dropped, (0.9,)),
)
REPAIRS: dict[str, object] = {
    "scale": bulkedge.Scale(), "project": bulkedge.Project(), "shrink": bulkedge.Shrink(),
}  # fmt: skip
VARIED = next(adapter for adapter in SHIPPED if adapter.rank == 8)
"""The adapter for which texts are varied."""


@cache
def bench(part: str) -> Bench:
    """One for each task."""
    return Bench(part)


@cache
def tuned(adapter: Adapter) -> Tuned:
    """An adapter, trained now if it is not there."""
    if not (adapter.folder / "training.json").exists():
        train(adapter)
    return Tuned(adapter.folder)


def kept(part: str, count: int = KEPT) -> list[str]:
    """Texts of the kind to be kept; none of them is in a test."""
    texts = [text for pair in load_pairs(part)["texts"] for text in pair]
    if len(texts) < count:
        raise SystemExit(f"expected {count} texts, got {len(texts)}; draw more from WordNet")
    return texts[:count]


def docstrings(count: int = KEPT) -> list[str]:
    """First lines of Python's own documentation."""
    import argparse
    import asyncio
    import collections
    import email
    import http
    import json
    import logging
    import os
    import statistics
    import subprocess
    import tarfile
    import unittest
    import zipfile

    modules = (argparse, asyncio, collections, email, http, json, logging, os, statistics,
               subprocess, tarfile, unittest, zipfile, random, inspect, re)  # fmt: skip
    found: set[str] = set()
    for module in modules:
        for thing in vars(module).values():
            for each in (thing, *(vars(thing).values() if inspect.isclass(thing) else ())):
                known = getattr(each, "__doc__", None)
                text = known.strip().split("\n")[0] if isinstance(known, str) else ""
                if text.count(" ") > 2:
                    found.add(text)
    return random.Random(0).sample(sorted(found), min(count, len(found)))


def shuffled() -> list[str]:
    """The words of the texts to be kept, in any order over all of them."""
    texts = kept("noun")
    words = [word for text in texts for word in text.split()]
    random.Random(0).shuffle(words)
    left = iter(words)
    return [" ".join(next(left) for _ in text.split()) for text in texts]


TEXTS: dict[str, Callable[[], list[str]]] = {
    **{str(count): partial(kept, "noun", count) for count in (200, 800)},
    "sentences with nouns": lambda: [sentence for _, sentence in load_pairs("verb")["texts"]][:800],
    "shuffled words": shuffled,
    "Python's docstrings": docstrings,
    **{str(count): partial(kept, "noun", count) for count in (50, 3_000, 400)},
}
"""Texts for C_b of the adapters of nouns."""


@cache
def moments(key: str, adapter: Adapter | None = None) -> bulkedge.Moments:
    """C_b on texts by their name, or C_t of an adapter; kept in build/."""
    path = BUILD / "moments" / f"{key.replace(' ', '-')}.moments"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if adapter is not None:
            tuned(adapter)
            texts = [gloss for _, gloss in glosses(adapter.part)["train"][:GLOSSES]]
        else:
            texts = kept("verb") if key == "verb" else TEXTS[key]()
        folder = None if adapter is None else adapter.folder
        bulkedge.collect_moments(arms.BASE, texts, tuned=folder).save(path)
    return bulkedge.Moments.load(path)


def treated(adapter: Adapter, arm: Arm, setting: float, texts: str = "") -> dict[str, Tensor]:
    """An arm on every layer of the encoder."""
    base = moments(texts) if texts else base_moments(adapter.part)
    task = moments(f"task of {adapter.name}", adapter)
    updates, weights = tuned(adapter).updates, bench(adapter.part).base
    return {
        name: arm(Layer(name, weights[name], update, base[name].moment, task[name].moment), setting)
        for name, update in updates.items()
    }


def drift(adapter: Adapter, updates: Mapping[str, Tensor]) -> float:
    """Mean over the layers of ``tr(D C_b Dᵀ)/tr(W0 C_b W0ᵀ)``."""
    base, there = base_moments(adapter.part), outputs(adapter.part)
    found = [_moved(D, base[name].moment) / there[name] for name, D in updates.items()]
    return sum(found) / len(found)


def base_moments(part: str) -> bulkedge.Moments:
    """C_b on the texts that are kept from adapters of a part of speech."""
    return moments("verb" if part == "verb" else str(KEPT))


@cache
def outputs(part: str) -> dict[str, float]:
    """``tr(W0 C_b W0ᵀ)`` of each layer."""
    base = base_moments(part)
    return {
        name: _moved(W0, base[name].moment)
        for name, W0 in bench(part).base.items()
        if name in base.layers
    }


def _moved(W: Tensor, C: Tensor) -> float:
    return float((W.float() @ C.float() * W.float()).sum())


class Plans:
    """The cells, in the order of what they are for."""

    def __init__(self, only: list[str]) -> None:
        self.cells, self.only = Cells("protect"), only

    def chosen(self, adapters: list[Adapter]) -> list[Adapter]:
        """Those that were asked for."""
        return [adapter for adapter in adapters if not self.only or adapter.name in self.only]

    def add(
        self, adapter: Adapter, method: str, setting: float | str, updates: Callable[[], Any],
        texts: str = "",
    ) -> None:  # fmt: skip
        """Measure one arm of one adapter."""

        def figures() -> dict[str, Any]:
            found = updates()
            head = found if isinstance(found, Tuned) else tuned(adapter)
            dense = found.dense if isinstance(found, Tuned) else found
            row = bench(adapter.part).row(dense, head)
            return {name: round(value, 5) for name, value in row.items()} | {
                "drift": round(drift(adapter, dense), 6)
            }

        of = {"adapter": adapter.name, "method": method, "setting": setting}
        self.cells.measure(of | ({"texts": texts} if texts else {}), figures)

    def base(self) -> None:
        """What the base does."""
        for part in ("noun", "verb"):
            of = {"adapter": f"none, {part}s", "method": "base", "setting": 0}
            self.cells.measure(of, lambda part=part: bench(part).row({}))

    def grid(self, adapters: list[Adapter]) -> None:
        """As trained, scaled, protected."""
        for adapter in self.chosen(adapters):
            self.add(adapter, "as trained", 1.0, lambda a=adapter: tuned(a).dense)
            strengths, scales = (
                (4, 8) if adapter.shipped else (3, 3) if adapter.seed == 0 else (2, 2)
            )
            strongest = [STRONGEST] if adapter.part == "verb" else []
            for strength in [*STRENGTHS[:strengths], *strongest]:
                found = partial(treated, adapter, arms.protected, strength)
                self.add(adapter, "protect", strength, found)
            for scale in SCALES[:scales]:
                self.add(adapter, "scaled", scale, partial(treated, adapter, arms.scaled, scale))

    def shipped(self) -> None:
        """The grid of the shipped adapters."""
        self.grid(SHIPPED)

    def trained(self) -> None:
        """That of the others."""
        self.grid(TRAINED)

    def others(self) -> None:
        """Other methods, on the shipped adapters."""
        for adapter in self.chosen(SHIPPED[::-1]):
            for name, arm, settings in OTHERS:
                if adapter.rank == 1 and arm is arms.cut:
                    continue  # the budget, at rank 1
                for setting in settings:
                    self.add(adapter, name, setting, partial(treated, adapter, arm, setting))
            for name, method in REPAIRS.items():
                self.add(adapter, f"repair: {name}", "", partial(arms.repaired, adapter, method))
            known = bench(adapter.part)
            found = partial(arms.by_peft, adapter, known, 0.0)
            self.add(adapter, "PEFT's reduce_intruder_dimension", 0.0, found)
            found = partial(arms.replayed, adapter, known, kept(adapter.part), 10.0)
            self.add(adapter, "a tenth of the training with replay", 10.0, found)

    def texts(self) -> None:
        """Other texts, more or fewer of them, and no task moments."""
        for name in TEXTS:
            if name != str(KEPT):
                found = partial(treated, VARIED, arms.protected, 1.0, name)
                self.add(VARIED, "protect", 1.0, found, name)
        self.no_task()

    def no_task(self) -> None:
        """Every direction counts alike for the task."""
        for strength in (0.1, 0.3):
            found = partial(treated, VARIED, arms.without_task_moments, strength)
            self.add(VARIED, "protect without task moments", strength, found)

    def sketches(self) -> None:
        """Moments that are not exact."""
        for rank in SKETCHES:
            found = partial(treated, VARIED, partial(arms.by_sketches, rank=rank), 1.0)
            self.add(VARIED, f"protect by sketches of rank {rank}", 1.0, found)

    def files(self) -> None:
        """λ = 1 through files: new directions before and after, and the update that was written."""
        for adapter in self.chosen(SHIPPED):
            of = {"adapter": adapter.name, "method": "files", "setting": 1.0}
            self.cells.measure(of, partial(through_files, adapter))


def through_files(adapter: Adapter) -> dict[str, Any]:
    """What ``bulkedge.repair`` writes, against the arm that was measured."""
    import tempfile

    task = moments(f"task of {adapter.name}", adapter)
    method = bulkedge.Protect(moments(str(KEPT)), task, 1.0, balance="layer")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        record = bulkedge.repair(arms.BASE, adapter.folder, out, method=method, only=["encoder.*"])
        written = Tuned(out).dense
    meant = treated(adapter, arms.protected, 1.0)
    counts = [
        sum(row.new_directions for row in audit.matrices if row.name.startswith("encoder."))
        for audit in (record.before, record.after)
        if audit is not None
    ]
    error = max(float((written[n] - D).norm() / D.norm()) for n, D in meant.items())
    return {"intruders_before": counts[0], "intruders_after": counts[1], "error": error}


def main() -> None:
    """The plans by their names; all of them, the most wanted first."""
    every = ("base", "shipped", "trained", "others", "texts", "sketches", "files")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument(
        "--adapter", action="append", default=[], help='like "nouns, r = 8, seed 0"'
    )
    parser.add_argument("plans", nargs="*", default=every)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    make_data(arguments.wordnet)
    plans = Plans(arguments.adapter)
    for name in arguments.plans:
        getattr(plans, name)()


if __name__ == "__main__":
    main()
