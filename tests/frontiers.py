"""Frontiers that are only written down, for tests of what is shown of them."""

from bulkedge import FrontierRecord
from bulkedge.records import Run, Tool
from bulkedge.records.frontier import (
    Axes,
    Evaluation,
    FrontierSettings,
    Measured,
    dominated,
    gains,
)
from bulkedge.records.source import Source

POINTS = (
    ("as-trained", "trained", None, 0.9, 0.1),
    ("scaled-0.5", "scaled", 0.5, 0.7, 0.3),
    ("scaled-0.25", "scaled", 0.25, 0.5, 0.2),
    ("protected-1", "protected", 1.0, 0.85, 0.2),
    ("protected-4", "protected", 4.0, 0.6, 0.4),
)


def made(points=POINTS, names=("task", "kept"), name="adapter", lower=(), refused=()):
    """A record of some points ``(name, arm, strength, task, kept)``."""
    source = Source(path=f"/models/{name}", kind="lora", files=[], trained_on=None)
    rows = [
        Measured(
            name=point, arm=arm, strength=strength, command=f"make {name}" if strength else None,
            evaluated=f"evaluate {name}", values=dict(zip(names, numbers, strict=True)), seconds=1,
            refused=list(refused) if arm == "protected" else [], drift=None,
        )
        for point, arm, strength, *numbers in points
    ]  # fmt: skip
    axes = Axes(task=names[0], keep=names[1], lower=lower)
    scales, strengths = (
        tuple(row.strength for row in rows if row.arm == arm) for arm in ("scaled", "protected")
    )
    return FrontierRecord(
        tool=Tool(version="0", torch="0"), base=source, tuned=source, moments=source,
        task_moments=None,
        settings=FrontierSettings(scales=scales, strengths=strengths, balance="output",
                                  with_base=False, partial=False),
        evaluation=Evaluation(by="command", text="evaluate {model}", files=[]),
        axes=axes, points=rows, dominated=dominated(rows, axes), gains=gains(rows, axes),
        run=Run(started="2026-01-01T00:00:00+00:00", seconds=1, engine="local", jobs=1),
    )  # fmt: skip
