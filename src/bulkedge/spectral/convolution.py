"""A convolution layer as a linear map, given by its products with inputs and outputs.

The gain of a layer is bounded by the norm of ``x ↦ conv(x)`` on the whole input, not by that of the
kernel reshaped to ``C_out × (C_in·k₁·…)``, which is neither an upper nor a lower bound of it.  A
3×3 kernel of ones has a reshaped norm of 3 and a gain of up to 9.  The gain of a kernel that mostly
meets padding is smaller than its reshaped norm.  (Sedghi, Gupta, Long, "The singular values of
convolutional layers", ICLR 2019, arXiv:1805.10408, give the exact spectrum for circular padding.
Here the padding is by zeros, as in the layer, so the products are torch's convolution and its
transpose.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Union

import torch
from torch import Tensor, nn
from torch.nn import functional

from bulkedge._errors import InputError
from bulkedge._linmap import LinearMap

Sizes = Union[int, Sequence[int]]  # noqa: UP007 — evaluated at run time on Python 3.10

_FORWARD = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_BACKWARD = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


class Convolution(LinearMap):
    """The map ``vec(x) ↦ vec(conv(x))``, as torch's layers compute it, without the bias.

    ``y[o, t] = Σ_{c, j} kernel[o, c, j] · x[c, stride·t + dilation·j − padding]``, x being 0
    outside.  A transposed convolution is the ``.T`` of one.

    One pass is one convolution of a batch of b inputs.  The dense matrix has
    ``(C_out·Π output_size)·(C_in·Π input_size)`` entries and costs one pass with the identity.
    On a GPU torch may compute float32 convolutions in TF32, with an error near 1e-3, unless
    ``torch.backends.cudnn.allow_tf32`` is off.

    Args:
        kernel: Shape ``(C_out, C_in / groups, k₁, …)``, one to three k's, a floating dtype.
        input_size: Extent of the input, without batch and channels: one number for all dimensions,
            or one for each; the same holds for the next three arguments.
        stride: Step of the kernel over the input.
        padding: Zeros on both sides, or ``"valid"`` (none), or ``"same"`` (the output is as large
            as the input; where the total is odd the far side gets one more, as in torch).
        dilation: Distance between the taps of the kernel.
        groups: Independent groups of channels.

    Attributes:
        kernel: The kernel.
        input_shape: ``(C_in, *input_size)``.
        output_shape: ``(C_out, *output_size)``.

    Raises:
        InputError: If the arguments do not fit together or the kernel exceeds the padded input.

    Example:
        >>> ones = Convolution(torch.ones(1, 1, 3, 3), (8, 8), padding=1)
        >>> ones.shape, ones.output_shape
        ((64, 64), (1, 8, 8))
        >>> image = torch.ones(64, 1)
        >>> ones.matmat(image).max().item(), ones.T.matmat(image).shape
        (9.0, torch.Size([64, 1]))
    """

    def __init__(
        self,
        kernel: Tensor,
        input_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
    ) -> None:
        _require_kernel(kernel, groups)
        dims = kernel.ndim - 2
        self.kernel = kernel
        self.stride = _each("stride", stride, dims, least=1)
        self.dilation = _each("dilation", dilation, dims, least=1)
        self.groups = groups
        self._input_size = _each("input_size", input_size, dims, least=1)
        self._pads = self._resolve(padding)
        output_size = self._fit()
        self.input_shape = (kernel.shape[1] * groups, *self._input_size)
        self.output_shape = (kernel.shape[0], *output_size)
        self.padding = padding
        self.shape = (math.prod(self.output_shape), math.prod(self.input_shape))
        self.dtype = kernel.dtype
        self.device = kernel.device

    @property
    def _reach(self) -> tuple[int, ...]:
        """How far the dilated kernel extends in each dimension."""
        taps = self.kernel.shape[2:]
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, taps, strict=True))

    def _resolve(self, padding: Sizes | str) -> list[tuple[int, int]]:
        """Zeros before and after, for each dimension."""
        if padding == "same":
            if set(self.stride) != {1}:
                raise InputError(f"expected stride 1 with padding='same', got {self.stride}")
            return [((reach - 1) // 2, reach // 2) for reach in self._reach]
        if padding == "valid":
            padding = 0
        if isinstance(padding, str):
            raise InputError(f"expected padding 'same', 'valid' or numbers, got {padding!r}")
        return [(each, each) for each in _each("padding", padding, self.kernel.ndim - 2, least=0)]

    def _fit(self) -> tuple[int, ...]:
        """The output size; also stores how much of the padded input the last stride leaves over."""
        padded = [size + sum(pads) for size, pads in zip(self._input_size, self._pads, strict=True)]
        if any(reach > extent for reach, extent in zip(self._reach, padded, strict=True)):
            raise InputError(
                f"expected a kernel within the padded input {tuple(padded)}, got one that extends "
                f"over {self._reach}; enlarge input_size or padding"
            )
        steps = [
            divmod(extent - reach, stride)
            for extent, reach, stride in zip(padded, self._reach, self.stride, strict=True)
        ]
        self._rest = tuple(rest for _, rest in steps)
        return tuple(count + 1 for count, _ in steps)

    def matmat(self, X: Tensor) -> Tensor:
        """See :meth:`LinearMap.matmat`; the columns are the batch."""
        images = X.mT.reshape(X.shape[1], *self.input_shape)
        # pad counts from the last dimension, before and after
        images = functional.pad(images, [n for pads in reversed(self._pads) for n in pads])
        convolve = _FORWARD[len(self.stride)]
        out = convolve(
            images, self.kernel, None, self.stride, 0, dilation=self.dilation, groups=self.groups
        )
        return out.reshape(X.shape[1], self.shape[0]).mT

    def rmatmat(self, Y: Tensor) -> Tensor:
        """See :meth:`LinearMap.rmatmat`; torch's transposed convolution, the padding cut off."""
        images = Y.mT.reshape(Y.shape[1], *self.output_shape)
        convolve = _BACKWARD[len(self.stride)]
        padded = convolve(
            images,
            self.kernel,
            stride=self.stride,
            output_padding=self._rest,
            groups=self.groups,
            dilation=self.dilation,
        )
        for dim, (size, (before, _)) in enumerate(
            zip(self._input_size, self._pads, strict=True), start=2
        ):
            padded = padded.narrow(dim, before, size)
        return padded.reshape(Y.shape[1], self.shape[1]).mT

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`; one product with the smaller identity."""
        m, n = self.shape
        if n <= m:
            return self.matmat(torch.eye(n, dtype=self.dtype, device=self.device))
        return self.rmatmat(torch.eye(m, dtype=self.dtype, device=self.device)).mT

    @classmethod
    def of(cls, module: nn.Module, input_size: Sizes) -> Convolution:
        """The map of a convolution layer, made of its present weight.

        Args:
            module: An ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` with padding by zeros; its
                bias shifts the output and is left out.
            input_size: Extent of the input, without batch and channels.

        Returns:
            The map; gradients go to the layer's weight.

        Raises:
            InputError: If it is another layer or pads otherwise.

        Example:
            >>> Convolution.of(nn.Conv1d(2, 3, kernel_size=5, stride=2), (11,)).shape
            (12, 22)
        """
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise InputError(f"expected nn.Conv1d, Conv2d or Conv3d, got {type(module).__name__}")
        if module.padding_mode != "zeros":
            raise InputError(
                f"expected padding_mode='zeros', got {module.padding_mode!r}: that layer is "
                "another linear map, which is not implemented"
            )
        return cls(
            module.weight, input_size, module.stride, module.padding, module.dilation, module.groups
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See :attr:`LinearMap.tensors`."""
        return (self.kernel,)

    def with_tensors(self, *tensors: Tensor) -> Convolution:
        """See :meth:`LinearMap.with_tensors`."""
        (kernel,) = tensors
        return Convolution(
            kernel, self._input_size, self.stride, self.padding, self.dilation, self.groups
        )

    def pushforward(self, *tangents: Tensor) -> Convolution:
        """See :meth:`LinearMap.pushforward`."""
        return self.with_tensors(*tangents)


def _each(name: str, value: Sizes, dims: int, least: int) -> tuple[int, ...]:
    """One integer for each dimension."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * dims
    if len(values) != dims or any(not isinstance(v, int) or v < least for v in values):
        raise InputError(f"expected {name} of {dims} integers ≥ {least}, got {value}")
    return values


def _require_kernel(kernel: Tensor, groups: int) -> None:
    """InputError unless this is the kernel of a convolution with so many groups."""
    if kernel.ndim - 2 not in _FORWARD or not kernel.is_floating_point():
        raise InputError(
            "expected a floating-point kernel of shape (C_out, C_in/groups, k1[, k2[, k3]]), "
            f"got shape {tuple(kernel.shape)} of {kernel.dtype}"
        )
    if 0 in kernel.shape:
        raise InputError(f"expected a kernel with entries, got shape {tuple(kernel.shape)}")
    if groups < 1 or kernel.shape[0] % groups:
        raise InputError(
            f"expected groups ≥ 1 that divide the {kernel.shape[0]} output channels, "
            f"got groups={groups}"
        )
