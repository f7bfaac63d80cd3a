"""Penalties in the loss of a ``Trainer``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bulkedge.tune._after_step import require_in_model
from bulkedge.tune._full import FullMatrix
from bulkedge.tune._held import Held
from bulkedge.tune._matrix import AdaptedMatrix


class PenaltyMixin:
    """Add a penalty to the loss of a ``Trainer``.

    Put it before the trainer: ``class MyTrainer(PenaltyMixin, Trainer)``, and set
    ``trainer.penalty``.  It is added in training only, never in evaluation, and once for each step
    of the optimiser however many batches are accumulated.

    Attributes:
        penalty: An :class:`~bulkedge.tune.IntruderPenalty`, a :class:`~bulkedge.tune.DriftPenalty`,
            or any function that returns a scalar.

    Example:
        >>> class MyTrainer(PenaltyMixin, Trainer):  # doctest: +SKIP
        ...     pass
        >>> trainer = MyTrainer(model, args, train_dataset=data)  # doctest: +SKIP
        >>> trainer.penalty = DriftPenalty(model, moments, weight=0.1)  # doctest: +SKIP
    """

    penalty: Callable[[], Tensor] | None = None

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
        if self.penalty is not None and model.training:
            require_in_model(model, adapted_of(self.penalty))
            value = self.penalty().to(loss.device)
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


def adapted_of(owner: object) -> list[Held]:
    """The matrices that a holder changes, or that a penalty depends on."""
    held = (AdaptedMatrix, FullMatrix)
    return [x for x in getattr(owner, "matrices", ()) if isinstance(x, held)]
