"""An adapted matrix: a frozen base W0 and two factors, ``W = W0 + s·B·A``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._linmap import Dense, LinearMap, LowRank, Sum
from bulkedge.update import UpdateSVD, update_svd

SEVERAL, DORA, IN_FULL = "several active adapters", "DoRA", "a weight that is trained in full"
"""The forms of a matrix that are not ``W0 + s·B·A`` of two factors."""


def _one() -> float:
    return 1.0


class AdaptedMatrix:
    """A frozen base and the factors that are trained on top of it, ``W = W0 + s·B·A``.

    A holder changes the factors that require a gradient; if neither does, it may change both.

    Args:
        name: The name of the module, for messages and records.
        base: W0, shape ``(m, n)``: a view of what the model holds.
        A: Shape ``(r, n)``, the trained parameter or a view of it.
        B: Shape ``(m, r)``, the trained parameter or a view of it.
        scaling: Returns the present scale s, which a schedule may change.

    Raises:
        InputError: If the shapes of the three do not fit together.

    Example:
        >>> W0, B, A = torch.zeros(4, 3), torch.ones(4, 1), torch.ones(1, 3)
        >>> matrix = AdaptedMatrix("layer", W0, A, B, scaling=lambda: 0.5)
        >>> matrix, matrix.update_map().to_dense()[0].tolist()
        (AdaptedMatrix('layer', 4×3, rank 1), [0.5, 0.5, 0.5])
    """

    name: str
    scaling: Callable[[], float]
    form: str | None = None
    """What it is, for messages, if it is more than ``W0 + s·B·A`` of two factors; else None."""
    side: Literal["left", "right"] = "left"
    """Which singular vectors an audit judges at its defaults: of a table those of its rows."""
    keeps_lookups: bool = False
    """Whether it is found in its model once, as in :func:`looked_up_once`."""

    def __init__(
        self, name: str, base: Tensor, A: Tensor, B: Tensor, scaling: Callable[[], float] = _one
    ) -> None:
        self.name, self.scaling = name, scaling
        self._base, self._A, self._B = base, A, B
        shapes = [tuple(x.shape) for x in (base, B, A)]
        fits = all(len(shape) == 2 for shape in shapes)
        if not fits or shapes[0] != (shapes[1][0], shapes[2][1]) or shapes[1][1] != shapes[2][0]:
            raise InputError(
                f"{name}: expected W0 (m, n), B (m, r), A (r, n), got {shapes[0]}, {shapes[1]}, "
                f"{shapes[2]}"
            )
        if odd := [x.dtype for x in (base, B, A) if not x.is_floating_point()]:
            raise InputError(f"{name}: expected real floating-point tensors, got {odd[0]}")

    def __repr__(self) -> str:
        m, n = self.shape
        return f"{type(self).__name__}({self.name!r}, {m}×{n}, rank {self.rank})"

    @property
    def base(self) -> Tensor:
        """The frozen base W0, shape ``(m, n)``."""
        return self._base

    @property
    def A(self) -> Tensor:
        """The factor A as it is now, shape ``(r, n)``."""
        return self.parameters[1].flatten(1)

    @property
    def B(self) -> Tensor:
        """The factor B as it is now, shape ``(m, r)``."""
        return self.parameters[0].flatten(1)

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        """B and A in the shapes in which they are trained; convolutions have more dimensions."""
        return self._B, self._A

    @property
    def leaves(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What B and A are made of, as it is trained; several where adapters are added up."""
        B, A = self.parameters
        return (B,), (A,)

    @property
    def trained(self) -> tuple[bool, bool]:
        """Whether B and A may be changed."""
        B, A = (x.requires_grad for x in self.parameters)
        return (B, A) if B or A else (True, True)

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self._base.shape[0], self._base.shape[1]

    @property
    def rank(self) -> int:
        """The rank r of the factors."""
        return self.parameters[1].shape[0]

    @property
    def scale(self) -> float:
        """The present scale s.

        Raises:
            InputError: If it is not finite.
        """
        scale = float(self.scaling())
        if not math.isfinite(scale):
            raise InputError(f"{self.name}: expected a finite scaling, got {scale}")
        return scale

    def base_map(self) -> LinearMap:
        """W0 as a map, with products in float32, or in float64 if it is stored in float64."""
        return frozen_map(self.base, self.dtype)

    def update_map(self) -> LowRank:
        """``s·B·A`` as a map, differentiable in both factors."""
        B, A = (gathered(x.flatten(1)).to(self.dtype) for x in self.in_memory())
        return LowRank(B, A, self.scale)

    def tuned_map(self) -> LinearMap:
        """``W0 + s·B·A`` as a map, differentiable in both factors."""
        return Sum([self.base_map(), self.update_map()])

    def spikes(self) -> UpdateSVD:
        """The singular triplets of the update, in float64; O((m + n) r²).

        Returns:
            Strengths and vectors.

        Raises:
            InputError: If the factors are not finite.
        """
        try:
            return update_svd(*self.factors, self.scale, self.shape)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error

    def check(self) -> None:
        """InputError unless the model computes ``W0 + s·B·A`` with these factors."""

    def keep_lookups(self, keep: bool) -> None:
        """Find the parameters once from now on, or at every use again."""

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype in which the base is stored, whose rounding is no bulk."""
        return self._base.dtype

    @property
    def bias_beside(self) -> str | None:
        """A bias that is trained besides the factors, for messages; None if there is none."""
        return None

    def prepare_factors(self) -> None:
        """Called before the parameters are read or written: see that they are the trained ones."""

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """B and A, detached, and gathered if they are spread over processes."""
        self.prepare_factors()
        B, A = (gathered(_as_matrix(x.detach())) for x in self.in_memory())
        return B, A

    def write(self, B: Tensor, A: Tensor) -> None:
        """Overwrite the factors that are trained; a frozen factor stays as it is.

        Args:
            B: Shape ``(m, r)``.
            A: Shape ``(r, n)``.
        """
        with torch.no_grad():
            for parameter, value, trained in zip(
                self.parameters, (B, A), self.trained, strict=True
            ):
                if trained:
                    value = value.to(parameter.dtype).reshape(parameter.shape)
                    _assign(parameter.detach(), value)

    @property
    def strengths(self) -> Tensor:
        """The singular values of the update, descending, float64; of a dense one the leading."""
        return self.spikes().gamma

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which products are computed."""
        return product_dtype(self._base.dtype)

    def in_memory(self) -> tuple[Tensor, Tensor]:
        """The parameters; InputError if they are on the meta device."""
        B, A = self.parameters
        return require_in_memory(self.name, B), require_in_memory(self.name, A)


