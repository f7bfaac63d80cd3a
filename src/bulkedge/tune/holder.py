"""Holders: objects that change the factors of adapted matrices after each step of an optimiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bulkedge._fields import check_values

from ._after_step import after_step
from ._clip_dense import DenseClip, is_dense
from ._clip_spikes import clip_spikes
from ._held import held_matrices, require_form
from ._layers import Adapted, adapted_matrices
from ._matrix import SEVERAL, AdaptedMatrix
from ._thresholds import LINE, Line, Thresholds, check_level, with_threshold

LEVEL = 0.9
"""The level at which spikes are held by default, in units of their threshold."""


@runtime_checkable
class Holder(Protocol):
    """Anything with a ``step`` that is called after each step of an optimiser.

    :class:`AdapterHolder` is a base class for holders of LoRA factors.
    :class:`bulkedge.tune.trainer.AfterStep` calls any holder in a ``Trainer``; if it has
    ``state_dict`` and ``load_state_dict``, its state is saved and resumed, too.

    Example:
        >>> class Count:
        ...     steps = 0
        ...
        ...     def step(self):
        ...         self.steps += 1
        >>> isinstance(Count(), Holder)
        True
    """

    def step(self) -> object:
        """What is done after each step of the optimiser."""
        ...


class AdapterHolder(ABC):
    """A base class for holders of LoRA factors: it finds them, and attaches to an optimiser.

    A subclass implements :meth:`step`, which reads ``matrix.factors`` (B and A) of each of
    ``self.matrices`` and puts others in their place with ``matrix.write(B, A)``.

    Args:
        model: A model wrapped by PEFT, on the device where it trains; or adapted matrices.
        adapter: Which adapter; the active one if None.
        include: Patterns of module names.
        exclude: Patterns of the names of those that are left out.

    Attributes:
        matrices: The adapted matrices that are held.

    Raises:
        InputError: If there is no adapted matrix, or one of a form that this holder does not take.
        RecipeError: If a pattern matches no layer.

    Example:
        >>> from bulkedge.tune import AdaptedMatrix
        >>> class BoundedNorm(AdapterHolder):
        ...     def step(self):
        ...         for matrix in self.matrices:
        ...             norm = float(matrix.strengths.norm())
        ...             B, A = matrix.factors
        ...             matrix.write(B / max(norm, 1), A)
        >>> W0, B, A = torch.zeros(3, 2), torch.full((3, 1), 5.0), torch.ones(1, 2)
        >>> BoundedNorm([AdaptedMatrix("layer", W0, A, B)]).step()
        >>> round(float((B @ A).norm()), 4)
        1.0
    """

    matrices: list[Any]
    takes: ClassVar[tuple[str, ...]] = (SEVERAL,)
    """The forms besides ``W0 + s·B·A`` of one adapter that :meth:`step` can hold."""

    def __init__(
        self,
        model: Adapted,
        *,
        adapter: str | None = None,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
    ) -> None:
        self.matrices = adapted_matrices(model, adapter=adapter, include=include, exclude=exclude)
        require_form(self, self.matrices)

    @abstractmethod
    def step(self) -> object:
        """Change the factors; called after each step of the optimiser."""

    def on_attach(self) -> None:
        """What is done once when an optimiser is attached; a step, unless a subclass differs."""
        self.step()

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Call :meth:`step` after each step of an optimiser.

        Args:
            optimizer: Any optimiser of torch, also as Accelerate or Lightning wraps it; of a
                ``Trainer``, its own, in ``on_train_begin``.

        Returns:
            A handle: ``handle.remove()`` ends it.

        Raises:
            InputError: If the optimiser trains nothing of what is held, or leaves a part of it to
                another optimiser, saves other weights than it leaves after a step (schedule-free),
                or has this holder attached already.
        """
        handle = after_step(optimizer, self.matrices, self.step)
        try:
            self.on_attach()
        except BaseException:
            handle.remove()  # a holder that could not begin is not attached
            raise
        return handle


class ThresholdHolder(AdapterHolder):
    """A base class for holders that keep every spike at or below ``level·θ`` of its layer.

    Layers whose bases have no bulk, and so no threshold, are left alone with one note.

    Args:
        model: A model wrapped by PEFT, on the device where it trains; or adapted matrices.
        level: Where to hold the spikes, in units of their threshold.
        of: Which threshold: ``"edge"`` is θ_c, beyond which a generic spike makes an outlier;
            ``"leading"`` is θ_k, mostly above θ_c, beyond which it is one of the ten leading
            directions.
        thresholds: Thresholds by name, or a file that ``bulkedge budget`` has written, for layers
            whose threshold is known already.
        adapter: Which adapter; the active one if None.
        include: Patterns of module names.
        exclude: Patterns of the names of those that are left out.
        full: Whether weights that are trained in full are held, too, for which a copy of each base
            is kept; if None, they are in a model without adapters.
        base: The weights before training by name, if the model has been trained already.

    Attributes:
        level: The level.
        thresholds: The threshold of each layer that is held, by name.

    Raises:
        InputError: If ``level`` is not positive or beyond 10, a known threshold is not positive and
            finite, or no base has a threshold.
        RecipeError: If a known threshold has the name of no layer that is held.
    """

    def __init__(
        self,
        model: Adapted,
        *,
        level: float = LEVEL,
        of: Line = "edge",
        thresholds: Thresholds | None = None,
        adapter: str | None = None,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        full: bool | None = None,
        base: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_level(self, level)
        check_values(self, of=(of, LINE))
        found = held_matrices(
            model, adapter=adapter, include=include, exclude=exclude, full=full, base=base
        )
        require_form(self, found)
        self.level = level
        self.matrices, self.thresholds = with_threshold(found, thresholds, of)
        self._dense = DenseClip()

    @property
    def limits(self) -> list[float]:
        """The strength that no spike may exceed, ``level·θ``, for each matrix."""
        return [self.level * self.thresholds[matrix.name] for matrix in self.matrices]

    def clip(self) -> tuple[list[Tensor], list[int]]:
        """Lower every spike that exceeds its limit to that limit, and change no other.

        Returns:
            The spikes of each matrix before, descending, and the indices of the changed matrices.

        Raises:
            InputError: If a factor is not finite, or a limit is exceeded and no factor may be
                changed.
        """
        # of a DoRA first the spikes of its factors, then the update as a whole
        adapted = [i for i, x in enumerate(self.matrices) if isinstance(x, AdaptedMatrix)]
        limits = self.limits
        own = [self.matrices[i] for i in adapted]
        gammas, changed = clip_spikes(own, [limits[i] for i in adapted])
        before = dict(zip(adapted, gammas, strict=True))
        lowered = {adapted[i] for i in changed}
        for i, matrix in enumerate(self.matrices):
            if is_dense(matrix):
                before[i], was = self._dense.clip(matrix, limits[i])
                lowered |= {i} if was else set()
        return [before[i] for i in range(len(self.matrices))], sorted(lowered)
