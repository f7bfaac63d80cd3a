"""Holders in a ``Trainer`` of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Union

import torch
from torch import nn
from transformers.trainer_callback import (
    ExportableState,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.training_args import TrainingArguments

from bulkedge._errors import InputError
from bulkedge._fields import FLAG, check_values, optional
from bulkedge._globs import as_globs
from bulkedge.tune._after_step import require_trained
from bulkedge.tune._matrix import looked_up_once
from bulkedge.tune._thresholds import Thresholds, check_level, saved_thresholds
from bulkedge.tune.clip import SpikeClip
from bulkedge.tune.drift import DriftClip, check_limit
from bulkedge.tune.holder import LEVEL, Holder

from ._moments import MomentsOrPath, check_moments, read_moments, saved_path
from ._penalty import adapted_of
from ._report import handler_of
from ._supported import require_writable

LINES = ("leading", "edge")
"""The names of what spikes are held below."""
DEFAULTS = {"include": ["*"], "exclude": []}
"""The patterns that choose all layers."""
ONLY_SPIKES = ("thresholds", "full")
"""The settings that only a limit of spikes has."""
What = Union[str, Holder, Callable[[nn.Module], Holder]]  # noqa: UP007 — Python 3.10
"""A name, a holder, or a function from the model to one."""


class Hold(TrainerCallback, ExportableState):
    """Hold the updates of a fine-tune: one line in the callbacks of a stock ``Trainer``.

    The holder is built when training begins, on the model that the trainer then has: give the
    callback before the model is wrapped, also to trainers that wrap it themselves
    (``peft_config=`` of TRL).  It is called once when a run begins and after each step of the
    optimiser.  Its state, if it has one, is saved in ``trainer_state.json`` with each checkpoint,
    and read there by ``trainer.train(resume_from_checkpoint=…)``.

    Several may be given; they are called in their order.

    Args:
        what: ``"leading"``: no spike of an update exceeds ``limit`` times θ_k of its layer, the
            strength from which on a generic spike is one of the ten leading directions.
            ``"edge"``: the same with θ_c, from which on it stands out of the bulk at all.  Both
            are :class:`~bulkedge.tune.SpikeClip`.
            ``"drift"``: the mean square change of each layer's output on known texts stays below
            ``limit``: :class:`~bulkedge.tune.DriftClip`.
            Or a holder; or a function from the model to one, such as a class of holders.
        limit: For ``"leading"`` and ``"edge"`` in units of the threshold, 0.9 if None; for
            ``"drift"`` a share of the mean square of the base's output, which must be given.
        moments: For ``"drift"``: :class:`bulkedge.Moments`, or their file.
        adapter: Which adapter; the active one if None.
        include: Patterns of module names.
        exclude: Patterns of the names of those that are left out.
        thresholds: For ``"leading"`` and ``"edge"``: thresholds by name, or a file that
            ``bulkedge budget`` has written, for layers whose threshold is known already.
        full: For ``"leading"`` and ``"edge"``: whether weights that are trained in full are held,
            too; if None, they are in a model without adapters.

    Attributes:
        holder: The holder, once training has begun.

    Raises:
        InputError: If ``what`` is none of these, a limit is not positive, or there are settings
            besides a holder.  When training begins, if there is nothing to hold, the optimiser
            trains nothing of what is held, or it saves other weights than it leaves after a step.

    Example:
        >>> hold = Hold("leading")
        >>> trainer = Trainer(model, args, callbacks=[hold])  # doctest: +SKIP
        >>> controlled = Hold(lambda model: RankController(model, start=4))
    """

    def __init__(
        self,
        what: What,
        limit: float | None = None,
        *,
        moments: MomentsOrPath | None = None,
        adapter: str | None = None,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        thresholds: Thresholds | None = None,
        full: bool | None = None,
    ) -> None:
        self.what, self.limit, self.moments = what, limit, moments
        self.options: dict[str, Any] = {
            "adapter": adapter,
            "include": as_globs(include),
            "exclude": as_globs(exclude),
            "thresholds": saved_thresholds(thresholds),
            "full": full,
        }
        self.holder: Holder | None = None
        self.saved: dict[str, Any] = {}  # set by a trainer that restores a callback
        _check(what, limit, moments, self.options)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Build the holder; load the state of a resumed run, or hold for the first time."""
        self._require_alone()
        require_writable(kwargs["model"], kwargs.get("optimizer"))
        own = self._own_entry(state)
        self.holder = self._build(kwargs["model"], own)
        if state.global_step:
            _require_known_bases(adapted_of(self.holder))
        if own is None:
            self._step(kwargs.get("optimizer"))
        else:
            self._resume(own)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Call the holder."""
        self._step(kwargs.get("optimizer"))

    def state(self) -> dict[str, Any]:
        """The entry of this callback in ``trainer_state.json``."""
        what = self.what if isinstance(self.what, str) else None
        given = {"what": what, "limit": self.limit, "moments": saved_path(self.moments)}
        holder = self.holder
        state = holder.state_dict() if hasattr(holder, "state_dict") else None  # pyright: ignore
        kind = None if holder is None else type(holder).__name__
        saved = {"holder": kind, "state": state}
        return {"args": given | self.options, "attributes": {"saved": saved}}

    def _build(self, model: nn.Module, own: Mapping[str, Any] | None = None) -> Holder:
        """The holder of a model; thresholds of the run that is resumed are not measured again."""
        what, options = self.what, self.options
        if what == "drift":
            moments, limit = self.moments, self.limit  # which were checked when they were given
            chosen = {name: options[name] for name in ("adapter", "include", "exclude")}
            return DriftClip(model, read_moments(moments), limit, **chosen)  # pyright: ignore
        if isinstance(what, str):
            level = LEVEL if self.limit is None else self.limit
            if own is not None and own["holder"] == SpikeClip.__name__ and own["state"]:
                options = options | {"thresholds": own["state"].get("thresholds")}
            return SpikeClip(model, level=level, of=what, **options)  # pyright: ignore
        built: Any = what if _is_holder(what) else what(model)  # pyright: ignore
        if not _is_holder(built):
            raise InputError(
                f"expected a function from the model to a holder with a step(), got one to "
                f"{type(built).__name__}"
            )
        return built

    def _own_entry(self, state: TrainerState) -> dict[str, Any] | None:
        """What the holder in this place had saved; None if no run with holders is resumed."""
        saved = _saved_entries(state) if state.global_step else []
        if not saved:
            return None
        known = getattr(handler_of(self), "callbacks", [self])
        holds = [callback for callback in known if isinstance(callback, Hold)]
        if len(holds) != len(saved):
            raise InputError(
                f"expected the {len(saved)} holders of the run that is resumed, got {len(holds)}; "
                "give the callbacks of that run"
            )
        return saved[next(i for i, callback in enumerate(holds) if callback is self)]

    def _resume(self, own: Mapping[str, Any]) -> None:
        """Load the state of the holder in this place."""
        kind = type(self.holder).__name__
        if own["holder"] != kind:
            raise InputError(
                "expected the holders of the run that is resumed, in their order, got a "
                f"{kind} in the place of a {own['holder']}"
            )
        if own["state"] is not None:
            self.holder.load_state_dict(own["state"])  # pyright: ignore

    def _require_alone(self) -> None:
        """InputError if another callback holds with the same holder."""
        others = getattr(handler_of(self), "callbacks", ())
        if _is_holder(self.what) and sum(getattr(x, "what", 0) is self.what for x in others) > 1:
            raise InputError(
                f"expected each holder once, got one {type(self.what).__name__} twice; give it "
                "once, or build a second one for other layers"
            )

    def _step(self, optimizer: Any) -> None:
        if self.holder is None:
            return
        adapted = adapted_of(self.holder)
        with torch.no_grad(), looked_up_once(adapted):
            if optimizer is not None:
                require_trained(optimizer, adapted)
            self.holder.step()


def _require_known_bases(matrices: Sequence[object]) -> None:
    """InputError if a base was copied from the weights of a run that is resumed."""
    if odd := [x for x in matrices if getattr(x, "copied", False)]:
        raise InputError(
            f"{odd[0].name}: expected the weight before training, got what it is in the checkpoint "  # pyright: ignore
            "that is resumed; give Hold(lambda model: SpikeClip(model, base=...)) the state_dict() "
            "of the model that training began with"
        )


def _is_holder(what: object) -> bool:
    """Whether it is a holder, and not a class of holders."""
    return isinstance(what, Holder) and not isinstance(what, type)


def _check(what: object, limit: Any, moments: object, options: dict[str, Any]) -> None:
    """InputError unless the arguments say what is to be held."""
    if what == "drift":
        check_limit(Hold.__name__, limit)
        check_moments(moments, is_needed=True)
        _require_unused(what, {name: options[name] for name in ONLY_SPIKES})
        return
    names = isinstance(what, str) and what in LINES
    if not names and (isinstance(what, str) or not (_is_holder(what) or callable(what))):
        raise InputError(
            f"expected 'leading', 'edge', 'drift', a holder with a step() or a function from the "
            f"model to one, got {what!r:.60}{_remedy(what)}"
        )
    check_values(Hold.__name__, full=(options["full"], optional(FLAG)))
    chosen = {"limit": limit, "adapter": options["adapter"]}
    chosen |= {name: options[name] for name in ONLY_SPIKES}
    chosen |= {name: options[name] for name, all_ in DEFAULTS.items() if options[name] != all_}
    unused = {"moments": moments} | ({} if names else chosen)
    _require_unused(what, unused)
    if limit is not None:
        check_level(Hold.__name__, limit, "limit")


def _require_unused(what: object, given: dict[str, Any]) -> None:
    """InputError if a setting is given that would be ignored."""
    if odd := [name for name, value in given.items() if value is not None]:
        raise InputError(f"expected no {odd[0]}= with {what!r:.60}, which makes no use of it")


def _remedy(what: object) -> str:
    """What to do about a thing that cannot be held."""
    if what is None:  # what a trainer gives that makes a callback anew from a checkpoint
        return (
            "; if a checkpoint made this callback anew, leave "
            "restore_callback_states_from_checkpoint off: Hold resumes by itself"
        )
    near = get_close_matches(what, (*LINES, "drift"), n=1) if isinstance(what, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def _saved_entries(state: TrainerState) -> list[dict[str, Any]]:
    """What the holders of the run that is resumed have saved, in their order; may be empty.

    A trainer that has several callbacks of a kind lists their entries, first those from before the
    run, in which no holder was built, and then those of every checkpoint.

    Args:
        state: Of the trainer, as it was read from the checkpoint.

    Returns:
        One entry per holder, the latest.
    """
    callbacks: Any = state.stateful_callbacks or {}
    known = callbacks.get(Hold.__name__, [])
    saved = [x["attributes"]["saved"] for x in (known if isinstance(known, list) else [known])]
    count = sum(x["holder"] is None for x in saved) or len(saved)
    return saved[-count:] if saved else []
