"""Weights that are trained in full, and what they were."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bulkedge._errors import InputError
from bulkedge._linmap import Difference, LinearMap
from bulkedge.triplet import GolubKahan, singular_triplet

from ._matrix import frozen_map, is_distributed, require_in_memory, spread_like

LEADING = 16
"""How many singular values of a dense update are looked at."""


class FullMatrix:
    """A weight that is trained in full, and what it was.

    Args:
        name: Of the parameter.
        base: W0, a copy, shape ``(m, n)``; it may lie on the CPU, and is moved when it is used.
        weight: The parameter, or a view of it.

    Raises:
        InputError: If the two differ in shape.
    """

    def __init__(self, name: str, base: Tensor, weight: Tensor) -> None:
        self.name, self.base, self._weight = name, base, weight
        _require_shape(self, weight)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.shape[0]}×{self.shape[1]})"

    @property
    def weight(self) -> Tensor:
        """W as it is now."""
        return self._weight

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self.base.shape[0], self.base.shape[1]

    @property
    def strengths(self) -> Tensor:
        """The leading singular values of ``W − W0``."""
        weight = self._now()
        base = self._base_beside(weight)
        if is_distributed(weight):
            update = frozen_map(weight.detach() - base, _products(weight))
        else:
            update = Difference(weight.detach(), base, _products(weight))
        found = singular_triplet(
            update, min(LEADING, *self.shape), solver=GolubKahan(rtol=1e-2), strict=False
        )
        return found.sigma.double()

    def base_map(self) -> LinearMap:
        """W0, with products in float32, or in float64 if the weight is stored so."""
        weight = self._now()
        return frozen_map(self._base_beside(weight), _products(weight))

    def tuned_map(self) -> LinearMap:
        """W, with products in the same."""
        weight = self._now()
        return frozen_map(weight, _products(weight))

    def _now(self) -> Tensor:
        return require_in_memory(self.name, self.weight)

    def _base_beside(self, weight: Tensor) -> Tensor:
        """W0 where the weight is, spread over processes as it is."""
        base = self.base if is_distributed(self.base) else self.base.to(weight.device)
        return spread_like(base, weight)


class NamedWeight(FullMatrix):
    """A weight of a model, found by its name whenever it is used.

    Args:
        model: The model.
        name: Of the parameter; of the weight, where a parametrization computes it.
        base: W0, shape ``(m, n)``.
    """

    def __init__(self, model: nn.Module, name: str, base: Tensor) -> None:
        self._model = model
        self.name, self.base = name, base
        self.weight  # noqa: B018 — raises where it does not fit

    @property
    def weight(self) -> Tensor:
        """W as it is now; InputError if it is gone or has another shape."""
        found = weight_of(self._model, self.name)
        if found is None:
            raise InputError(
                f"{self.name}: expected the weight that was found when this was built, got no such "
                "parameter; build it again after the model is changed"
            )
        _require_shape(self, found)
        return found


def weight_of(model: nn.Module, name: str) -> Tensor | None:
    """A parameter by its name, or what a parametrization makes of it; None if there is none."""
    path, _, last = name.rpartition(".")
    try:
        found = getattr(model.get_submodule(path), last)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None


def _require_shape(matrix: FullMatrix, weight: Tensor) -> None:
    """InputError unless a weight has the shape of its base."""
    if weight.ndim != 2 or weight.shape != matrix.base.shape:
        raise InputError(
            f"{matrix.name}: expected a weight of the shape of its base, "
            f"{tuple(matrix.base.shape)}, got {tuple(weight.shape)}; build this again after the "
            "model is changed"
        )


def _products(weight: Tensor) -> torch.dtype:
    """The dtype of products."""
    return torch.float64 if weight.dtype is torch.float64 else torch.float32
