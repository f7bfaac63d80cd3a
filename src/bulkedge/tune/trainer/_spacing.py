"""How far apart the checks of a run are, so that it does not wait for them."""

from __future__ import annotations

import math
import time
import warnings

from bulkedge.tune.monitor import Monitor

from ._limits import of_process_0

SHARE = 0.05
"""The largest part of the time that checks take, which no one has asked for at their steps."""
FREE = 2.0
"""So many seconds of checks are no burden in the shortest run."""


class Spacing:
    """The steps between checks: as many as were planned, or more where checks take long.

    Args:
        monitor: What checks; as it is when its run begins.
        step: The number of steps before.
        together: Whether all processes check, at the same steps.
    """

    def __init__(self, monitor: Monitor, step: int, *, together: bool = False) -> None:
        self._monitor, self._planned = monitor, monitor.every
        self._together = together
        self._begun = time.perf_counter(), monitor.seconds, step

    def widen(self, step: int) -> int:
        """Set how many steps lie between checks from now on, and say so the first time.

        Args:
            step: The number of steps so far.

        Returns:
            The number: a multiple of what was planned, never less than before.
        """
        monitor, every = self._monitor, self._every(step)
        if self._together:
            every = int(of_process_0({"every": every})["every"])
        if monitor.every == self._planned < every:
            warnings.warn(self._why(every), stacklevel=4)
        monitor.every = every
        return every

    def _every(self, step: int) -> int:
        """As many steps as make checks a small share of the time."""
        monitor, (start, seconds, first) = self._monitor, self._begun
        if monitor.seconds + monitor.check_seconds <= FREE:
            return monitor.every
        trained = time.perf_counter() - start - (monitor.seconds - seconds)
        steps = monitor.check_seconds * (step - first) / (SHARE * max(trained, 1e-9))
        return max(monitor.every, self._planned * math.ceil(steps / self._planned))

    def _why(self, every: int) -> str:
        """What to know of checks that are further apart than was planned."""
        monitor = self._monitor
        return (
            f"IntruderMonitor: checking {monitor.per_call} of {len(monitor.matrices)} layers takes "
            f"about {monitor.check_seconds:.1f} s, so it does so every {every} steps, not every "
            f"{self._planned}: {SHARE:.0%} of the time at most; before a checkpoint and at the "
            "end all layers are still checked; every= sets the steps"
        )
