"""Weights that are trained in full, each with a copy of its base."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bulkedge._errors import InputError
from bulkedge._linmap import Difference, LinearMap
from bulkedge.triplet import GolubKahan, singular_triplet

from ._matrix import distribute_like, frozen_map, is_distributed, product_dtype, require_in_memory

LEADING = 16
"""How many singular values of a dense update are computed."""


class FullMatrix:
    """A weight that is trained in full, with a copy of its base.

    Args:
        name: The name of the parameter.
        base: W0, a copy, shape ``(m, n)``; it may lie on the CPU, and is moved when it is used.
        weight: The parameter, or a view of it.

    Raises:
        InputError: If the two differ in shape.

    Example:
        >>> weight = torch.eye(3)
        >>> matrix = FullMatrix("weight", torch.zeros(3, 3), weight)
        >>> [round(float(strength), 3) for strength in matrix.strengths]
        [1.0, 1.0, 1.0]
    """

    def __init__(self, name: str, base: Tensor, weight: Tensor) -> None:
        self.name, self.base, self._weight = name, base, weight
        _require_shape(self, weight)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.shape[0]}×{self.shape[1]})"

    @property
    def weight(self) -> Tensor:
        """The present weight W."""
        return self._weight

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self.base.shape[0], self.base.shape[1]

    @property
    def strengths(self) -> Tensor:
        """The leading singular values of ``W − W0``."""
        weight = self._in_memory()
        base = self._base_beside(weight)
        if is_distributed(weight):
            update = frozen_map(weight.detach() - base, product_dtype(weight.dtype))
        else:
            update = Difference(weight.detach(), base, product_dtype(weight.dtype))
        found = singular_triplet(
            update, min(LEADING, *self.shape), solver=GolubKahan(rtol=1e-2), strict=False
        )
        return found.sigma.double()

    def base_map(self) -> LinearMap:
        """W0 as a map, with products in float32, or in float64 if the weight is in float64."""
        weight = self._in_memory()
        return frozen_map(self._base_beside(weight), product_dtype(weight.dtype))

    def tuned_map(self) -> LinearMap:
        """W as a map, with products in the same dtype."""
        weight = self._in_memory()
        return frozen_map(weight, product_dtype(weight.dtype))

    def _in_memory(self) -> Tensor:
        return require_in_memory(self.name, self.weight)

    def _base_beside(self, weight: Tensor) -> Tensor:
        """W0 on the device of the weight, spread over processes as the weight is."""
        base = self.base if is_distributed(self.base) else self.base.to(weight.device)
        return distribute_like(base, weight)


class NamedWeight(FullMatrix):
    """A weight of a model, found by its name whenever it is used.

    Args:
        model: The model.
        name: The name of the parameter, or of the weight that a parametrization computes.
        base: W0, shape ``(m, n)``.
    """

    def __init__(self, model: nn.Module, name: str, base: Tensor) -> None:
        self._model = model
        self.name, self.base = name, base
        self.weight  # noqa: B018 — raises if it does not fit

    @property
    def weight(self) -> Tensor:
        """The present weight W; InputError if it is gone or has another shape."""
        found = find_weight(self._model, self.name)
        if found is None:
            raise InputError(
                f"{self.name}: expected the weight that was found when this was built, got no such "
                "parameter; build it again after the model is changed"
            )
        _require_shape(self, found)
        return found


def find_weight(model: nn.Module, name: str) -> Tensor | None:
    """A parameter by its name, as a parametrization computes it; None if there is none."""
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


def _product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which products with a weight are computed."""
    return torch.float64 if weight.dtype is torch.float64 else torch.float32
