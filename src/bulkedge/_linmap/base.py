"""What a linear map is: products with thin blocks, the tensors it is made of, and arithmetic."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, Union

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import as_real
from bulkedge._guard import require_strided
from bulkedge._precision import converted, exact

from .products import check_members, gradients_by_matmat

TILE_ENTRIES = 2**19
"""So many numbers are widened together: they stay in the cache."""

Gradients = tuple[Union[Tensor, None], ...]  # noqa: UP007 — evaluated on Python 3.10


class LinearMap(ABC):
    """A real m×n matrix, known by its products with thin blocks.

    Attributes:
        shape: ``(m, n)``.
        dtype: The dtype of its products.
        device: Where its products live.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_members(cls)

    @abstractmethod
    def matmat(self, X: Tensor) -> Tensor:
        """The product ``W X`` for ``X`` of shape ``(n, b)``; one pass over the matrix."""

    @abstractmethod
    def rmatmat(self, Y: Tensor) -> Tensor:
        """The product ``Wᵀ Y`` for ``Y`` of shape ``(m, b)``; one pass over the matrix."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The matrix itself, shape ``(m, n)``: for tests, oracles and the last resort."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the map is made of: gradients go to these."""

    @abstractmethod
    def with_tensors(self, *tensors: Tensor) -> LinearMap:
        """The same map made of other tensors, in the order of :attr:`tensors`."""

    def pullback(self, L: Tensor, R: Tensor, needs: Sequence[bool] = ()) -> Gradients:
        """The gradient of ``tr(Lᵀ W R)``, one for each of :attr:`tensors`, itself differentiable.

        Args:
            L: Shape ``(m, b)``.
            R: Shape ``(n, b)``.
            needs: Which tensors' gradients are wanted; empty for all.

        Returns:
            Tensors shaped like those of the map, None for what is not wanted.

        Raises:
            InputError: By this default, if matmat has no derivative by a wanted tensor.
        """
        return gradients_by_matmat(self, L, R, needs)

    def pushforward(self, *tangents: Tensor) -> LinearMap:
        """The derivative of the map in the direction of ``tangents``, one for each tensor.

        This default takes it from :meth:`pullback`, for two to four products each.  A map that is
        linear in all its tensors together returns ``self.with_tensors(*tangents)`` for one.

        Returns:
            A map of the same shape.

        Raises:
            InputError: From its products, if the pullback has no derivative.
        """
        return _CLASSES["Tangent"](self, tangents)

    def to(self, dtype: torch.dtype) -> LinearMap:
        """The same map with products in another dtype.

        A matrix in memory is not copied: it is converted in each product, a tile at a time.
        Float64 products of a map on a device without float64 are on the CPU.

        Args:
            dtype: Of the products.

        Returns:
            A map of the same shape.
        """
        return self.with_tensors(*(converted(tensor, dtype) for tensor in self.tensors))

    def on(self, device: torch.device) -> LinearMap:
        """The same map with its products on a device.

        Args:
            device: Of the products.

        Returns:
            The map itself if they are there.
        """
        if self.device == device:
            return self
        return self.with_tensors(*(tensor.to(device) for tensor in self.tensors))

    def gram(self) -> Tensor:
        """``WᵀW``, shape ``(n, n)``; two products with all n unit vectors, a block at a time."""
        identity = torch.eye(self.shape[1], dtype=self.dtype, device=self.device)
        return torch.cat([self.rmatmat(self.matmat(e)) for e in identity.split(512, dim=1)], dim=1)

    def norm_bound(self) -> float:
        """An upper bound on ``‖W‖_F``: that of a matrix in memory, else no more than is cheap."""
        return frobenius(self.to_dense())

    def rounding_scale(self) -> float:
        """Bound on ``‖·‖_F`` of the sum of absolute values behind an entry of a product.

        The rounding error of a product grows with it: of ``B A`` it is ``‖B‖_F ‖A‖_F``, which
        may be far more than ``‖B A‖_F``.

        Returns:
            The bound; of a matrix in memory its Frobenius norm.
        """
        return self.norm_bound()

    def agreed(self, digest: bytes) -> bytes:
        """A digest of the tensors, the same in all processes that share the map.

        Args:
            digest: Of the tensors of this process.

        Returns:
            The digest itself, where the tensors are not spread over processes.
        """
        return digest

    @property
    def T(self) -> LinearMap:
        """The transposed map, shape ``(n, m)``."""
        return _CLASSES["Adjoint"](self)

    def __add__(self, other: MatrixLike) -> LinearMap:
        return _CLASSES["Sum"]([self, as_map(other)])

    def __radd__(self, other: MatrixLike | int) -> LinearMap:
        if isinstance(other, int):
            if other == 0:  # where sum() begins
                return self
            raise InputError(f"expected a map or a matrix to add to a map, got {other}")
        return as_map(other) + self

    def __neg__(self) -> LinearMap:
        return self * -1.0

    def __sub__(self, other: MatrixLike) -> LinearMap:
        return self + -as_map(other)

    def __rsub__(self, other: MatrixLike) -> LinearMap:
        return as_map(other) + -self

    def __mul__(self, factor: float) -> LinearMap:
        return _CLASSES["Scaled"](self, factor)

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> LinearMap:
        divisor = as_real(factor)
        if not divisor:
            raise InputError(f"expected a number other than 0 to divide by, got {factor!r}")
        return self * (1 / divisor)

    def __matmul__(self, X: Tensor) -> Tensor:
        """``W X`` for ``X`` of shape ``(n,)`` or ``(n, b)``."""
        self._check_factor(X, self.shape[1], first=True)
        return self.matmat(X[:, None])[:, 0] if X.ndim == 1 else self.matmat(X)

    def __rmatmul__(self, Y: Tensor) -> Tensor:
        """``Y W`` for ``Y`` of shape ``(m,)`` or ``(b, m)``."""
        self._check_factor(Y, self.shape[0], first=False)
        return self.rmatmat(Y[:, None])[:, 0] if Y.ndim == 1 else self.rmatmat(Y.mT).mT

    def _check_factor(self, X: object, size: int, *, first: bool) -> None:
        """InputError unless X can be multiplied with this map; ``first``: from the right."""
        if not isinstance(X, Tensor):
            raise InputError(
                f"expected a tensor to multiply a map with, got {type(X).__name__}; of another map "
                "take to_dense()"
            )
        fits = X.ndim in (1, 2) and X.shape[0 if first else -1] == size
        if not fits or (X.dtype, X.device) != (self.dtype, self.device):
            wanted = f"({size},) or ({size}, b)" if first else f"({size},) or (b, {size})"
            raise InputError(
                f"expected a tensor {wanted} of {self.dtype} on {self.device} beside a map of "
                f"shape {self.shape}, got {tuple(X.shape)} of {X.dtype} on {X.device}"
            )

    def __repr__(self) -> str:
        m, n = self.shape
        return f"{type(self).__name__}({m}×{n}, {str(self.dtype).removeprefix('torch.')})"


