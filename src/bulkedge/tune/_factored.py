"""Adapters whose update is of low rank and has no factors that are trained: spectral ones.

They can be watched, not held.  Their layers are known by what they have, since the module with
their classes needs PEFT.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bulkedge._linmap import LinearMap, LowRank, Sum
from bulkedge.update import update_svd

from ._matrix import frozen_map, product_dtype


class FactoredMatrix:
    """A layer with updates ``X Yᵀ``, watched by its path.

    Args:
        model: The model.
        name: The path of the layer.
        adapter: Which adapter; all active ones together if None.
    """

    form = "a spectral adapter"
    side = "left"

    def __init__(self, model: nn.Module, name: str, adapter: str | None) -> None:
        self.name, self._model, self._adapter = name, model, adapter

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        layer = self._layer()
        return layer.out_features, layer.in_features

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype in which the base is stored, whose rounding is no bulk."""
        return self._layer()._weight.dtype

    @property
    def strengths(self) -> Tensor:
        """The singular values of the update, descending, float64."""
        update = self._update()
        return update_svd(update.B, update.A, 1.0, self.shape).gamma

    def base_map(self) -> LinearMap:
        """W0 as a map."""
        weight = self._layer()._weight
        return frozen_map(weight, product_dtype(weight.dtype))

    def tuned_map(self) -> LinearMap:
        """``W0 + X Yᵀ`` as a map."""
        base = self.base_map()
        return Sum([base, self._update().to(base.dtype)])

    def _update(self) -> LowRank:
        layer = self._layer()
        pairs = [layer.factors(name) for name in _adapters(layer, self._adapter)]
        with torch.no_grad():
            X, Y = (torch.cat([x.detach() for x in s], dim=1) for s in zip(*pairs, strict=True))
        return LowRank(X, Y.mT, 1.0)

    def _layer(self) -> Any:
        return self._model.get_submodule(self.name)


def factored_candidates(
    model: nn.Module, adapter: str | None
) -> list[tuple[str, Callable[[], FactoredMatrix]]]:
    """The layers of such adapters by name, each as a function that makes its matrix.

    Args:
        model: The model.
        adapter: Which adapter; all active ones together if None.

    Returns:
        Names and functions, in the order of the model.
    """
    return [
        (name, functools.partial(FactoredMatrix, model, name, adapter))
        for name, layer in model.named_modules()
        if _is_factored(layer) and _adapters(layer, adapter)
    ]


def _is_factored(layer: Any) -> bool:
    return callable(getattr(layer, "factors", None)) and hasattr(layer, "buffer_names")


def _adapters(layer: Any, adapter: str | None) -> list[str]:
    known = [adapter] if adapter is not None else layer.active_adapters
    return [name for name in known if name in layer.settings]
