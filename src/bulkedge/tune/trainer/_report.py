"""Figures on their way to what ``report_to`` names, from a callback.

A callback is given no trainer, and what it adds to the ``logs`` of ``on_log`` comes too late: the
reporters are called before it.  They listen to the event ``on_log`` of the handler that calls all
callbacks, whatever raises it.  A trainer's own ``log`` is no way there: some trainers average what
they have measured since the last call of it.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments


def handler_of(callback: TrainerCallback) -> Any | None:
    """The handler that is calling a callback right now, found on the stack.

    Args:
        callback: The callback, in one of whose events this is called.

    Returns:
        The handler, which has all ``callbacks``; None if the event was not raised by one.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        known = getattr(owner, "callbacks", None)
        if isinstance(known, list) and any(one is callback for one in known):
            return owner
        frame = frame.f_back
    return None


def report(
    handler: Any,
    figures: dict[str, float],
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
) -> None:
    """Put figures into the history of a run, and send them to all that listen to its log.

    Args:
        handler: The handler of the trainer's callbacks; None for the history alone.
        figures: What is to be logged.
        args: As the event brings it.
        state: As the event brings it.
        control: As the event brings it.
    """
    logs = figures if state.epoch is None else figures | {"epoch": state.epoch}
    state.log_history.append({**logs, "step": state.global_step})
    if handler is None:
        return
    # the event clears the flag by which the trainer would log its own loss at this step
    should_log = control.should_log
    handler.on_log(args, state, control, dict(logs))
    control.should_log = should_log
