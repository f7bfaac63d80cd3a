"""The jobs of the study in their order: what is trained, evaluated and treated in one process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from abilities import Evaluator
from interventions import Treated
from learner import Learner, base_moments, load_encoder, moments_of
from material import settings, task
from store import Store
from weights import base_layers, statistics


@dataclass(frozen=True)
class Job:
    """One method with one seed on some tasks, one after the other.

    Attributes:
        method: As in the configuration.
        seed: Of everything that is drawn.
        tasks: Their letters in order.
        treated: Whether interventions follow the first task.
    """

    method: str
    seed: int
    tasks: str
    treated: bool

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.method}/{self.tasks}/{self.seed}"

    @property
    def cells(self) -> list[str]:
        """The names of its trained cells."""
        return [f"{self.method}/{self.tasks[: i + 1]}/{self.seed}" for i in range(len(self.tasks))]


def jobs() -> list[Job]:
    """All of them, so that what is done first is balanced."""
    s = settings()

    def on_A(seed: int, treated: list[str]) -> list[Job]:
        return [
            Job(m, seed, "ABC" if m in s["sequences"] else "A", m in treated) for m in s["methods"]
        ]

    every = [
        *on_A(0, list(s["methods"])),
        *on_A(1, s["core"]),
        *(Job(m, 0, "B", True) for m in s["alone"]),
        *on_A(2, s["core"]),
        *(Job(m, 1, "B", True) for m in s["alone"]),
    ]
    return [job for job in every if job.seed < s["seeds"]]


class Bench:
    """What all jobs of a process share: the model for evaluation, and what is known of the base."""

    @cached_property
    def evaluator(self) -> Evaluator:
        """The model into which updates are put."""
        return Evaluator()

    @cached_property
    def layers(self) -> dict[str, Any]:
        """The base's matrices with the moments of the kept texts."""
        return base_layers(self.evaluator.base, base_moments(load_encoder()))

    def base(self, store: Store) -> None:
        """Store the abilities of the base."""
        if not store.lines("base"):
            self.evaluator.put({})
            rows = {name: self.evaluator.row({}, few=few)
                    for name, few in (("whole", False), ("few", True))}  # fmt: skip
            store.append("base", rows)

    def figures(self, learner: Learner) -> dict[str, Any]:
        """Abilities, tasks and weights of a cell."""
        updates = learner.updates
        self.evaluator.put(updates)
        return {
            "figures": self.evaluator.row(learner.heads),
            "weights": statistics(self.layers, updates),
        }


def rates(store: Store) -> dict[str, float]:
    """The learning rate of each method: of those that were tried, the best on validation texts.

    Raises:
        SystemExit: If a method was not tuned.
    """
    tried = store.lines("tuning")
    found: dict[str, float] = {}
    for method, its in settings()["methods"].items():
        mine = [row for row in tried if row["method"] == its.get("like", method)]
        if not mine:
            raise SystemExit(f"no tuning of {method}; run with --tune first")
        best = min(mine, key=lambda row: (-row["accuracy"], row["rate"]))
        found[method] = best["rate"] * its.get("times", 1)
    return found


def tune(store: Store, method: str, rate: float) -> None:
    """Try a rate, and store the accuracy on validation texts."""
    started, s = time.process_time(), settings()["tuning"]
    learner = Learner(method, s["seed"])
    learner.learn("A", rate, s["steps"])
    from learner import Run  # the accuracy of a model that is trained no more

    run = object.__new__(Run)
    run.model, run.head, run.task = learner.encoder, learner.heads["A"], task("A")
    found = run.accuracy(task("A").validation)
    store.append("tuning", {
        "method": method, "rate": rate, "accuracy": found, "steps": s["steps"], "seed": s["seed"],
        "seconds": round(time.process_time() - started, 1),
    })  # fmt: skip


def cells(job: Job, bench: Bench, store: Store) -> Iterator[tuple[str, Learner, dict[str, Any]]]:
    """Train a job task by task: the name of each cell, its model and its line."""
    learner, rate = Learner(job.method, job.seed), rates(store)[job.method]
    for name, letter in zip(job.cells, job.tasks, strict=True):
        started = time.process_time()
        told = learner.learn(letter, rate, settings()["steps"][letter])
        line = {
            "cell": name, "method": job.method, "seed": job.seed, "tasks": name.split("/")[1],
            "rate": rate, **told, **bench.figures(learner),
            "seconds": round(time.process_time() - started, 1),
        }  # fmt: skip
        yield name, learner, line


def done(job: Job, store: Store) -> bool:
    """Whether all of a job is stored: its cells, and that its interventions are complete."""
    known = {line["cell"] for line in store.lines("cells")}
    finished = {line["cell"] for line in store.lines("finished")}
    return set(job.cells) <= known and (not job.treated or job.cells[0] in finished)


def work(job: Job, bench: Bench, store: Store, stop: float) -> None:
    """Do what is missing of a job, until the time is over."""
    known = {line["cell"] for line in store.lines("cells")}
    for i, (name, learner, line) in enumerate(cells(job, bench, store)):
        if name not in known:
            store.append("cells", line)
        print(f"{name}: {line['figures']} {line['weights']} {line['seconds']} s", flush=True)
        if i == 0 and job.treated:
            treat(name, learner, bench, store, stop)
        if time.time() > stop:
            return


def treat(name: str, learner: Learner, bench: Bench, store: Store, stop: float) -> None:
    """All interventions on a cell that are not stored yet."""
    of = [line for line in store.lines("interventions") if line["cell"] == name]
    known = {(line["what"], line["setting"]) for line in of}
    letter = name.split("/")[1]
    texts = [gloss for _, gloss in task(letter).train[: settings()["task_moment_texts"]]]
    moments = moments_of(learner.encoder, texts)
    low = learner.method != "full"
    treated = Treated(bench.layers, learner.updates, moments, low=low)
    for what, setting, compute in treated.all():
        if (what, setting) in known:
            continue
        if time.time() > stop:
            return
        started = time.process_time()
        updates = compute()
        bench.evaluator.put(updates)
        store.append("interventions", {
            "cell": name, "method": learner.method, "seed": learner.seed, "tasks": letter,
            "what": what, "setting": setting,
            "figures": bench.evaluator.row(learner.heads, few=True),
            "weights": statistics(bench.layers, updates),
            "seconds": round(time.process_time() - started, 1),
        })  # fmt: skip
    store.append("finished", {"cell": name, "new": treated.count})
