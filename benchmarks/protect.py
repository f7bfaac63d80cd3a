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
from collections.abc import Callable, Mapping
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import protect_arms as arms
import protect_sides
import torch
from common import Cells
from protect_adapters import ADAPTERS, BUILD, Adapter, glosses, make_data, train
from protect_arms import Arm, Layer
from protect_model import Bench, Tuned
from protect_texts import KEPT, TEXTS, kept
from torch import Tensor
from transformers import logging as transformers_logging

import bulkedge

SHIPPED = [adapter for adapter in ADAPTERS if adapter.shipped]
TRAINED = [adapter for adapter in ADAPTERS if not adapter.shipped]
SCALES = (0.5, 0.3, 0.7, 0.4, 0.9, 0.2, 0.6, 0.8)
STRENGTHS = (1.0, 3.0, 0.3, 0.6)
SIDED = (1.0, 3.0, 0.3)
"""Strengths of two-sided arms."""
STRONGEST = 10.0
"""Tried on verbs, too, of which scaling by 0.5 already keeps nearly all that the base could do."""
SKETCHES = (8, 32, 128)
RIDGES = (1e-3, 0.3)
"""Tried beside the default."""
ROUNDS = 3
FULL = ("classes", "embedding")
"""The losses of which curvatures are taken: of the task, of what is kept."""
LOSSES = (("states", "states"), ("states", "embedding"))
"""Others that need no labels."""
GLOSSES = 600
"""Texts for C_t."""
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


def task_texts(part: str) -> list[str]:
    """Glosses that adapters of a part were trained on."""
    return [gloss for _, gloss in glosses(part)["train"][:GLOSSES]]


@cache
def moments(key: str, adapter: Adapter | None = None) -> bulkedge.Moments:
    """C_b on texts by their name, or C_t of an adapter; kept in build/."""
    path = BUILD / "moments" / f"{key.replace(' ', '-')}.moments"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if adapter is not None:
            tuned(adapter)
            texts = task_texts(adapter.part)
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


@lru_cache(1)
def sided(adapter: Adapter, losses: tuple[str, str]) -> dict[str, protect_sides.Sided]:
    """The layers of the encoder with curvatures of two losses: of task and base."""
    base, task = base_moments(adapter.part), moments(f"task of {adapter.name}", adapter)
    part, its = adapter.part, tuned(adapter)
    outputs = (
        protect_sides.curvatures(f"base {part}", part, None, kept(part), losses[1]),
        protect_sides.curvatures(adapter.name, part, its, task_texts(part), losses[0]),
    )
    inputs = {name: (base[name].moment, task[name].moment) for name in its.updates}
    return protect_sides.sided(inputs, outputs)


