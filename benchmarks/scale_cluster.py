"""A Ray cluster that is simulated: the scheduler is real, its nodes and their clock are not."""

from __future__ import annotations

import heapq
import time
import types
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bulkedge.comparison import Comparison


@dataclass(eq=False)
class Task:
    """A matrix in work."""

    comparison: Comparison
    retries: int
    attempts: int = 0
    finished: bool = False


class LostTask(Exception):
    """What Ray raises where a task was lost with its nodes too often."""


@dataclass
class Cluster:
    """In the place of the module ``ray``: nodes of one task each, on a clock of their own.

    The clock adds what the caller's code takes of a real processor between two calls.  What Ray
    itself takes is not in it.

    Attributes:
        nodes: How many.
        seconds: Of a matrix on an ordinary node.
        row: What a task returns.
        slow: How many times longer a node takes, by its number.
        losses: When nodes are lost, by their number, in seconds.
    """

    nodes: int
    seconds: Callable[[Comparison], float]
    row: dict[str, Any]
    slow: dict[int, float] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)

    exceptions = types.SimpleNamespace(RayError=LostTask)

    def __post_init__(self) -> None:
        self.now = self.ended = self.work = self.driver = 0.0
        self.tries_lost = 0
        self._events: list[tuple[float, int, int]] = [(t, n, -1) for n, t in self.losses.items()]
        heapq.heapify(self._events)
        self._free = deque(range(self.nodes))
        self._busy: dict[int, tuple[Task, int]] = {}
        self._lost: set[int] = set()
        self._waiting: deque[Task] = deque()
        self._done: list[Task] = []
        self._begun = 0
        self._left = time.process_time()

    # ---- what the engine calls

    def is_initialized(self) -> bool:
        """There is one."""
        return True

    def remote(self, *, max_retries: int, **_: Any) -> Callable[[Any], Any]:
        """What makes a function a task."""

        def begin(comparison: Comparison, *_: Any) -> Task:
            self._entered()
            self._waiting.append(task := Task(comparison, max_retries))
            self.work += self.seconds(comparison)
            self._run()
            return self._leave(task)

        return lambda _: types.SimpleNamespace(remote=begin)

    def wait(
        self, pending: Sequence[Task], num_returns: int, timeout: float | None = None
    ) -> tuple[list[Task], list[Task]]:
        """Those that are finished, after at least one is, unless it is for now alone."""
        self._entered()
        self._run()
        while timeout is None and len(self._done) < min(num_returns, len(pending)):
            self.now = max(self.now, self._events[0][0])
            self._run()
        found = self._done[:num_returns]
        if timeout is not None:
            self._done = self._done[num_returns:]
        return self._leave((found, []))

    def get(self, task: Task) -> tuple[str, dict[str, Any]]:
        """The row of a task."""
        if not task.finished:
            raise LostTask(f"its nodes were lost {task.attempts} times")
        return "", self.row

    def cancel(self, task: Task, *, force: bool) -> None:
        """Nothing is left to be ended."""

    # ---- time

    def _entered(self) -> None:
        spent = time.process_time() - self._left
        self.driver += spent
        self.now += spent

    def _leave(self, found: Any) -> Any:
        self._left = time.process_time()  # what the simulation takes is nobody's
        return found

    def _run(self) -> None:
        """All that has happened by now."""
        self._begin(self.now)
        while self._events and self._events[0][0] <= self.now:
            at, node, number = heapq.heappop(self._events)
            if number < 0:
                self._lose(node)
            elif node in self._busy and self._busy[node][1] == number:
                self._finish(node, at)
            self._begin(at)

    def _begin(self, at: float) -> None:
        """Give what waits to nodes that are free."""
        while self._waiting and self._free:
            if (node := self._free.popleft()) in self._lost:
                continue
            task, self._begun = self._waiting.popleft(), self._begun + 1
            task.attempts += 1
            self._busy[node] = (task, self._begun)
            end = at + self.seconds(task.comparison) * self.slow.get(node, 1.0)
            heapq.heappush(self._events, (end, node, self._begun))

    def _finish(self, node: int, at: float) -> None:
        task, _ = self._busy.pop(node)
        task.finished, self.ended = True, at
        self._done.append(task)
        self._free.append(node)

    def _lose(self, node: int) -> None:
        self._lost.add(node)
        if node not in self._busy:
            return
        task, _ = self._busy.pop(node)
        self.tries_lost += 1
        (self._done if task.attempts > task.retries else self._waiting).append(task)
