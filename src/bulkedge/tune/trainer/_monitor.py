"""The monitor in a ``Trainer`` of transformers."""

from __future__ import annotations

import json
import os
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Union

import torch
from torch import distributed, nn

from bulkedge._errors import InputError, MissingExtraError, OutputError
from bulkedge._fields import DEFAULT_EPSILON, check_values, each, optional, whole
from bulkedge._globs import as_globs

from ._matrix import is_distributed
from ._thresholds import known_thresholds
from .monitor import Model, Monitor, Watched

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
"""The file of a checkpoint with the figures of all layers."""
Watch = Union[Sequence[Watched], Callable[[nn.Module], Sequence[Watched]]]  # noqa: UP007 — 3.10
"""Matrices to be watched, or a function from the model to them."""
_bound: weakref.WeakSet[Any] = weakref.WeakSet()
"""The trainers to which a monitor was bound."""


class IntruderMonitor(TrainerCallback, ExportableState):
    """Log ``bulkedge/intruders`` and the other figures of a monitor to what ``report_to`` names.

    The figures are those of :class:`bulkedge.tune.Monitor`.  They are written into every checkpoint
    as ``bulkedge.json``, layer by layer, and resumed from ``trainer_state.json``.  A callback does
    not know its trainer, so logging needs :meth:`bind`; without it the figures are in ``history``
    alone.

    Under DDP, where the factors are the same in all processes, process 0 checks them; if parameters
    are spread over processes (FSDP2), all processes check together, and process 0 logs.  All
    processes stop and save together.

    Args:
        every: Steps between checks.
        per_call: How many layers are checked at a time.
        top_k: How many leading directions are judged.
        epsilon: The paper's bound ε on scores, below which a direction counts as new.
        thresholds: θ_c by name, for layers whose threshold is known already.
        adapter: Which adapter; the active one if None.
        include: Patterns of module names.
        exclude: Patterns of the names of those that are left out.
        stop_at: Stop training when there are so many intruders (not counting ``rotated``) in all
            layers together; never before every layer was checked.
        save_at: Save a checkpoint when there are so many for the first time.
        watch: Matrices to watch instead of the model's LoRA layers, or a function that is called
            with the model when training begins and returns them: for a full fine-tune
            :func:`bulkedge.tune.full_matrices`, or its result.  In a run that is resumed the
            function is called on the resumed weights, and must give ``base`` to that function.

    Attributes:
        monitor: The monitor, once training has begun.
        history: ``(step, figures)`` of every check.

    Raises:
        InputError: If a number is not positive.

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
        top_k: int = 10,
        epsilon: float = DEFAULT_EPSILON,
        thresholds: Mapping[str, float] | None = None,
        adapter: str | None = None,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        stop_at: int | None = None,
        save_at: int | None = None,
        watch: Watch | None = None,
    ) -> None:
        counts = {"every": every, "stop_at": stop_at, "save_at": save_at}
        check_values(self, **each(counts, optional(whole(1))))
        self.every, self.stop_at, self.save_at, self.watch = every, stop_at, save_at, watch
        self.options: dict[str, Any] = {
            "every": every,
            "per_call": per_call,
            "top_k": top_k,
            "epsilon": epsilon,
            "thresholds": None if thresholds is None else known_thresholds(thresholds),
            "adapter": adapter,
            "include": as_globs(include),
            "exclude": as_globs(exclude),
        }
        self.monitor: Monitor | None = None
        self.history: list[tuple[int, dict[str, float]]] = []
        self.saved: dict[str, Any] = {}  # set by a trainer that restores a callback
        self._has_saved = False
        self._trainer: Any = None

    def bind(self, trainer: Any) -> IntruderMonitor:
        """Log through a trainer.

        Args:
            trainer: The trainer that has this callback.

        Returns:
            The callback.
        """
        self._trainer = trainer
        _bound.add(trainer)
        return self

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Measure the thresholds, or load them in a run that is resumed."""
        self._find_trainer()
        if self.watch is None and self.saved.get("watch"):
            raise InputError(
                "expected watch=, got none: restore_callback_states_from_checkpoint makes "
                "callbacks anew, without what they watched; leave it off, IntruderMonitor resumes"
            )
        saved = self._saved_in(state) if state.global_step else {}
        figures, self._has_saved = saved.get("figures"), bool(saved.get("has_saved"))
        self.monitor = None
        if _takes_part(kwargs["model"], args):
            self.monitor = self._begin(kwargs["model"], figures)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Check layers when it is time; log, save or stop as asked."""
        if state.global_step % self.every:
            return
        intruders = self._check(state, control)
        if self.save_at is None and self.stop_at is None:
            return
        # the same number in all processes: if one stopped alone, the others would wait for it
        intruders = _of_process_0(intruders)
        if self.save_at is not None and intruders >= self.save_at and not self._has_saved:
            control.should_save = self._has_saved = True
        if self.stop_at is not None and intruders >= self.stop_at:
            control.should_training_stop = True

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Write the figures into the checkpoint."""
        if self.monitor is None or not state.is_world_process_zero or args.output_dir is None:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            self.monitor.steps = state.global_step
            write_figures(folder / FILE, self.monitor)

    def state(self) -> dict[str, Any]:
        """The entry of this callback in ``trainer_state.json``."""
        figures = None if self.monitor is None else self.monitor.state_dict()
        saved = {"figures": figures, "has_saved": self._has_saved, "watch": self.watch is not None}
        return {"args": self._arguments(), "attributes": {"saved": saved}}

    def _arguments(self) -> dict[str, Any]:
        """The arguments of the constructor that JSON can hold."""
        return self.options | {"stop_at": self.stop_at, "save_at": self.save_at}

    def _begin(self, model: nn.Module, figures: Mapping[str, Any] | None) -> Monitor:
        """The monitor of a model, with the figures of the run that is resumed."""
        watched: Model = self.watch(model) if callable(self.watch) else self.watch or model
        if not figures:
            return Monitor(watched, **self.options)
        thresholds: Any = figures.get("thresholds")
        monitor = Monitor(watched, **(self.options | {"thresholds": thresholds}))
        monitor.load_state_dict(figures)
        if callable(self.watch):
            _require_its_base(monitor)
        return monitor

    def _check(self, state: TrainerState, control: TrainerControl) -> int:
        """Check layers and log; the number of intruders, 0 before all layers were checked."""
        if self.monitor is None:
            return 0
        self.monitor.steps = state.global_step
        self.monitor.check(self.monitor.per_call)
        figures = self.monitor.metrics()
        self.history.append((state.global_step, figures))
        if self._trainer is not None and state.is_world_process_zero:
            # logging clears the flag by which the trainer would log its own loss
            should_log = control.should_log
            self._trainer.log(dict(figures))
            control.should_log = should_log
        return int(figures.get("bulkedge/intruders", 0))

    def _find_trainer(self) -> None:
        """Find the bound trainer with this callback, which a checkpoint may have restored."""
        if self._trainer is None:
            with_self = (t for t in _bound if any(c is self for c in t.callback_handler.callbacks))
            self._trainer = next(with_self, None)
        if self._trainer is None:
            warnings.warn(
                "IntruderMonitor logs nothing before monitor.bind(trainer); its figures are in "
                "monitor.history",
                stacklevel=3,
            )

    def _saved_in(self, state: TrainerState) -> dict[str, Any]:
        """The state of this callback in a checkpoint."""
        callbacks: Any = state.stateful_callbacks or {}
        known = callbacks.get(type(self).__name__, {})
        if isinstance(known, list):  # several monitors: the last one with the same arguments
            same = (x for x in reversed(known) if x["args"] == self._arguments())
            known = next(same, {})
        return known.get("attributes", {}).get("saved", {})


