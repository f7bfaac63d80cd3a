"""Where rows are computed: in this process, or in several of this machine's."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

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
    # spawn: a forked child of a process that has used torch threads or CUDA may hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        min(jobs, len(comparisons)), mp_context=context, initializer=_settle_worker
    )
    # the largest first, so that no worker is left alone with it at the end
    order = sorted(range(len(comparisons)), key=lambda i: -comparisons[i].base.size)
    try:
        with _interrupts_held():  # submitting starts the workers
            futures = {pool.submit(audit_matrix, comparisons[i], recipe): i for i in order}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise BulkedgeError(
            f"a worker process died, most likely for want of memory; use fewer than {jobs} jobs"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back, here for a moment, in the processes begun meanwhile until they are settled.

    A signal mask is inherited; without it a worker interrupted while it imports prints a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _settle_worker() -> None:
    """One thread, since parallel work is the pool's; and Ctrl-C ends a worker without a word."""
    import torch

    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):  # what has come meanwhile ends this worker now
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
