"""Where rows are computed: in this process, or in several of this machine's."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from bulkedge._errors import BulkedgeError

from .plan import Comparison
from .recipe import Recipe
from .record import Matrix
from .run import audit_matrix


def compute_rows(
    comparisons: Sequence[Comparison], recipe: Recipe, jobs: int
) -> Iterator[tuple[int, Matrix]]:
    """Audit each matrix; what travels to a worker are paths and names, never tensors.

    Args:
        comparisons: What to audit.
        recipe: How.
        jobs: Worker processes, each with one torch thread; 1 computes in this process.

    Yields:
        ``(position, row)`` as rows are finished.

    Raises:
        BulkedgeError: If a worker process died.
    """
    if jobs == 1:
        for i, comparison in enumerate(comparisons):
            yield i, audit_matrix(comparison, recipe)
        return
    # the largest first, so that no worker is left alone with it at the end
    order = sorted(range(len(comparisons)), key=lambda i: -comparisons[i].base.size)
    # spawn: a forked child of a process that has used torch threads or CUDA may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(jobs, len(comparisons)), mp_context=context, initializer=_one_thread
    ) as pool:
        try:
            jobs_and_rows = pool.map(_positioned, [(i, comparisons[i], recipe) for i in order])
            yield from jobs_and_rows
        except BrokenProcessPool:
            raise BulkedgeError(
                f"a worker process died, most likely for want of memory; use fewer than {jobs} jobs"
            ) from None


def _one_thread() -> None:
    """Two threads on a busy machine are slower than one; parallel work is the pool's."""
    import torch

    torch.set_num_threads(1)


def _positioned(task: tuple[int, Comparison, Recipe]) -> tuple[int, Matrix]:
    """A row with the position that it belongs to."""
    i, comparison, recipe = task
    return i, audit_matrix(comparison, recipe)
