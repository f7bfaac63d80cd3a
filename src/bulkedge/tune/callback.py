"""The monitor in a ``Trainer`` of transformers."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bulkedge._errors import InputError, MissingExtraError

from .monitor import Model, Monitor

try:
    from transformers.trainer_callback import (
        ExportableState,
        TrainerCallback,
        TrainerControl,
        TrainerState,
    )
    from transformers.training_args import TrainingArguments
except ImportError as error:
    raise MissingExtraError(
        "bulkedge.tune.callback needs transformers: pip install 'bulkedge[hf]'"
    ) from error

FILE = "bulkedge.json"


class IntruderMonitor(TrainerCallback, ExportableState):
    """Log ``bulkedge/intruders`` and its like to whatever ``report_to`` names, while it trains.

    The figures are those of :class:`bulkedge.tune.Monitor`.  They are written into every checkpoint
    as ``bulkedge.json``, layer by layer, and resumed from ``trainer_state.json``.  Callbacks know
    nothing of their trainer, so that logging takes :meth:`bind`; without it the figures are in
    ``history`` alone.

    Under DDP process 0 looks, the factors are the same in all; where parameters are spread over
    processes (FSDP2) all of them look, and process 0 logs.

    Args:
        every: Steps between looks.
        per_call: Layers a look.
        stop_at: Stop training when so many intruders are known.
        save_at: Save a checkpoint when so many are known for the first time.
        watch: What to watch instead of the model's LoRA layers: for a full fine-tune, what
            :func:`bulkedge.tune.full_matrices` makes of it.
        options: Of :class:`bulkedge.tune.Monitor`.

    Attributes:
        monitor: The monitor, once training has begun.
        history: ``(step, figures)`` of every look.

    Example:
        >>> monitor = IntruderMonitor(every=100, stop_at=20)
        >>> trainer = Trainer(model, args, callbacks=[monitor])  # doctest: +SKIP
        >>> monitor.bind(trainer)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        every: int = 50,
        per_call: int = 2,
        stop_at: int | None = None,
        save_at: int | None = None,
        watch: Sequence[Any] | None = None,
        **options: Any,
    ) -> None:
        for name, value in (("stop_at", stop_at), ("save_at", save_at)):
            if value is not None and value < 1:
                raise InputError(f"expected {name} ≥ 1 or None, got {value}")
        self.every, self.per_call = every, per_call
        self.stop_at, self.save_at = stop_at, save_at
        self.watch, self.options = watch, options
        self.monitor: Monitor | None = None
        self.history: list[tuple[int, dict[str, float]]] = []
        self._resumed: Mapping[str, Any] | None = None
        self._saved = False
        self._trainer: Any = None

    def bind(self, trainer: Any) -> IntruderMonitor:
        """Log through a trainer.

        Args:
            trainer: The trainer that has this callback.

        Returns:
            The callback.
        """
        self._trainer = trainer
        return self

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Measure the thresholds, or take them from the run that is resumed."""
        if self._trainer is None:
            warnings.warn(
                "IntruderMonitor logs nothing before monitor.bind(trainer); its figures are in "
                "monitor.history",
                stacklevel=2,
            )
        saved: Any = state.stateful_callbacks or {}
        known = saved.get(type(self).__name__) if state.global_step else None
        figures = known["attributes"]["figures"] if isinstance(known, dict) else None
        if not self._takes_part(kwargs["model"], args):
            return
        watched: Model = kwargs["model"] if self.watch is None else self.watch
        options = dict(self.options)
        if figures:
            options.setdefault("thresholds", figures["thresholds"])
        self.monitor = Monitor(watched, every=self.every, per_call=self.per_call, **options)
        if figures:
            self.monitor.load_state_dict(figures)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Look when it is time; log, save or stop as asked."""
        if self.monitor is None or not self.monitor.step():
            return
        figures = self.monitor.metrics()
        self.history.append((state.global_step, figures))
        if self._trainer is not None and state.is_world_process_zero:
            # logging clears the flag by which the trainer would log its own loss
            should_log = control.should_log
            self._trainer.log(dict(figures))
            control.should_log = should_log
        intruders = figures["bulkedge/intruders"]
        if self.save_at is not None and intruders >= self.save_at and not self._saved:
            control.should_save = self._saved = True
        if self.stop_at is not None and intruders >= self.stop_at:
            control.should_training_stop = True

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Write what is known into the checkpoint."""
        if self.monitor is None or not state.is_world_process_zero or args.output_dir is None:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            write_figures(folder / FILE, self.monitor)

    def state(self) -> dict[str, Any]:
        """What ``trainer_state.json`` holds."""
        figures = None if self.monitor is None else self.monitor.state_dict()
        settings = {"every": self.every, "per_call": self.per_call}
        settings |= {"stop_at": self.stop_at, "save_at": self.save_at}
        return {"args": settings, "attributes": {"figures": figures}}

    def _takes_part(self, model: torch.nn.Module, args: TrainingArguments) -> bool:
        """Whether this process looks at anything."""
        from ._layers import is_distributed

        spread = any(is_distributed(parameter) for parameter in model.parameters())
        return spread or args.process_index == 0


def write_figures(path: Path, monitor: Monitor) -> None:
    """Write what a monitor knows as JSON, whole or not at all.

    Args:
        path: The file.
        monitor: The monitor.
    """
    told = {
        "steps": monitor.steps,
        "top_k": monitor.top_k,
        "epsilon": monitor.epsilon,
        "metrics": monitor.metrics(),
        "layers": {
            name: asdict(layer) | {"threshold": monitor.thresholds[name]}
            for name, layer in monitor.figures.items()
        },
    }
    building = path.with_name(f".{path.name}.{os.getpid()}")
    building.write_text(json.dumps(told, indent=1) + "\n")
    building.replace(path)
