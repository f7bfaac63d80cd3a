"""The figures of a monitor in a file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from bulkedge._errors import InputError, OutputError
from bulkedge.tune._full import FullMatrix
from bulkedge.tune._relative import RelativeLora
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


def require_its_base(monitor: Monitor) -> None:
    """See that no base was copied from the weights of a run that is resumed.

    Args:
        monitor: With the figures of that run.

    Raises:
        InputError: If one was.
    """
    with torch.no_grad():
        for matrix in monitor.matrices:
            if isinstance(matrix, RelativeLora):
                raise InputError(
                    f"{matrix.name}: the factors with which it began are not in the checkpoint, "
                    "and so its base is not known; resume without the monitor, and audit the result"
                )
            known = monitor.figures.get(matrix.name)
            if known is None or not known.strongest or not isinstance(matrix, FullMatrix):
                continue
            if float(matrix.strengths[0]) == 0:
                raise InputError(
                    f"{matrix.name}: expected what it was before training, got what it is in the "
                    "checkpoint; give watch=lambda model: full_matrices(model, base=...)"
                )
            return
