"""Protect: give back what a fine-tune forgot, without training again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bulkedge._errors import InputError
from bulkedge._fields import NOT_NEGATIVE, POSITIVE, check_fields, one_of, optional, whole
from bulkedge.moments import Moments

from .both import has_curvatures
from .solve import RIDGE

DEFAULT_STRENGTH = 1.0
"""The strength that is used where neither a strength nor a drift is asked for."""


@dataclass(frozen=True)
class Protect:
    """Move every update away from the inputs that the base is used on.

    ``D' = ΔW C_t (C_t + λ C_b)⁻¹`` keeps the effect of the update on the task's inputs and lowers
    its effect on the base's: see :func:`bulkedge.repairing.solve.protected`.

    Attributes:
        moments: Of the base's inputs, on text of the kind to be kept.
        task_moments: Of the fine-tune's inputs on text of its task.  Without them, every input
            direction counts equally for the task, which costs much of its accuracy.
        strength: λ: the cost of a unit of drift on the base's inputs, relative to a unit on the
            task's.
            1 if neither it nor a drift is given.
        target_drift: The mean over the layers of ``tr(D' C_b D'ᵀ)/tr(W0 C_b W0ᵀ)`` that is wanted;
            λ is then the strength that gives it.
        balance: In which unit the loss on the task and the drift are the same in every layer, so
            that one costs λ of the other wherever it is.  ``"output"``: mean squares of the layers'
            outputs.  ``"drift"``: parts of the output of the base's weight.  ``"layer"``: both
            moments scaled to mean diagonal 1, each layer separately.
        ridge: Part of the mean diagonal that is added to each moment, for directions that few texts
            have used.
        sides: ``"one"``: the outputs of a layer count equally.  ``"two"``: each as much as the loss
            depends on it, by the curvatures in both moments, see :class:`Sides`; the factor on the
            output side is new, too.  That was measured to be better at ranks 2 and 8, worse at 1.
        rounds: How often every update is protected.  Each round after the first measures the task's
            inputs on the result of the previous round, since a protected layer changes the inputs
            of those above it.  It protects ΔW as trained: protecting the result again would apply
            ``T`` twice, like a larger λ.  Once a further round changes nothing, every layer is at
            its minimum on the inputs that the protected model gives it; this need not happen.
            Moments of the base's inputs stay those of the base.
        recollect: A function that measures the task's inputs on a protected copy, given its folder
            or file; the copy is then removed.  Needed for more than one round.

    Raises:
        InputError: If the strength is negative, the drift is not positive, both are given, the
            balance is none of the three, there are no curvatures for two sides, or rounds have
            nothing that measures the inputs.

    References:
        Jin et al., "Dataless knowledge fusion by merging weights of language models",
        arXiv:2212.09849: regression means, here between base and fine-tune.
    """

    moments: Moments
    task_moments: Moments | None = None
    strength: float | None = None
    target_drift: float | None = None
    balance: str = "output"
    ridge: float = RIDGE
    sides: str = "one"
    rounds: int = 1
    recollect: Callable[[Path], Moments] | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            strength=optional(NOT_NEGATIVE),
            target_drift=optional(POSITIVE),
            balance=one_of("output", "drift", "layer"),
            ridge=POSITIVE,
            sides=one_of("one", "two"),
            rounds=whole(1),
        )
        if self.strength is not None and self.target_drift is not None:
            raise InputError(
                "expected a strength or a target drift, got both: the one follows from the other"
            )
        if self.moments.tuned:
            raise InputError(
                "expected moments of the base's inputs for what is to be kept, got those of a "
                "fine-tune (--tuned); were the two files swapped?"
            )
        if self.task_moments is not None and self.task_moments.tuned is False:
            raise InputError(
                "expected task moments of the fine-tune's inputs, got those of the base; measure "
                "them with `bulkedge moments BASE TEXTS --tuned TUNED`"
            )
        if self.sides == "two":
            self._check_sides()
        if self.rounds > 1 and not callable(self.recollect):
            raise InputError(
                f"expected recollect for {self.rounds} rounds, got {self.recollect!r:.60}; give a "
                "function of a folder that returns the task's moments on the fine-tune in it"
            )

    def _check_sides(self) -> None:
        """Raise unless both sides can be protected."""
        if self.target_drift is not None or self.balance == "drift":
            raise InputError(
                "expected a strength, in units of the outputs or of a layer, for two sides: drift "
                "does not show what they keep; leave out the drift, or ask for one side"
            )
        if not (has_curvatures(self.moments) and has_curvatures(self.task_moments)):
            raise InputError(
                "expected curvatures in both moments for two sides, got some without; collect them "
                "with `bulkedge moments … --curvatures`"
            )