_CLASSES: dict[str, Callable[..., LinearMap]] = {}
"""The classes that arithmetic makes maps of; each registers itself, as it imports this file."""

C = TypeVar("C", bound=type[LinearMap])


def made_by_arithmetic(cls: C) -> C:
    """Register a class under its name, for the operators of :class:`LinearMap`."""
    _CLASSES[cls.__name__] = cls
    return cls


MatrixLike = Union[Tensor, LinearMap]  # noqa: UP007 — evaluated at run time on Python 3.10


def as_map(matrix: MatrixLike) -> LinearMap:
    """``matrix`` itself if it is a map, else :class:`Dense` around it.

    Args:
        matrix: A tensor or a map.

    Returns:
        A map.

    Raises:
        InputError: If it is neither.
    """
    if isinstance(matrix, LinearMap):
        return matrix
    if isinstance(matrix, torch.nn.Module):
        what = "layer.weight"
        if isinstance(matrix, torch.nn.modules.conv._ConvNd):  # of its kernel it is another norm
            what = "Convolution.of(layer, input_size) of bulkedge.spectral"
        raise InputError(
            f"expected a torch tensor or a LinearMap, got {type(matrix).__name__}; pass {what}, "
            "or use spectral_cap(layer) to bound its norm"
        )
    if not isinstance(matrix, Tensor):
        raise InputError(
            f"expected a torch tensor or a LinearMap, got {type(matrix).__name__}; "
            "torch.as_tensor converts arrays and lists"
        )
    require_strided("the matrix", matrix)
    if matrix.device.type == "meta":
        raise InputError(
            f"expected a tensor with entries, got shape {tuple(matrix.shape)} on meta; to_empty() "
            "it, or read the weights"
        )
    return _CLASSES["Dense"](matrix)


def frobenius(matrix: Tensor) -> float:
    """``‖matrix‖_F``, summed in float64, whatever the size of the entries.

    A sum of many squares in float32 is off by up to some per cent, to either side.  The rows are
    widened a few at a time.

    Args:
        matrix: Of any floating dtype, one dimension or more.

    Returns:
        The norm; inf or NaN where an entry is.
    """
    rows = max(TILE_ENTRIES // max(matrix.shape[-1], 1), 1)
    tiles = (exact(tile) for tile in matrix.split(rows))
    norm = math.hypot(*(float(torch.linalg.vector_norm(tile)) for tile in tiles))
    limits = torch.finfo(torch.float64)
    if limits.tiny**0.5 / limits.eps < norm < limits.max**0.5:
        return norm
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    if not 0 < largest < math.inf:
        return largest
    power = math.frexp(largest)[1]
    return times_power(float(torch.linalg.vector_norm(times_power(exact(matrix), -power))), power)


X = TypeVar("X", Tensor, float)


def times_power(x: X, power: int) -> X:
    """``2^power x``, exactly, also where the power itself is beyond the numbers of the dtype."""
    return x * 2.0 ** (power // 2) * 2.0 ** (power - power // 2)
