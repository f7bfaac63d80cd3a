"""Holders and penalties in a ``Trainer`` of transformers."""

from __future__ import annotations

from typing import Any

import torch

from bulkedge._errors import InputError, MissingExtraError

from ._after_step import require_in_model, require_trained
from ._matrix import AdaptedMatrix
from .holder import Holder
from .penalty import IntruderPenalty

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
        "bulkedge.tune.trainer needs transformers: pip install 'bulkedge[hf]'"
    ) from error


class AfterStep(TrainerCallback, ExportableState):
    """Call holders after each step of the optimiser, and save and resume their state.

    The state of holders that have one is written into ``trainer_state.json`` with each checkpoint,
    and read from there by ``trainer.train(resume_from_checkpoint=…)``.

    Args:
        holders: Any :class:`~bulkedge.tune.Holder`, in the order in which they are called.

    Raises:
        InputError: If one of them has no ``step`` or is given twice; while training, if the
            optimiser trains nothing of what one of them holds, or saves other weights than it
            leaves after a step.

    Example:
        >>> holders = AfterStep(SpikeClip(model))  # doctest: +SKIP
        >>> trainer = Trainer(model, args, callbacks=[holders])  # doctest: +SKIP
    """

    def __init__(self, *holders: Holder) -> None:
        for holder in holders:
            if not isinstance(holder, Holder):
                raise InputError(f"expected holders with a step(), got {type(holder).__name__}")
            if sum(other is holder for other in holders) > 1:
                raise InputError(
                    f"expected each holder once, got one {type(holder).__name__} twice; give it "
                    "once, or build a second one for other layers"
                )
        self.holders = holders

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Load the state of a resumed run; in a new run, call every holder once."""
        if not self.holders:
            raise InputError(
                "expected holders, got none: restore_callback_states_from_checkpoint makes "
                "callbacks anew, without what they were given; leave it off, AfterStep resumes"
            )
        known: Any = state.stateful_callbacks or {}
        saved = known.get(type(self).__name__)
        if isinstance(saved, list):
            raise InputError("expected one AfterStep a trainer; give it all the holders")
        if not state.global_step or saved is None:
            self._step(kwargs.get("optimizer"))
            return
        states = saved["attributes"]["states"]
        if len(states) != len(self.holders):
            raise InputError(f"expected the {len(states)} holders of the run that is resumed")
        for holder, saved_state in zip(self.holders, states, strict=True):
            if hasattr(holder, "state_dict") != (saved_state is not None):
                raise InputError(
                    "expected the holders of the run that is resumed, in their order, got a "
                    f"{type(holder).__name__} in the place of another one"
                )
            if saved_state is not None:
                holder.load_state_dict(saved_state)  # pyright: ignore[reportAttributeAccessIssue]

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Call every holder."""
        self._step(kwargs.get("optimizer"))

    def state(self) -> dict[str, Any]:
        """The entry of this callback in ``trainer_state.json``."""
        states = [
            holder.state_dict() if hasattr(holder, "state_dict") else None  # pyright: ignore
            for holder in self.holders
        ]
        return {"args": {}, "attributes": {"states": states}}

    def _step(self, optimizer: Any) -> None:
        with torch.no_grad():
            for holder in self.holders:
                if optimizer is not None:
                    require_trained(optimizer, _adapted(holder))
                holder.step()


def _adapted(holder: object) -> list[AdaptedMatrix]:
    """The adapted matrices that a holder changes, or that a penalty depends on."""
    return [x for x in getattr(holder, "matrices", ()) if isinstance(x, AdaptedMatrix)]


class PenaltyMixin:
    """Add an :class:`IntruderPenalty` to the loss of a ``Trainer``.

    Put it before the trainer: ``class MyTrainer(PenaltyMixin, Trainer)``, and set
    ``trainer.intruder_penalty``.  It is added in training only, never in evaluation, and once for
    each step of the optimiser however many batches are accumulated.

    Example:
        >>> class MyTrainer(PenaltyMixin, Trainer):  # doctest: +SKIP
        ...     pass
        >>> trainer = MyTrainer(model, args, train_dataset=data)  # doctest: +SKIP
        >>> trainer.intruder_penalty = IntruderPenalty(model)  # doctest: +SKIP
    """

    intruder_penalty: IntruderPenalty | None = None

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of the trainer plus the penalty."""
        loss, outputs = super().compute_loss(  # pyright: ignore[reportAttributeAccessIssue]
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if self.intruder_penalty is not None and model.training:
            require_in_model(model, _adapted(self.intruder_penalty))
            value = self.intruder_penalty().to(loss.device)
            # if a count of items is given, the trainer does not divide by the number of batches
            if not self._divides(num_items_in_batch):
                value = value / self.current_gradient_accumulation_steps  # pyright: ignore
            loss = loss + value
        return (loss, outputs) if return_outputs else loss

    def _divides(self, num_items_in_batch: Any) -> bool:
        """Whether the trainer itself divides by the number of accumulated batches."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:  # the rule of the trainer
            accepts = self.model_accepts_loss_kwargs  # pyright: ignore[reportAttributeAccessIssue]
            own = self.compute_loss_func  # pyright: ignore[reportAttributeAccessIssue]
            scaled = (accepts and num_items_in_batch is not None) or own is not None
        return not scaled
