"""This process, or several of this machine's."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from bulkedge._errors import BulkedgeError
from bulkedge._fields import check_fields, instance, optional, whole
from bulkedge._precision import one_thread
from bulkedge.auditing.known import KnownBases
from bulkedge.auditing.matrix import audit_matrix
from bulkedge.comparison.plan import Comparison
from bulkedge.records.recipe import Recipe
from bulkedge.records.rows import Matrix

from ._device import check_device
from ._order import largest_first

Audit = Callable[[Comparison, Recipe], Matrix]


@dataclass(frozen=True)
class LocalEngine:
    """Worker processes of this machine, each of one torch thread; one job computes in this process.

    With more than one, a script needs the usual ``if __name__ == "__main__":`` guard.

    Attributes:
        jobs: How many.
        known: Where what is computed of a base is kept, for several fine-tunes of it; each worker
            has its own in memory.

    Raises:
        InputError: If ``jobs`` < 1.
    """

    jobs: int = 1
    known: KnownBases | None = None

    def __post_init__(self) -> None:
        check_fields(self, jobs=whole(1), known=optional(instance(KnownBases, "what is known")))

    @property
    def name(self) -> str:
        """``local``."""
        return "local"

    def check(self, recipe: Recipe) -> None:
        """Raise unless torch can compute on the recipe's device."""
        check_device(recipe.device)

    @property
    def _audit(self) -> Audit:
        """What computes a row."""
        return audit_matrix if self.known is None else partial(audit_matrix, known=self.known)

    def rows(
        self, comparisons: Sequence[Comparison], recipe: Recipe
    ) -> Generator[tuple[int, Matrix]]:
        """Audit each matrix.

        Args:
            comparisons: What to audit.
            recipe: How.

        Yields:
            ``(position, row)`` as rows are finished.

        Raises:
            BulkedgeError: If a worker process died.
        """
        if self.jobs > 1 and comparisons:
            yield from _parallel(comparisons, recipe, self.jobs, self._audit)
            return
        for i, comparison in enumerate(comparisons):
            with one_thread():
                row = self._audit(comparison, recipe)
            yield i, row


@dataclass
class _Worker:
    """A process, this end of its pipe, and the position of the matrix that it has in hand."""

    process: BaseProcess
    pipe: Connection
    position: int = -1

    def give(self, position: int, comparison: Comparison) -> None:
        self.position = position
        with suppress(OSError):  # it has died: the end of its pipe will show it
            self.pipe.send(comparison)


def _parallel(
    comparisons: Sequence[Comparison], recipe: Recipe, jobs: int, audit: Audit
) -> Generator[tuple[int, Matrix]]:
    """One matrix at a time to each worker, the largest first; at the end, all are killed."""
    waiting = deque(largest_first(comparisons))
    workers: list[_Worker] = []
    try:
        _start(workers, min(jobs, len(comparisons)), recipe, audit)
        busy = {worker.pipe: worker for worker in workers}
        for worker in workers:
            worker.give(i := waiting.popleft(), comparisons[i])
        while busy:
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # pyright: ignore[reportArgumentType]
                yield worker.position, _receive(worker, comparisons[worker.position], jobs)
                if waiting:
                    worker.give(i := waiting.popleft(), comparisons[i])
                else:
                    del busy[worker.pipe]
    finally:
        _end(workers)


def _start(workers: list[_Worker], count: int, recipe: Recipe, audit: Audit) -> None:
    """Begin the processes; those begun are in the list even where one cannot be."""
    # spawn: a forked child of a process that has used torch threads or CUDA may hang
    context = multiprocessing.get_context("spawn")
    if os.name == "posix":  # its start would let Ctrl-C through again
        resource_tracker.ensure_running()
    with _interrupts_held():
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, recipe, audit), daemon=True)
            process.start()
            there.close()  # so that the pipe ends with the process
            workers.append(_Worker(process, here))


def _end(workers: Sequence[_Worker]) -> None:
    """Kill what is still at work: nothing of it is wanted any more."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join()
        worker.pipe.close()


def _receive(worker: _Worker, comparison: Comparison, jobs: int) -> Matrix:
    """The row that a worker has finished; raise where it could not."""
    try:
        row, problem, trace = worker.pipe.recv()
    except (EOFError, OSError):
        raise _death(worker.process, comparison, jobs) from None
    if row is None:
        raise RuntimeError(f"{problem} (tensor {comparison.base.name!r})") from _Remote(trace)
    return row


def _death(process: BaseProcess, comparison: Comparison, jobs: int) -> BaseException:
    """What to say of a worker that is no more."""
    process.join()
    code = process.exitcode or 0
    if code == -signal.SIGINT:
        return KeyboardInterrupt()
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    why = f"most likely for lack of memory; use fewer than {jobs} jobs"
    if code == 1:  # Python's own, of an error before the first matrix
        why = 'its error is above; does the script lack `if __name__ == "__main__":`?'
    return BulkedgeError(f"a worker process died ({how}) on tensor {comparison.base.name!r}, {why}")


class _Remote(Exception):
    """The traceback of a worker, shown as the cause."""


# ---- in the worker


def _work(pipe: Connection, recipe: Recipe, audit: Audit) -> None:
    """Audit what comes through the pipe until it ends."""
    _settle_worker()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):
        while True:
            pipe.send(_answer(pipe.recv(), recipe, audit))


def _answer(comparison: Comparison, recipe: Recipe, audit: Audit) -> tuple[Matrix | None, str, str]:
    """A row, or what went wrong and where."""
    try:
        with one_thread():  # the environment may ask a new process for less precision, too
            return audit(comparison, recipe), "", ""
    except Exception as error:  # whatever it is, the parent reports it
        return None, f"{type(error).__name__}: {error}", traceback.format_exc()


def _end_with_parent() -> None:
    """End this process when the one that began it is gone, killed or not."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


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
