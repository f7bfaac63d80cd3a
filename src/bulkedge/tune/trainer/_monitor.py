"""The monitor in a ``Trainer`` of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from torch import nn
from transformers.trainer_callback import (
    ExportableState,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.training_args import TrainingArguments

from bulkedge._errors import InputError
from bulkedge._fields import (
    DEFAULT_EPSILON,
    FLAG,
    POSITIVE,
    POSITIVE_SHARE,
    check_values,
    each,
    optional,
    whole,
)
from bulkedge._globs import as_globs
from bulkedge.tune._figure import draw
from bulkedge.tune._forecast import Forecast
from bulkedge.tune._thresholds import Thresholds, saved_thresholds
from bulkedge.tune._watched import Model, Watched
from bulkedge.tune.monitor import Monitor

from ._figures import require_its_base, write_figures
from ._hold import Hold
from ._limits import SO_FAR, of_process_0, reached, slow
from ._moments import MomentsOrPath, check_moments, read_moments, saved_path
from ._rates import rates_of
from ._report import handler_of, report
from ._spacing import Spacing
from ._supported import is_spread, takes_part

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "bulkedge.json"
"""The file of a checkpoint with the figures of all layers."""
SUMMARY = "train_runtime"
"""The figure by which a trainer's last log is known: after it a run is summed up and ends."""
ROUNDS = 10
"""How often a run checks every layer, if nothing else is asked for."""
UNPLANNED = 50
"""Steps between checks where the trainer does not say how many steps are planned."""
FORECAST_FROM = 20
"""The first step at which a forecast is made."""
Watch = Union[Sequence[Watched], Callable[[nn.Module], Sequence[Watched]]]  # noqa: UP007 — 3.10
"""Matrices to be watched, or a function from the model to them."""


