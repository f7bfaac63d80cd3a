"""An adapted matrix: a frozen base W0 and two factors, ``W = W0 + s·B·A``."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._linmap import Dense, LinearMap, LowRank, Sum, Widened
from bulkedge.update import UpdateSVD, update_svd


def _one() -> float:
    return 1.0


class AdaptedMatrix:
    """A frozen base and the factors that are trained on top of it, ``W = W0 + s·B·A``.

    Of the two factors the one that requires a gradient is changed by what holds updates; where
    neither does, both are.

    Args:
        name: Of the module, for messages and records.
        base: W0, shape ``(m, n)``: a view of what the model holds.
        A: Shape ``(r, n)``, the trained parameter or a view of it.
        B: Shape ``(m, r)``, the trained parameter or a view of it.
        scaling: What s is now: a schedule or a controller may move it.

    Raises:
        InputError: If the three do not fit together.
    """

    name: str
    scaling: Callable[[], float]

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
        """W0, shape ``(m, n)``."""
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
        """B and A as they are trained; those of a convolution have more dimensions."""
        return self._B, self._A

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
        """The scale s as it is now.

        Raises:
            InputError: If it is not finite.
        """
        scale = float(self.scaling())
        if not math.isfinite(scale):
            raise InputError(f"{self.name}: expected a finite scaling, got {scale}")
        return scale

    def base_map(self) -> LinearMap:
        """W0, with products in float32, or in float64 if it is stored so."""
        return frozen_map(self.base, self.dtype)

    def update_map(self) -> LowRank:
        """``s·B·A``, differentiable in both factors."""
        B, A = (whole(x.flatten(1)).to(self.dtype) for x in self.in_memory())
        return LowRank(B, A, self.scale)

    def tuned_map(self) -> LinearMap:
        """``W0 + s·B·A``, differentiable in both factors."""
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
        """InputError unless the model computes with these factors, and in the plain way."""

    def settle(self) -> None:
        """Have the parameters be those that are trained, before they are read or written."""

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """B and A without their history, whole where they are spread over processes."""
        self.settle()
        B, A = (whole(x.detach().flatten(1)) for x in self.in_memory())
        return B, A

    def write(self, B: Tensor, A: Tensor) -> None:
        """Put other numbers into the factors that are trained; a frozen one stays what it is.

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
        """The singular values of the update, descending, float64, shape ``(≤ r,)``."""
        return self.spikes().gamma

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products."""
        return torch.float64 if self._base.dtype is torch.float64 else torch.float32

    def in_memory(self) -> tuple[Tensor, Tensor]:
        """The parameters; InputError where they have no numbers."""
        B, A = self.parameters
        return require_in_memory(self.name, B), require_in_memory(self.name, A)


def require_in_memory(name: str, x: Tensor) -> Tensor:
    """``x``; InputError if it is on the meta device, where a tensor has no numbers."""
    if x.is_meta:
        raise InputError(
            f"{name}: expected parameters in memory, got one on the meta device; load the weights "
            "first, then build what works on them"
        )
    return x


def storage_of(x: Tensor) -> object:
    """What two tensors have in common that are one parameter, or views of one."""
    if is_distributed(x):  # what all processes agree on: a part of it may be empty in some
        return id(x)
    return x.device, x.untyped_storage().data_ptr(), x.storage_offset()


def like(W: LinearMap, vectors: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """Vectors of an earlier look, in the dtype and on the device of a map as it is now."""
    return (
        None
        if vectors is None
        else (vectors[0].to(W.device, W.dtype), vectors[1].to(W.device, W.dtype))
    )


def frozen_map(weight: Tensor, dtype: torch.dtype) -> LinearMap:
    """A weight as a map with products in ``dtype``; one spread over processes stays so."""
    weight = weight.detach()
    if type(weight) is not Tensor and is_distributed(weight):
        from .sharded import sharded_map

        return sharded_map(weight, dtype)  # pyright: ignore[reportArgumentType]
    return Dense(weight) if weight.dtype == dtype else Widened(weight, dtype)


def is_distributed(x: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return hasattr(x, "full_tensor")


def spread_like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor as one that is spread over processes as another is."""
    if not is_distributed(target) or is_distributed(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = target.device_mesh, target.placements  # pyright: ignore
    return distribute_tensor(value.to(target.device), mesh, placements)


def whole(x: Tensor) -> Tensor:
    """A thin tensor, gathered if it is spread over processes."""
    return x.full_tensor() if is_distributed(x) else x  # pyright: ignore


def _assign(target: Tensor, value: Tensor) -> None:
    """Write into a tensor, or each process its part of it."""
    target.copy_(spread_like(value, target))