@contextmanager
def looked_up_once(matrices: Sequence[Any]) -> Iterator[None]:
    """Find each matrix in its model once while this lasts: within a step a model does not change.

    Args:
        matrices: Any that are held; those that are not adapted are left alone.

    Yields:
        Nothing.
    """
    adapted = [x for x in matrices if isinstance(x, AdaptedMatrix) and not x.keeps_lookups]
    try:
        for matrix in adapted:
            matrix.keeps_lookups = True
            matrix.keep_lookups(True)
        yield
    finally:
        for matrix in adapted:
            matrix.keeps_lookups = False
            matrix.keep_lookups(False)


def _as_matrix(x: Tensor) -> Tensor:
    """A factor with two dimensions; convolutions have more."""
    return x if x.ndim == 2 else x.flatten(1)


def product_dtype(stored: torch.dtype) -> torch.dtype:
    """The dtype in which products with a weight are computed: float32, or float64 if stored so."""
    return torch.float64 if stored is torch.float64 else torch.float32


def require_in_memory(name: str, x: Tensor) -> Tensor:
    """``x`` itself; InputError if it is on the meta device, where a tensor has no values."""
    if x.is_meta:
        raise InputError(
            f"{name}: expected parameters in memory, got one on the meta device; load the weights "
            "first, then build what works on them"
        )
    return x


def storage_key(x: Tensor) -> object:
    """A key that is equal for two tensors that are the same parameter, or views of one."""
    if is_distributed(x):  # a process may hold an empty part, whose address says nothing
        return id(x)
    return x.device, x.data_ptr()


def like(W: LinearMap, vectors: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """Vectors of an earlier solve, in the present dtype and on the present device of a map."""
    return (
        None
        if vectors is None
        else (vectors[0].to(W.device, W.dtype), vectors[1].to(W.device, W.dtype))
    )


def frozen_map(weight: Tensor, dtype: torch.dtype) -> LinearMap:
    """A weight as a map with products in ``dtype``; one that is spread over processes stays so."""
    weight = weight.detach()
    if type(weight) is not Tensor and is_distributed(weight):
        from .sharded import sharded_map

        return sharded_map(weight, dtype)  # pyright: ignore[reportArgumentType]
    return Dense(weight).to(dtype)


def is_distributed(x: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return hasattr(x, "full_tensor")


def distribute_like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, spread over processes in the way in which ``target`` is."""
    if not is_distributed(target) or is_distributed(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = target.device_mesh, target.placements  # pyright: ignore
    return distribute_tensor(value.to(target.device), mesh, placements)


def gathered(x: Tensor) -> Tensor:
    """The whole tensor, gathered if it is spread over processes; for thin tensors."""
    return x.full_tensor() if is_distributed(x) else x  # pyright: ignore


def _assign(target: Tensor, value: Tensor) -> None:
    """Write into a tensor; if it is spread over processes, each writes its own part."""
    target.copy_(distribute_like(value, target))
