"""The learning rates of a run, those to come included."""

from __future__ import annotations

from typing import Any


def rates_of(scheduler: Any, steps: int) -> list[float]:
    """The learning rate of each step, by the schedule of a trainer.

    Args:
        scheduler: One of torch, or what Accelerate wraps around one.
        steps: How many steps the run has.

    Returns:
        Of the first group of parameters; nothing if the schedule is no function of the step.
    """
    inner = getattr(scheduler, "scheduler", scheduler)
    functions, bases = getattr(inner, "lr_lambdas", None), getattr(inner, "base_lrs", None)
    if not functions or not bases or steps < 1:
        return []
    return [bases[0] * float(functions[0](step)) for step in range(steps)]
