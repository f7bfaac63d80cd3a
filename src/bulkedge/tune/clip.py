"""Updates held below the threshold of their own layer, so that no generic spike can separate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from bulkedge._errors import InputError
from bulkedge._fields import POSITIVE, check_values, optional
from bulkedge._linmap import Dense
from bulkedge.spectral import SpectralCap

from ._edge import measure, thresholds
from ._layers import Adapted, adapted_matrices
from ._spikes import spikes_of

LEVEL = 0.9


class EdgeClip:
    """Hold every update below its threshold after each step: ``γ_j(s·B·A) ← min(γ_j, level·θ_c)``.

    θ_c is the strength beyond which a generic spike makes an outlier of W0, from the fitted bulk of
    that layer.  Below it a generic update makes no new leading singular vector.  A trained update
    is not generic, and may mix with vectors of the base: audit the result.

    Cost: the Gram matrices of the factors, O((m + n) r²), and one batched r×r decomposition for all
    layers; factors are touched only where a spike exceeds.

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
        InputError: If ``level`` is not positive, or a base has no threshold.

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
        self.clipped = 0
        for matrix, found in zip(self.matrices, spikes_of(self.matrices), strict=True):
            theta = self.thresholds[matrix.name]
            self.strongest[matrix.name] = float(found.gamma[0]) / theta
            # the factors are rounded once they are written: by so much less is aimed at
            slack = 1 - 16 * torch.finfo(matrix.B.dtype).eps
            if self.strongest[matrix.name] > self.level:
                found.rescaled(matrix, found.gamma.clamp_max(self.level * theta * slack))
                self.clipped += 1
        return self.clipped

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Do so now, and after each step of an optimiser.

        Args:
            optimizer: Any optimiser of torch; of a ``Trainer``, its own, in ``on_train_begin``.

        Returns:
            A handle: ``handle.remove()`` ends it.
        """
        self.step()
        return after_step(optimizer, self.step)


class UpdateCap(nn.Module):
    """The parametrization of :func:`hold_update`: ``W ↦ W0 + min(1, bound/‖W − W0‖₂)(W − W0)``."""

    base: Tensor

    def __init__(self, weight: Tensor, bound: float) -> None:
        super().__init__()
        self.bound = bound
        self.register_buffer("base", weight.detach().clone())
        self.cap = SpectralCap(
            torch.zeros_like(weight),
            bound,
            n_power_iterations=None,
            eps=1e-12,
            dim=0,
            shrink_only=True,
            rtol=1e-3,
            operator=None,
            certified=None,
        )

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, its update held."""
        return self.base + self.cap(weight - self.base)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """A weight assigned is the weight kept; what is read is held."""
        return weight

    def extra_repr(self) -> str:
        """For printing a module."""
        return f"bound={self.bound:.4g}"


def hold_update(
    module: nn.Module,
    name: str = "weight",
    *,
    level: float = LEVEL,
    threshold: float | None = None,
) -> nn.Module:
    """Hold the update of a weight that is trained in full below the threshold of what it is now.

    A parametrization: the loss is that of the held weight, and its gradient goes through.  Remove
    it with ``torch.nn.utils.parametrize.remove_parametrizations`` to keep the held weight.

    Args:
        module: The module, changed in place.
        name: Its parameter, which is W0 from here on.
        level: Where to hold the norm of the update, in units of θ_c.
        threshold: θ_c, if it is known.

    Returns:
        The module.

    Raises:
        InputError: If the parameter is no matrix or ``level`` not positive, or it has no threshold.

    Example:
        >>> layer = nn.Linear(40, 50)
        >>> W0 = layer.weight.detach().clone()
        >>> _ = hold_update(layer, level=0.5, threshold=2.0)
        >>> _ = layer.parametrizations.weight.original.data.add_(1.0)
        >>> round(float(torch.linalg.matrix_norm(layer.weight.detach() - W0, 2)), 3)
        1.0
    """
    check_values("hold_update", level=(level, POSITIVE), threshold=(threshold, optional(POSITIVE)))
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise InputError(f"expected a matrix {name!r} in {type(module).__name__}")
    if threshold is None:
        threshold = measure(name, Dense(weight.detach().float())).fit.threshold
    if not threshold > 0:
        raise InputError(f"{name}: expected a positive threshold, got {threshold}")
    parametrize.register_parametrization(module, name, UpdateCap(weight, level * threshold))
    return module


def after_step(optimizer: torch.optim.Optimizer, action: Callable[[], object]) -> RemovableHandle:
    """Do something after each step of an optimiser; ``handle.remove()`` ends it."""

    def hook(*_: object) -> None:
        action()

    return optimizer.register_step_post_hook(hook)


_thresholds = thresholds  # an argument has the name
