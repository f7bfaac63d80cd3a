"""The figures of a monitor in a file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from bulkedge._errors import OutputError
from bulkedge.tune.monitor import Monitor


def write_figures(path: Path, monitor: Monitor) -> None:
    """Write the figures of a monitor as JSON; the file is replaced at once, or left as it is.

    Args:
        path: The file.
        monitor: The monitor.

    Raises:
        OutputError: If it cannot be written.
    """
    figures = {
        "steps": monitor.steps,
        "top_k": monitor.top_k,
        "epsilon": monitor.epsilon,
        "metrics": monitor.metrics(),
        "worst_layer": monitor.worst_layer,
        "layers": {
            name: asdict(layer) | {"threshold": monitor.thresholds.get(name)}
            for name, layer in monitor.figures.items()
        },
    }
    building = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        building.write_text(json.dumps(figures, indent=1) + "\n")
        building.replace(path)
    except OSError as error:
        building.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None
