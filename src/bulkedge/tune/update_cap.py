"""The update of a weight that is trained in full, held as a parametrization."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bulkedge._errors import InputError
from bulkedge._fields import POSITIVE, check_values, optional
from bulkedge._linmap import Dense
from bulkedge.spectral import SpectralCap

from ._edge import measure
from ._matrix import is_distributed, require_in_memory, spread_like, storage_of, whole
from .clip import LEVEL


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
        """The weight, its update held.

        Args:
            weight: As it is trained, shape ``(m, n)``.

        Returns:
            Of the same shape.

        Raises:
            InputError: If the weight is not finite, or not the one that was there when this was
                made.
        """
        if is_distributed(weight) or weight.shape != self.base.shape:
            raise InputError(
                f"hold_update: expected a whole weight of shape {tuple(self.base.shape)}, got "
                f"{tuple(weight.shape)}{', a part' if is_distributed(weight) else ''}; read it in "
                "the forward pass of the module, or apply hold_update after the change"
            )
        try:
            return self.base + self.cap(weight - self.base)
        except InputError as error:
            raise InputError(
                f"hold_update: a weight of shape {tuple(weight.shape)}: {error}"
            ) from error

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

    ``state_dict()``, and so every checkpoint, has the held weight under its plain name: programs
    that know nothing of this package load it.  A checkpoint that is loaded sets the trained weight,
    W0 stays what it is: to resume, build the model from what it began with, hold, and then load.

    The held weight is rounded to the dtype of the parameter: in bfloat16 each entry by up to a
    256th of itself, and the norm of its update may end as much of ‖W‖_F beyond the level.

    A parameter that two modules share (a tied head) is held in the modules that this is applied to:
    apply it to both.

    Args:
        module: The module, changed in place.
        name: Its parameter, which is W0 from here on.
        level: Where to hold the norm of the update, in units of θ_c.
        threshold: θ_c, if it is known.

    Returns:
        The module.

    Raises:
        InputError: If the parameter is no matrix, not in memory or ``level`` not positive, or it
            has no threshold.

    Warns:
        UserWarning: While a state is made, if another module shares the parameter and does not hold
            it: it is stored as held there, too, but trained as it is.

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
    require_in_memory(name, weight)
    if threshold is None:
        threshold = measure(name, Dense(weight.detach().float())).fit.threshold
    if not threshold > 0:
        raise InputError(f"{name}: expected a positive threshold, got {threshold}")
    parametrize.register_parametrization(module, name, UpdateCap(weight, level * threshold))
    module.register_state_dict_post_hook(partial(_store_plain, name))
    module.register_load_state_dict_pre_hook(partial(_load_plain, name))
    return module


def _store_plain(
    name: str, module: nn.Module, state: dict[str, Any], prefix: str, _: Any = None
) -> None:
    """Put the held weight in the place of what the parametrization is made of."""
    if not _is_held(module, name):
        return
    inner = f"{prefix}parametrizations.{name}."
    original = state[f"{inner}original"]
    for key in [key for key in state if key.startswith(inner)]:
        del state[key]
    held = state[f"{prefix}{name}"] = _held(module, name)
    for key, value in state.items():
        if isinstance(value, Tensor) and storage_of(value) == storage_of(original):
            state[key] = held
            warnings.warn(
                f"{key} shares its parameter with {prefix}{name}, which hold_update holds, and is "
                "not held itself: it is stored as held; apply hold_update to both modules",
                stacklevel=2,
            )


def _load_plain(name: str, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take a plain weight for the trained one; the base stays."""
    key, inner = f"{prefix}{name}", f"{prefix}parametrizations.{name}."
    if key not in state or not _is_held(module, name):
        return
    own = _own(module, name)
    state |= own.state_dict(prefix=inner) | {f"{inner}original": state.pop(key)}


def _is_held(module: nn.Module, name: str) -> bool:
    """Whether a parameter is held, and nothing else computes it."""
    if not parametrize.is_parametrized(module, name):
        return False
    own = _own(module, name)
    return len(own) == 1 and isinstance(own[0], UpdateCap)


def _own(module: Any, name: str) -> Any:
    """What computes a parameter."""
    return module.parametrizations[name]


def _held(module: nn.Module, name: str) -> Tensor:
    """The held weight; spread over processes as the trained one is."""
    own = _own(module, name)
    with torch.no_grad():
        return spread_like(own[0](whole(own.original)), own.original).detach()
