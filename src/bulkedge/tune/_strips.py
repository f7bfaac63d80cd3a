"""A packed base as a map that unpacks some rows at a time, so that no copy of it is ever whole.

The layers of bitsandbytes store the rows one after the other: nf4 and fp4 in blocks of equal
length, each with a scale of its own, int8 with a scale for each row.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bulkedge._linmap import LinearMap, frobenius
from bulkedge._precision import converted, exact_device

ROWS = 64
"""So many rows are unpacked together: what unpacking takes besides is several times their size."""
WHOLE_UP_TO = 1 << 21
"""A base with at most this many entries is unpacked as a whole, 8 MB in single precision."""

Rows = Callable[[int, int], Tensor]
"""Unpacks the rows from one up to another."""


class StripMatrix(LinearMap):
    """A matrix of which a function gives some rows at a time.

    Cost of a product: that of a dense one, and of unpacking all rows once.

    Args:
        rows: Gives rows ``[first, last)`` as a tensor.
        shape: ``(m, n)``.
        dtype: The dtype of products.
        device: Where products are.
        step: How many rows are unpacked together.
    """

    def __init__(
        self,
        rows: Rows,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        step: int = ROWS,
    ) -> None:
        self.rows, self.shape, self.dtype, self.step = rows, shape, dtype, step
        self.device = exact_device(device) if dtype is torch.float64 else device
        self._none = torch.empty(0, dtype=dtype, device=self.device)

    def matmat(self, X: Tensor) -> Tensor:
        """See :meth:`LinearMap.matmat`."""
        found = X.new_empty(self.shape[0], X.shape[1])
        for first, strip in self._strips():
            # in place: what is kept between strips would split the memory that they leave behind
            found[first : first + len(strip)] = strip @ X
        return found

    def rmatmat(self, Y: Tensor) -> Tensor:
        """See :meth:`LinearMap.rmatmat`."""
        total = Y.new_zeros(Y.shape[1], self.shape[1])
        for first, strip in self._strips():
            total.addmm_(Y[first : first + len(strip)].mT, strip)
        return total.mT

    def norm_bound(self) -> float:
        """See :meth:`LinearMap.norm_bound`."""
        norms = [frobenius(strip) for _, strip in self._strips()]
        return math.hypot(*norms) if all(map(math.isfinite, norms)) else math.inf

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`; the whole of it."""
        return torch.cat([strip for _, strip in self._strips()])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """One without entries, which says where products are and in what dtype."""
        return (self._none,)

    def with_tensors(self, *tensors: Tensor) -> StripMatrix:
        """See :meth:`LinearMap.with_tensors`."""
        (like,) = tensors
        return StripMatrix(self.rows, self.shape, like.dtype, like.device, self.step)

    def to(self, dtype: torch.dtype) -> StripMatrix:
        """See :meth:`LinearMap.to`."""
        return StripMatrix(self.rows, self.shape, dtype, self.device, self.step)

    def _strips(self) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, self.shape[0], self.step):
            rows = self.rows(first, min(first + self.step, self.shape[0]))
            yield first, converted(rows, self.dtype).to(self.device)


def strips_of(layer: nn.Module, shape: tuple[int, int], dtype: torch.dtype) -> StripMatrix | None:
    """The weight of a layer of bitsandbytes as a map.

    Args:
        layer: The layer.
        shape: Of the weight as it acts.
        dtype: Of the products.

    Returns:
        The map; None if the layer is of another kind, or packed in another way, or so small that
        it may as well be unpacked as a whole.
    """
    weight: Any = layer.weight
    if shape[0] * shape[1] <= WHOLE_UP_TO:
        return None
    found = _of_4_bits(weight, shape) or _of_8_bits(layer, weight, shape)
    if found is None:
        return None
    rows, step = found
    return StripMatrix(rows, shape, dtype, weight.device, step)


def _of_4_bits(weight: Any, shape: tuple[int, int]) -> tuple[Rows, int] | None:
    """Rows of an nf4 or fp4 weight: a part of its bytes, with the scales of their blocks."""
    state = getattr(weight, "quant_state", None)
    if state is None or weight.dtype is not torch.uint8 or tuple(state.shape) != shape:
        return None
    m, n = shape
    if weight.numel() * 2 != m * n or getattr(state, "packing_format_for_cpu", False):
        return None
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

    block, step = state.blocksize, max(ROWS, state.blocksize)
    scales: Tensor = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    part = copy.copy(state)
    part.nested, part.state2, part.offset = False, None, None

    def rows(first: int, last: int) -> Tensor:
        start, end = first * n, last * n
        own = copy.copy(part)
        own.shape = torch.Size((last - first, n))
        own.absmax = scales.float()[start // block : -(-end // block)].contiguous()
        packed = weight.data.reshape(-1, 1)[start // 2 : end // 2]
        return functional.dequantize_4bit(packed.contiguous(), own)

    return rows, step


def _of_8_bits(layer: Any, weight: Any, shape: tuple[int, int]) -> tuple[Rows, int] | None:
    """Rows of an int8 weight with a scale each: 127 stands for the scale."""
    scales = getattr(weight, "SCB", None)
    if scales is None:
        scales = getattr(getattr(layer, "state", None), "SCB", None)
    if scales is None or weight.dtype is not torch.int8 or tuple(weight.shape) != shape:
        return None
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

    scales = scales.to(weight.device)

    def rows(first: int, last: int) -> Tensor:
        return functional.int8_vectorwise_dequant(weight.data[first:last], scales[first:last])

    return rows, ROWS
