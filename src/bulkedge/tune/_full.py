"""Weights that are trained in full, each with a copy of its base."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bulkedge._errors import InputError
from bulkedge._fields import check_values, instance
from bulkedge._linmap import Difference, LinearMap
from bulkedge.rmt.empirical_bulk import MIN_VALUES
from bulkedge.triplet import GolubKahan, singular_triplet

from ._matrix import (
    distribute_like,
    frozen_map,
    gathered,
    is_distributed,
    product_dtype,
    require_in_memory,
)
from ._select import select

LEADING = 16
"""How many singular values of a dense update are computed."""
PARAMETRIZED = re.compile(r"parametrizations\.([^.]+)\.original$")
"""The name of a parameter from which a parametrization computes a weight."""


class FullMatrix:
    """A weight that is trained in full, with a copy of its base.

    Args:
        name: The name of the parameter.
        base: W0 as it acts on inputs, a copy, shape ``(m, n)`` = (out, in); it may lie on the CPU,
            and is moved when it is used.
        weight: The parameter, or a view of it, in the same orientation.

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

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype in which the base is stored, whose rounding is no bulk."""
        return self.base.dtype

    def difference(self) -> Tensor:
        """``W − W0``, differentiable in W, in the dtype of products; for whole weights."""
        weight = self._in_memory()
        dtype = product_dtype(weight.dtype)
        return gathered(weight).to(dtype) - gathered(self._base_beside(weight)).to(dtype)

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
        base: W0 as the layer stores it: ``(n, m)`` in a ``Conv1D`` of transformers.
    """

    def __init__(self, model: nn.Module, name: str, base: Tensor) -> None:
        self._model = model
        self._transposed = _stores_transposed(model, name)
        self.name, self.base = name, self._acting(base)
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
        _require_shape(self, self._acting(found))
        return self._acting(found)

    @property
    def has_trained_bias(self) -> bool:
        """Whether the bias of its layer is trained besides."""
        bias = find_weight(self._model, f"{self.name.rpartition('.')[0]}.bias".removeprefix("."))
        return bias is not None and bias.requires_grad

    def _acting(self, stored: Tensor) -> Tensor:
        """A weight in the orientation in which it acts on inputs, ``(m, n)``."""
        return stored.mT if self._transposed and stored.ndim == 2 else stored


def full_matrices(
    model: nn.Module,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    *,
    base: Mapping[str, Tensor] | None = None,
) -> list[FullMatrix]:
    """The weights of a model that are trained in full, each with a copy of its present value.

    A weight is found by its name at every use.  One that :func:`hold_update` holds is watched as
    the model uses it, which is the held weight.

    Args:
        model: The model, before it is trained.
        include: Patterns of parameter names.
        exclude: Patterns of the names of those that are left out.
        base: The weights before training, by name, if the model has been trained already (a run
            that is resumed): the ``state_dict()`` of the model from which the run began.

    Returns:
        One entry for each trainable matrix, but for embeddings and for matrices with fewer than
        twelve rows or columns (small heads), which have no bulk.

    Raises:
        InputError: If a weight is missing in ``base``, or has another shape there; at a later use,
            if a weight is gone or has another shape.
        RecipeError: If a pattern matches no weight.

    Example:
        >>> model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 2))
        >>> [(matrix.name, matrix.shape) for matrix in full_matrices(model)]
        [('0.weight', (30, 40))]
    """
    check_values("full_matrices", model=(model, instance(nn.Module, "a module")))
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    names = [
        PARAMETRIZED.sub(r"\1", name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.ndim == 2
        and min(parameter.shape) >= MIN_VALUES
        and id(parameter) not in embeddings
    ]
    used = select(names, str, include, exclude)
    return [NamedWeight(model, name, _base_of(model, name, base)) for name in used]


def _base_of(model: nn.Module, name: str, base: Mapping[str, Tensor] | None) -> Tensor:
    """The base of a weight: a copy of it, or what the caller gives, spread as the weight is."""
    with torch.no_grad():
        weight = find_weight(model, name)
    if base is None and weight is not None:
        return require_in_memory(name, weight).detach().clone()
    known = (base or {}).get(name)
    if weight is None or known is None or known.shape != weight.shape:
        found = "nothing" if known is None else tuple(known.shape)
        expected = None if weight is None else tuple(weight.shape)
        raise InputError(
            f"{name}: expected its base of shape {expected} in base=, got {found}; give the "
            "state_dict() of the model that training began with"
        )
    return distribute_like(known.detach(), weight)


def find_weight(model: nn.Module, name: str) -> Tensor | None:
    """A parameter by its name, as a parametrization computes it; None if there is none."""
    path, _, last = name.rpartition(".")
    try:
        found = getattr(model.get_submodule(path), last)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None


def _stores_transposed(model: nn.Module, name: str) -> bool:
    """Whether a weight is stored as (in, out): GPT-2's ``Conv1D`` does that."""
    path = name.rpartition(".")[0]
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        return False
    # a parametrization and FSDP2 each derive a class of another name
    return any(kind.__name__ == "Conv1D" for kind in type(layer).__mro__)


def _require_shape(matrix: FullMatrix, weight: Tensor) -> None:
    """InputError unless a weight has the shape of its base."""
    if weight.ndim != 2 or weight.shape != matrix.base.shape:
        raise InputError(
            f"{matrix.name}: expected a weight of the shape of its base, "
            f"{tuple(matrix.base.shape)}, got {tuple(weight.shape)}; build this again after the "
            "model is changed"
        )
