"""A bound on the update of a weight that is trained in full, as a parametrization."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bulkedge._errors import InputError
from bulkedge._fields import POSITIVE, TEXT, check_values, optional
from bulkedge._linmap import Dense
from bulkedge.spectral import SpectralCap

from ._matrix import distribute_like, gathered, is_distributed, require_in_memory, storage_key
from ._thresholds import base_spectrum, check_level
from .holder import LEVEL


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
        """The weight with the norm of its update bounded.

        Args:
            weight: The trained weight, shape ``(m, n)``.

        Returns:
            The bounded weight, shape ``(m, n)``.

        Raises:
            InputError: If the weight is not finite, or its shape is not that of the base.
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
        """The identity: an assigned weight is stored as it is, and bounded when it is read."""
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
    """Hold the update of a weight that is trained in full below the threshold of its present value.

    This registers a parametrization, :class:`UpdateCap`: the loss is computed from the held weight,
    and the gradient goes through it.  ``torch.nn.utils.parametrize.remove_parametrizations``
    removes it and keeps the held weight.

    ``state_dict()``, and so every checkpoint, has the held weight under its plain name, so that
    programs without this package load it.  Loading a checkpoint sets the trained weight and leaves
    W0: to resume, build the model from its weights before training, call this, and then load.

    The held weight is rounded to the dtype of the parameter: in bfloat16 each entry by up to a
    256th of itself, so that the norm of its update may exceed the level by up to ‖W‖_F/256.

    A parameter that two modules share (a tied head) is held only in the modules for which this was
    called: call it for both.

    Args:
        module: The module, changed in place.
        name: Its parameter, whose present value becomes W0.
        level: Where to hold the norm of the update, in units of θ_c.
        threshold: θ_c, if it is known; else it is measured.

    Returns:
        The module.

    Raises:
        InputError: If the parameter is not a matrix, is not in memory, is held already, or has no
            threshold, or if ``level`` is not positive or beyond 10.

    Warns:
        UserWarning: When a state is made, if another module shares the parameter and does not hold
            it: that module is trained without a bound, but stored with the held weight.

    Example:
        >>> layer = nn.Linear(40, 50)
        >>> W0 = layer.weight.detach().clone()
        >>> _ = hold_update(layer, level=0.5, threshold=2.0)
        >>> _ = layer.parametrizations.weight.original.data.add_(1.0)
        >>> round(float(torch.linalg.matrix_norm(layer.weight.detach() - W0, 2)), 3)
        1.0
    """
    check_level("hold_update", level)
    check_values("hold_update", name=(name, TEXT), threshold=(threshold, optional(POSITIVE)))
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise InputError(f"expected a matrix {name!r} in {type(module).__name__}")
    if any(isinstance(x, UpdateCap) for x in _parametrizations(module, name)):
        raise InputError(
            f"expected a parameter that hold_update does not hold yet, got {name!r} of "
            f"{type(module).__name__}, which it holds; remove the first with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    require_in_memory(name, weight)
    if threshold is None:
        threshold = base_spectrum(name, Dense(weight.detach().float())).fit.threshold
    if not threshold > 0:
        raise InputError(f"{name}: expected a positive threshold, got {threshold}")
    parametrize.register_parametrization(module, name, UpdateCap(weight, level * threshold))
    module.register_state_dict_post_hook(partial(_store_plain, name))
    module.register_load_state_dict_pre_hook(partial(_load_plain, name))
    return module


def _store_plain(
    name: str, module: nn.Module, state: dict[str, Any], prefix: str, _: Any = None
) -> None:
    """Replace the entries of the parametrization in a state by the held weight."""
    parametrization = _parametrization_of(module, name)
    if parametrization is None:
        return
    inner = f"{prefix}parametrizations.{name}."
    original = state[f"{inner}original"]
    for key in [key for key in state if key.startswith(inner)]:
        del state[key]
    held = state[f"{prefix}{name}"] = _held_weight(parametrization)
    for key, value in state.items():
        if isinstance(value, Tensor) and storage_key(value) == storage_key(original):
            state[key] = held
            warnings.warn(
                f"{key} shares its parameter with {prefix}{name}, which hold_update holds, and is "
                "not held itself: it is stored as held; apply hold_update to both modules",
                stacklevel=2,
            )


def _load_plain(name: str, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load the weight of a state as the trained weight; the base stays."""
    key, inner = f"{prefix}{name}", f"{prefix}parametrizations.{name}."
    parametrization = _parametrization_of(module, name)
    if key not in state or parametrization is None:
        return
    state |= parametrization.state_dict(prefix=inner) | {f"{inner}original": state.pop(key)}


def _parametrizations(module: Any, name: str) -> Any:
    """What computes a parameter: a ``ParametrizationList``, or an empty tuple."""
    return module.parametrizations[name] if parametrize.is_parametrized(module, name) else ()


def _parametrization_of(module: nn.Module, name: str) -> Any:
    """The parametrizations of a parameter, if an :class:`UpdateCap` is the only one; else None."""
    found = _parametrizations(module, name)
    return found if len(found) == 1 and isinstance(found[0], UpdateCap) else None


def _held_weight(parametrization: Any) -> Tensor:
    """The held weight, spread over processes as the trained weight is."""
    original = parametrization.original
    with torch.no_grad():
        return distribute_like(parametrization[0](gathered(original)), original).detach()
