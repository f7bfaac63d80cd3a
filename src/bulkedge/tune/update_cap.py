"""The update of a weight that is trained in full, held as a parametrization."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bulkedge._errors import InputError
from bulkedge._linmap import Dense
from bulkedge.spectral import SpectralCap

from ._edge import measure
from .clip import LEVEL, require_level


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
    require_level(level)
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise InputError(f"expected a matrix {name!r} in {type(module).__name__}")
    if threshold is None:
        threshold = measure(name, Dense(weight.detach().float())).fit.threshold
    if not threshold > 0:
        raise InputError(f"{name}: expected a positive threshold, got {threshold}")
    parametrize.register_parametrization(module, name, UpdateCap(weight, level * threshold))
    return module
