"""Updates held below the threshold of their own layer, so that no generic spike can separate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.utils.hooks import RemovableHandle

from bulkedge._fields import POSITIVE, check_values

from ._edge import thresholds
from ._hold import hold
from ._layers import Adapted, adapted_matrices
from ._optimizer import after_step

LEVEL = 0.9


class EdgeClip:
    """Hold every update below its threshold after each step: ``γ_j(s·B·A) ← min(γ_j, level·θ_c)``.

    θ_c is the strength beyond which a generic spike makes an outlier of W0, from the fitted bulk of
    that layer.  Below it a generic update makes no new leading singular vector.  A trained update
    is not generic, and may mix with vectors of the base: audit the result.

    Cost: the Gram matrices of the factors, O((m + n) r²), and one batched r×r decomposition for all
    layers; factors are touched only where a spike exceeds, and measured again once they are rounded
    to their dtype: no spike of what is stored exceeds.

    A layer is found by its name at each step, so that its parameters may be moved, converted,
    replaced or spread over processes (FSDP2) meanwhile.  A factor that is frozen is left as it is,
    and the other one does it alone.

    Args:
        model: A model wrapped by PEFT, on the device where it trains; or adapted matrices.
        level: Where to hold the spikes, in units of θ_c.
        thresholds: θ_c by name, for those that are known already.
        adapter: Which adapter; the active one if None.
        modules: Patterns of module names.

    Attributes:
        thresholds: θ_c by name.
        strongest: The strongest spike of each layer over θ_c, before the last step held it.
        clipped: How many layers the last step changed.

    Raises:
        InputError: If ``level`` is not positive, or a base has no threshold; later, if a layer is
            gone or another one, its adapter is merged or not the active one, or its numbers are not
            finite.

    References:
        Benaych-Georges and Nadakuditi, arXiv:1103.2221: the threshold.

    Example:
        >>> from bulkedge.tune import AdaptedMatrix
        >>> generator = torch.Generator().manual_seed(0)
        >>> W0, B, A = (torch.randn(*s, generator=generator) for s in [(50, 40), (50, 2), (2, 40)])
        >>> clip = EdgeClip([AdaptedMatrix("layer", W0, A, B)], level=0.5)
        >>> clip.step()
        1
        >>> round(float(torch.linalg.svdvals(B @ A)[0]) / clip.thresholds["layer"], 3)
        0.5
    """

    def __init__(
        self,
        model: Adapted,
        *,
        level: float = LEVEL,
        thresholds: Mapping[str, float] | None = None,
        adapter: str | None = None,
        modules: str | Sequence[str] = "*",
    ) -> None:
        check_values(self, level=(level, POSITIVE))
        self.level = level
        self.matrices = adapted_matrices(model, adapter=adapter, modules=modules)
        self.thresholds = _thresholds(self.matrices, thresholds)
        self.strongest: dict[str, float] = {}
        self.clipped = 0

    def step(self) -> int:
        """Hold all updates now.

        Returns:
            How many layers were changed.
        """
        limits = [self.level * self.thresholds[matrix.name] for matrix in self.matrices]
        before, changed = hold(self.matrices, limits)
        for matrix, gamma in zip(self.matrices, before, strict=True):
            self.strongest[matrix.name] = float(gamma[0]) / self.thresholds[matrix.name]
        self.clipped = len(changed)
        return self.clipped

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Do so now, and after each step of an optimiser.

        Args:
            optimizer: Any optimiser of torch, also as Accelerate or Lightning wraps it; of a
                ``Trainer``, its own, in ``on_train_begin``.

        Returns:
            A handle: ``handle.remove()`` ends it.

        Raises:
            InputError: If the optimiser trains nothing of what is held, or saves other weights than
                it leaves after a step (schedule-free).
        """
        handle = after_step(optimizer, self.matrices, self.step)
        self.step()
        return handle


_thresholds = thresholds  # an argument has the name
