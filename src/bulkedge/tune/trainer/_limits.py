"""Numbers of intruders at which a run stops or saves, and whether a run will see them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import distributed

from bulkedge.tune.monitor import Monitor

SO_FAR = "intruders so far"
"""How many there are in the layers of the last round; not logged."""


def of_process_0(figures: dict[str, float]) -> dict[str, float]:
    """The figures of process 0, in all processes.

    Args:
        figures: Of this process.

    Returns:
        Those of process 0.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return figures
    known = [figures]
    distributed.broadcast_object_list(known, src=0)
    return known[0]


def reached(limit: float | None, figures: Mapping[str, float], *, so_far: bool = False) -> bool:
    """Whether there are so many intruders, in all layers together or per layer.

    Args:
        limit: A whole number is one in all, a fraction one per layer; None is never reached.
        figures: Of a monitor, and :data:`SO_FAR`.
        so_far: Whether those in the layers of the last round are enough, if some are missing.

    Returns:
        Whether it is.
    """
    if limit is None:
        return False
    per_layer = isinstance(limit, float) and not limit.is_integer()
    total = SO_FAR if so_far else "bulkedge/intruders"
    return figures.get("bulkedge/intruders_per_layer" if per_layer else total, 0) >= limit


def slow(monitor: Monitor, max_steps: int, *, limited: bool) -> str | None:
    """What to know of a run that ends before every layer had its turn.

    Args:
        monitor: What watches it.
        max_steps: How many steps are planned; 0 if that is not known.
        limited: Whether it stops or saves at a number.

    Returns:
        A warning; None if there is nothing to say.
    """
    if not 0 < max_steps < monitor.round:
        return None
    layers = len(monitor.matrices)
    if monitor.per_call == layers and not limited:  # nothing is logged of a part of them
        return None
    return (
        f"IntruderMonitor checks {monitor.per_call} of {layers} layers every {monitor.every} "
        f"steps, so each had its turn after {monitor.round} steps, but this run has {max_steps}: "
        "its counts come late or not at all; leave out every= and per_call=, or give smaller "
        "every= and larger per_call="
    )