def both_sides(
    adapter: Adapter, strength: float, losses: tuple[str, str], **more: Any
) -> dict[str, Tensor]:
    """Two-sided on every layer of the encoder."""
    layers, updates = sided(adapter, losses), tuned(adapter).updates
    return {n: layers[n].solved(update, strength, **more).dense for n, update in updates.items()}


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
        **more: Any,
    ) -> None:  # fmt: skip
        """Measure one arm of one adapter."""

        def figures() -> dict[str, Any]:
            found = updates()
            head = found if isinstance(found, Tuned) else tuned(adapter)
            dense = found.dense if isinstance(found, Tuned) else found
            row = bench(adapter.part).row(dense, head)
            norm = sum(float(D.norm()) ** 2 for D in dense.values()) ** 0.5
            return {name: round(value, 5) for name, value in row.items()} | {
                "drift": round(drift(adapter, dense), 6), "norm": round(norm, 3)
            }  # fmt: skip

        self.cells.measure(
            {"adapter": adapter.name, "method": method, "setting": setting} | more, figures
        )

    def protect(self, adapter: Adapter, strength: float, texts: str = "") -> None:
        """One-sided at a strength, as it is by default."""
        found = partial(treated, adapter, arms.protected, strength, texts)
        more = {"texts": texts} if texts else {}
        self.add(adapter, "protect", strength, found, ridge=arms.RIDGE, balance="output", **more)

    def two_sided(
        self, adapter: Adapter, strength: float, losses: tuple[str, str] = FULL, **more: Any
    ) -> None:
        """Two-sided at a strength."""
        method = "two-sided" + ", A alone" * ("sweeps" in more)
        found = partial(both_sides, adapter, strength, losses, **more)
        self.add(adapter, method, strength, found, ridge=arms.RIDGE, losses=", ".join(losses))

    def base(self) -> None:
        """What the base does."""
        for part in ("noun", "verb"):
            of = {"adapter": f"none, {part}s", "method": "base", "setting": 0}
            self.cells.measure(of, lambda part=part: bench(part).row({}))

    def grid(self, adapters: list[Adapter]) -> None:
        """As trained, scaled, protected."""
        for adapter in self.chosen(adapters):
            self.add(adapter, "as trained", 1.0, lambda a=adapter: tuned(a).dense)
            strengths, scales = (4, 8) if adapter.shipped else (3, 3)
            strongest = [STRONGEST] if adapter.part == "verb" else []
            for strength in [*STRENGTHS[:strengths], *strongest]:
                self.protect(adapter, strength)
            if adapter.part == "noun" and adapter.rank < 64 and not adapter.seed:
                for strength in SIDED:
                    self.two_sided(adapter, strength)
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
        self.no_task()
        for name in TEXTS:
            if name != str(KEPT):
                self.protect(VARIED, 1.0, name)

    def no_task(self) -> None:
        """Every direction counts alike for the task."""
        for strength in (0.3, 0.1):
            found = partial(treated, VARIED, arms.without_task_moments, strength)
            self.add(VARIED, "protect without task moments", strength, found, ridge=arms.RIDGE)

    def sketches(self) -> None:
        """Moments that are not exact."""
        for rank in SKETCHES:
            found = partial(treated, VARIED, partial(arms.by_sketches, rank=rank), 1.0)
            method = f"protect by sketches of rank {rank}"
            self.add(VARIED, method, 1.0, found, ridge=arms.RIDGE)

    def ridges(self) -> None:
        """Other ridges, on the shipped adapters."""
        for adapter in self.chosen(SHIPPED[::-1]):
            for ridge in RIDGES:
                arm = partial(arms.protected, ridge=ridge)
                found = partial(treated, adapter, arm, 1.0)
                self.add(adapter, "another ridge", 1.0, found, ridge=ridge, balance="output")

    def sides(self) -> None:
        """Two-sided of other losses, and for A alone."""
        for losses in LOSSES:
            for strength in SIDED[:2]:
                self.two_sided(VARIED, strength, losses)
        for strength in SIDED[:2]:
            self.two_sided(VARIED, strength, sweeps=0)

    def rounds(self) -> None:
        """The task's inputs measured again on what the round before has made, through files."""
        for strength in STRENGTHS[:2]:
            found = partial(in_rounds, VARIED, strength)
            self.add(VARIED, f"protect, {ROUNDS} rounds", strength, found, ridge=arms.RIDGE)

    def files(self) -> None:
        """λ = 1 through files: new directions before and after, and the update that was written."""
        for adapter in self.chosen(SHIPPED):
            of = {"adapter": adapter.name, "method": "files", "setting": 1.0, "ridge": arms.RIDGE}
            self.cells.measure(of, partial(through_files, adapter))


def through_files(adapter: Adapter) -> dict[str, Any]:
    """What ``bulkedge.repair`` writes, against the arm that was measured."""
    import tempfile

    task = moments(f"task of {adapter.name}", adapter)
    method = bulkedge.Protect(moments(str(KEPT)), task, 1.0)
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


def in_rounds(adapter: Adapter, strength: float) -> dict[str, Tensor]:
    """What ``bulkedge.repair`` makes in rounds."""
    import tempfile

    def recollect(folder: Path) -> bulkedge.Moments:
        return bulkedge.collect_moments(arms.BASE, task_texts(adapter.part), tuned=folder)

    task = moments(f"task of {adapter.name}", adapter)
    method = bulkedge.Protect(
        base_moments(adapter.part), task, strength, rounds=ROUNDS, recollect=recollect
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        bulkedge.repair(arms.BASE, adapter.folder, out, method=method, only=["encoder.*"])
        return Tuned(out).dense


def main() -> None:
    """The plans by their names; all of them, the most wanted first."""
    every = ("base", "shipped", "trained", "texts", "sides", "ridges", "sketches", "others",
             "rounds", "files")  # fmt: skip
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