def _takes_part(model: nn.Module, args: TrainingArguments) -> bool:
    """Whether this process checks layers; InputError if its parameters are parts of others."""
    parameters = list(model.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        found, remedy = "those of DeepSpeed's ZeRO-3", "use ZeRO-2, or FSDP2"
    elif any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        found, remedy = "the flat ones of FSDP1", "set fsdp_version to 2"
    else:
        return args.process_index == 0 or any(is_distributed(parameter) for parameter in parameters)
    raise InputError(f"expected whole parameters, or those of FSDP2, got {found}; {remedy}")


def _of_process_0(number: int) -> int:
    """The number of process 0, in all processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return number
    numbers = [number]
    distributed.broadcast_object_list(numbers, src=0)
    return numbers[0]


def _require_its_base(monitor: Monitor) -> None:
    """InputError if the base was copied from the resumed weights."""
    with torch.no_grad():
        for matrix in monitor.matrices:
            known = monitor.figures.get(matrix.name)
            if known is None or known.strongest == 0:
                continue
            if float(matrix.strengths[0]) == 0:
                raise InputError(
                    f"{matrix.name}: expected what it was before training, got what it is in the "
                    "checkpoint; give watch=lambda model: full_matrices(model, base=...)"
                )
            return


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
            name: asdict(layer) | {"threshold": monitor.thresholds[name]}
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
