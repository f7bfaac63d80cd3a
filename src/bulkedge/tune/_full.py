"""Weights that are trained in full, each with a copy of its base."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bulkedge._errors import InputError
from bulkedge._fields import check_values, instance
from bulkedge._linmap import Difference, LinearMap
from bulkedge._precision import exact
from bulkedge.rmt.empirical_bulk import MIN_VALUES
from bulkedge.triplet import GolubKahan, singular_triplet

from ._matrix import (
    IN_FULL,
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
TO_SAVE = re.compile(r"\.modules_to_save\.[^.]+\.")
"""What PEFT puts into the name of a module that it trains in full beside an adapter."""


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

    form = IN_FULL
    """See :attr:`AdaptedMatrix.form`."""
    side = "left"
    """See :attr:`AdaptedMatrix.side`."""

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
        solver = GolubKahan(rtol=1e-2)
        update = self.difference_map()
        found = singular_triplet(update, min(LEADING, *self.shape), solver=solver, strict=False)
        return exact(found.sigma)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype in which the base is stored, whose rounding is no bulk."""
        return self.base.dtype

    @property
    def leaves(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The parameter, or a view of it; see :attr:`AdaptedMatrix.leaves`."""
        return (self.weight,), ()

    @property
    def trained(self) -> tuple[bool, bool]:
        """Whether the weight is trained; see :attr:`AdaptedMatrix.trained`."""
        return self.weight.requires_grad, False

    def check(self) -> None:
        """InputError unless the weight is there, with the shape of its base."""
        self.weight  # noqa: B018 — raises

    def prepare_factors(self) -> None:
        """Nothing: a weight is written where it is found."""

    def in_memory(self) -> Tensor:
        """The weight; InputError if it is on the meta device."""
        return require_in_memory(self.name, self.weight)

    def difference_map(self) -> LinearMap:
        """``W − W0`` as a map."""
        weight = self.in_memory()
        base, dtype = self._base_beside(weight), product_dtype(weight.dtype)
        if is_distributed(weight):
            return frozen_map(weight.detach() - base, dtype)
        return Difference(weight.detach(), base, dtype)

    def subtract(self, X: Tensor, Y: Tensor) -> None:
        """``W ← W − X Yᵀ``, rounded once to the dtype of the weight.

        Args:
            X: Shape ``(m, k)``.
            Y: Shape ``(n, k)``.

        Raises:
            InputError: If the weight is frozen.
        """
        if not self.trained[0]:
            raise InputError(
                f"{self.name}: expected a weight that is trained, got a frozen one beyond its "
                "limit; leave it out with exclude="
            )
        weight = self.in_memory().detach()
        change = distribute_like(X @ Y.mT, weight)
        with torch.no_grad():
            weight.copy_((weight.to(change.dtype) - change).to(weight.dtype))

    def difference(self) -> Tensor:
        """``W − W0``, differentiable in W, in the dtype of products; for whole weights."""
        weight = self.in_memory()
        dtype = product_dtype(weight.dtype)
        return gathered(weight).to(dtype) - gathered(self._base_beside(weight)).to(dtype)

    def base_map(self) -> LinearMap:
        """W0 as a map, with products in float32, or in float64 if the weight is in float64."""
        weight = self.in_memory()
        return frozen_map(self._base_beside(weight), product_dtype(weight.dtype))

    def tuned_map(self) -> LinearMap:
        """W as a map, with products in the same dtype."""
        weight = self.in_memory()
        return frozen_map(weight, product_dtype(weight.dtype))

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
        copied: Whether it is a copy of the value that the weight had when this was built.
    """

    def __init__(self, model: nn.Module, name: str, base: Tensor, *, copied: bool = False) -> None:
        self._model, self.copied = model, copied
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
    names = [PARAMETRIZED.sub(r"\1", name) for name in trained_weights(model)]
    used = select(names, str, include, exclude)
    return [full_matrix(model, name, base) for name in used]


def full_matrix(model: nn.Module, name: str, base: Mapping[str, Tensor] | None) -> FullMatrix:
    """One weight that is trained in full, with its base; see :func:`full_matrices`.

    Args:
        model: The model.
        name: Of the weight.
        base: The weights before training by name, or None.

    Returns:
        The matrix.
    """
    kept = original_name(name) != name and find_weight(model, original_name(name)) is not None
    copied = base is None and not kept
    return NamedWeight(model, name, _base_of(model, name, base), copied=copied)


def trained_weights(model: nn.Module, *, embeddings: bool = False) -> list[str]:
    """The matrices that are trained in full, as the model names them: no factors of adapters.

    Args:
        model: The model.
        embeddings: Whether embeddings are among them.

    Returns:
        Names.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    factors = {id(x) for m in model.modules() if is_adapter(m) for x in _own(m)}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.ndim == 2
        and min(parameter.shape) >= MIN_VALUES
        and (embeddings or id(parameter) not in tables)
        and id(parameter) not in factors
    ]


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is a layer of PEFT, with a base and adapters."""
    return hasattr(module, "get_base_layer") and hasattr(module, "adapter_layer_names")


def _own(layer: Any) -> list[Tensor]:
    """The parameters of the adapters of a layer of PEFT, without its base."""
    return [x for name, x in layer.named_parameters() if not name.startswith("base_layer.")]


def original_name(name: str) -> str:
    """The name of the frozen original that PEFT keeps of a weight of ``modules_to_save``.

    Args:
        name: Such as ``head.modules_to_save.default.weight``.

    Returns:
        ``head.original_module.weight``; the name itself for any other.
    """
    return TO_SAVE.sub(".original_module.", name)


def _base_of(model: nn.Module, name: str, base: Mapping[str, Tensor] | None) -> Tensor:
    """The base of a weight: a copy of it, what PEFT or the caller has, spread as the weight is."""
    with torch.no_grad():
        weight = find_weight(model, name)
        kept = find_weight(model, original_name(name)) if original_name(name) != name else None
    if kept is not None and weight is not None and kept.shape == weight.shape:
        return kept.detach()
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