class IntruderMonitor(TrainerCallback, ExportableState):
    """Log new directions and the other figures of a monitor to what ``report_to`` names.

    The figures are those of :class:`bulkedge.tune.Monitor`, which is built when training begins, on
    the model that the trainer then has.  They are logged when layers were checked, also to the
    history of the run; written into every checkpoint as ``bulkedge.json``, layer by layer; and
    resumed from ``trainer_state.json``.

    Under DDP, where the factors are the same in all processes, process 0 checks them; if parameters
    are spread over processes (FSDP2), all processes check together, and process 0 logs.  All
    processes stop and save together.

    Args:
        every: Steps between checks.  If None, as many as check every layer ten times in the run.
            Without a number that stops or saves there may be more: such checks take at most about
            5 % of the time.
        per_call: How many layers are checked at a time, in turn; all if None.  With a few a warning
            says so if the run is too short to check all of them in turn.
        top_k: How many leading directions are judged.
        epsilon: The paper's bound ε on scores, below which a direction counts as new.
        full_passes: Check all layers when training begins, before a checkpoint is saved, and when
            training ends, so that the figures beside an adapter are those of its audit.  With
            ``load_best_model_at_end`` the best checkpoint is checked once it is loaded; its figures
            are in the history alone.
        thresholds: θ_c by name, or a file that ``bulkedge budget`` has written, for layers whose
            threshold is known already.
        moments: :class:`bulkedge.Moments` of the base, or their file: the drift is logged, too.
        adapter: Which adapter; the active one if None.
        include: Patterns of module names.
        exclude: Patterns of the names of those that are left out.
        full: Whether weights that are trained in full are watched, too; if None, they are in a
            model without adapters.  A run of theirs is resumed with ``watch``.
        stop_at: Stop training when there are so many intruders (not counting ``rotated``).  A whole
            number is one in all layers together, a fraction such as 0.5 one per layer.  With
            ``full_passes``, all layers are checked as soon as those that were checked have so many,
            and that count decides.  Without, a whole number waits until the coverage is 1.
        save_at: Save a checkpoint when there are so many for the first time.
        watch: Matrices to watch instead of the model's LoRA layers, or a function that is called
            with the model when training begins: for a full fine-tune
            :func:`bulkedge.tune.full_matrices`, or its result.  In a run that is resumed the
            function is called on the resumed weights, and must give ``base`` to that function.

    Attributes:
        monitor: The monitor, once training has begun.
        history: ``(step, figures)`` of every check.

    Raises:
        InputError: If a number is not positive; when training begins, if there is nothing to watch.

    Example:
        >>> monitor = IntruderMonitor(every=100, stop_at=20)
        >>> trainer = Trainer(model, args, callbacks=[monitor])  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        every: int | None = None,
        per_call: int | None = None,
        top_k: int = 10,
        epsilon: float = DEFAULT_EPSILON,
        full_passes: bool = True,
        thresholds: Thresholds | None = None,
        moments: MomentsOrPath | None = None,
        adapter: str | None = None,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        full: bool | None = None,
        stop_at: float | None = None,
        save_at: float | None = None,
        watch: Watch | None = None,
    ) -> None:
        counts = {"every": every, "per_call": per_call}
        limits = {"stop_at": stop_at, "save_at": save_at}
        check_values(self, epsilon=(epsilon, POSITIVE_SHARE), full_passes=(full_passes, FLAG))
        check_values(self, top_k=(top_k, whole(1)), **each(counts, optional(whole(1))))
        check_values(self, **each(limits, optional(POSITIVE)))
        check_moments(moments, is_needed=False)
        self.every, self.stop_at, self.save_at, self.watch = every, stop_at, save_at, watch
        self._is_limited = stop_at is not None or save_at is not None
        self._latest: dict[str, float] = {}
        self.full_passes, self.moments = full_passes, moments
        self.options: dict[str, Any] = {
            "every": every,
            "per_call": per_call,
            "top_k": top_k,
            "epsilon": epsilon,
            "thresholds": saved_thresholds(thresholds),
            "adapter": adapter,
            "include": as_globs(include),
            "exclude": as_globs(exclude),
            "full": full,
        }
        self.monitor: Monitor | None = None
        self.history: list[tuple[int, dict[str, float]]] = []
        self.saved: dict[str, Any] = {}  # set by a trainer that restores a callback
        self._has_saved = False
        self._handler: Any = None
        self._rates: list[float] = []
        self._is_held = False
        self._spacing: Spacing | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Measure the thresholds, or load them in a run that is resumed."""
        self._find_handler()
        # what is lowered after every step does not grow as the law of a forecast has it
        self._is_held = any(
            isinstance(other, Hold) for other in getattr(self._handler, "callbacks", ())
        )
        if self.watch is None and self.saved.get("watch"):
            raise InputError(
                "expected watch=, got none: restore_callback_states_from_checkpoint makes "
                "callbacks anew, without what they watched; leave it off, IntruderMonitor resumes"
            )
        saved = self._saved_in(state) if state.global_step else {}
        figures, self._has_saved = saved.get("figures"), bool(saved.get("has_saved"))
        self.monitor = None
        self._rates = rates_of(kwargs.get("lr_scheduler"), state.max_steps)
        if takes_part(kwargs["model"], args):
            self.monitor = self._begin(kwargs["model"], figures, state.max_steps)
            self.every = self.monitor.every
            if why := slow(self.monitor, state.max_steps, limited=self._is_limited):
                warnings.warn(why, stacklevel=2)
        if self._is_limited:  # the others wait for process 0 at each of its checks
            self.every = int(of_process_0({"every": self.every or UNPLANNED})["every"])
        if self.full_passes and not figures:
            self._check(args, state, control, None)
        fixed = self.options["every"] is not None or self._is_limited
        self._spacing = None
        if self.monitor is not None and not fixed:
            together = is_spread(kwargs["model"])
            self._spacing = Spacing(self.monitor, state.global_step, together=together)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Check layers when it is time, and all before a checkpoint; log, save or stop as asked."""
        ends = control.should_save or state.global_step >= state.max_steps > 0
        if self.full_passes and ends:
            self._check_all(args, state, control)
        elif self._is_due(state.global_step):
            self._check(args, state, control, 1 if self.monitor is None else self.monitor.per_call)
        else:
            return
        self._act(args, state, control)

    def _is_due(self, step: int) -> bool:
        """Whether layers are checked at a step; checks that take too long come less often."""
        if not self.every or step % self.every:
            return False
        if self._spacing is not None:
            self.every = self._spacing.widen(step)
        return step % self.every == 0

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Check all layers before a checkpoint at the end of an epoch."""
        if self.full_passes and control.should_save:
            self._check_all(args, state, control)
            self._act(args, state, control)

    def figure(self) -> Figure:
        """The run so far as a figure of matplotlib; see :meth:`Monitor.figure`.

        Returns:
            The figure.
        """
        return draw(self.history, self.options["epsilon"])

    def forecast(self) -> list[Forecast]:
        """Which updates will reach θ_k by the end of the run; see :meth:`Monitor.forecast`.

        Returns:
            One entry for each layer, the strongest at the end first; none before the first step, in
            a run that a ``Hold`` limits, or if the schedule of the learning rates is not known
            beforehand.
        """
        if self.monitor is None or not 1 <= self.monitor.steps <= len(self._rates):
            return []
        if self._is_held or not sum(self._rates[: self.monitor.steps]) > 0:
            return []
        return self.monitor.forecast(self._rates)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check all layers when the trainer sums up a run that has ended before its last step."""
        if self.full_passes and SUMMARY in (logs or {}):
            self._check_all(args, state, control)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Check the best checkpoint, if the trainer has loaded it; reporters are closed by now."""
        if self.full_passes and args.load_best_model_at_end:
            self._handler = None
            self._check(args, state, control, None)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Write the figures into the checkpoint, of all layers if an evaluation led to it."""
        if self.full_passes:
            self._check_all(args, state, control)
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
        own = {"stop_at": self.stop_at, "save_at": self.save_at, "full_passes": self.full_passes}
        return self.options | own | {"moments": saved_path(self.moments)}

    def _begin(
        self, model: nn.Module, figures: Mapping[str, Any] | None, max_steps: int
    ) -> Monitor:
        """The monitor of a model, with the figures of the run that is resumed."""
        watched: Model = self.watch(model) if callable(self.watch) else self.watch or model
        known = None if self.moments is None else read_moments(self.moments)
        options: dict[str, Any] = self.options | {"moments": known}
        options["every"] = options["every"] or UNPLANNED
        if figures:
            options["thresholds"] = figures.get("thresholds")
        monitor = Monitor(watched, **options)
        if self.options["every"] is None and max_steps > 0:
            checks = monitor.round // monitor.every
            monitor.every = max(1, max_steps // (ROUNDS * checks))
        if figures:
            monitor.load_state_dict(figures)
            require_its_base(monitor)
        return monitor

    def _act(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Save or stop at the numbers that were asked for, by a count of all layers."""
        if not self._is_limited:
            return
        limits = self.stop_at, None if self._has_saved else self.save_at
        # the same numbers in all processes: if one stopped alone, the others would wait for it
        figures = of_process_0(self._latest)
        if self.full_passes and any(reached(limit, figures, so_far=True) for limit in limits):
            self._check_all(args, state, control)
            figures = of_process_0(self._latest)
        if not self._has_saved and reached(self.save_at, figures):
            control.should_save = self._has_saved = True
        if reached(self.stop_at, figures):
            control.should_training_stop = True

    def _check_all(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        """Check all layers and log, unless all figures are of the present step."""
        if not self._is_current(state):
            self._check(args, state, control, None)

    def _check(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        count: int | None,
    ) -> None:
        """Check layers and log, unless this process checks nothing."""
        if self.monitor is None:
            return
        self.monitor.steps = state.global_step
        self.monitor.check(count)
        figures = self.monitor.metrics()
        if state.global_step >= FORECAST_FROM and (ahead := self.forecast()):
            crossing = sum(layer.at_end[1] >= 1 for layer in ahead)
            figures["bulkedge/predicted_crossings"] = float(crossing)
        self.history.append((state.global_step, figures))
        self._latest = figures | {SO_FAR: self.monitor.intruders_so_far}
        if state.is_world_process_zero:
            report(self._handler, figures, args, state, control)

    def _is_current(self, state: TrainerState) -> bool:
        """Whether all figures are of this step, and decided; so where nothing is checked."""
        layers = {} if self.monitor is None else self.monitor.figures
        return self.monitor is None or (
            len(layers) == len(self.monitor.matrices)
            and all(x.step == state.global_step and not x.undecided for x in layers.values())
        )

    def _find_handler(self) -> None:
        """Find what sends logs to the reporters."""
        self._handler = handler_of(self)
        if self._handler is None:
            warnings.warn(
                "IntruderMonitor was not called by the callback handler of a transformers Trainer, "
                "and logs nothing; its figures are in monitor.history",
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
