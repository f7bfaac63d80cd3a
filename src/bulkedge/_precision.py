"""Products in the precision of their dtype, whatever the process has set before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

WITHOUT_FLOAT64 = frozenset({"mps"})
"""The kinds of device that have no float64: what is exact of their matrices is on the CPU."""
SAME_SIZE_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers with as many bytes as a number: its bits are read as these, as NumPy has no
bfloat16."""


def exact_device(device: torch.device) -> torch.device:
    """Where float64 numbers of a device are: there, or on the CPU if it has none.

    Args:
        device: Of the matrix.

    Returns:
        The device.

    Example:
        >>> exact_device(torch.device("cuda:1")), exact_device(torch.device("mps"))
        (device(type='cuda', index=1), device(type='cpu'))
    """
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype, on its own device if that has the dtype.

    Args:
        x: The tensor.
        dtype: The dtype.

    Returns:
        The tensor itself if nothing changes.
    """
    return x.to(exact_device(x.device), dtype) if dtype is torch.float64 else x.to(dtype)


def exact(x: Tensor) -> Tensor:
    """A tensor in float64, on its own device if that has float64.

    Every float64 number that comes from a matrix is made here; what is computed of it goes back by
    ``y.to(x)``.

    Args:
        x: The tensor.

    Returns:
        The tensor itself if it is in float64.
    """
    return converted(x, torch.float64)


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 matrices in float32 within the block, on CUDA and CPU.

    TF32 keeps 10 bits of 23 and bfloat16 keeps 7: what is proved with eps of float32 would not hold
    of such products.  A program may ask for them by either API of torch, or by the environment; its
    settings are restored when the block ends.  They belong to the process, so other threads have
    full precision meanwhile, too.
    """
    before, older_setting = [_setting(switch) for switch in _switches()], _older_setting()
    torch.set_float32_matmul_precision("highest")  # sets the switches of both APIs
    try:
        yield
    finally:
        if older_setting is not None:
            torch.set_float32_matmul_precision(older_setting)
        for (switch, _), value in zip(_switches(), before, strict=True):
            switch.fp32_precision = value


@contextmanager
def full_precision(device: torch.device | str) -> Iterator[None]:
    """:func:`full_float32`, and no autocast to half precision on this device."""
    # a compiler cannot trace the switches; the solve that it does not trace comes here itself
    switches = nullcontext() if torch.compiler.is_compiling() else full_float32()
    kind = torch.device(device).type
    has_autocast = torch.amp.is_autocast_available(kind)
    plain = torch.autocast(kind, enabled=False) if has_autocast else nullcontext()
    with switches, plain:
        yield


def _switches() -> list[tuple[Any, Any]]:
    """The switches of torch 2.9 and later, each with the one it inherits from; before, none."""
    cuda, cpu = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
    pairs = [(cuda, torch.backends.cudnn), (cpu, torch.backends.mkldnn)]
    return [pair for pair in pairs if hasattr(pair[0], "fp32_precision")]


def _setting(pair: tuple[Any, Any]) -> str:
    """What a switch is set to: ``none`` where it equals the one that it inherits from."""
    own, inherited = (switch.fp32_precision for switch in pair)
    return "none" if own == inherited else own


def _older_setting() -> str | None:
    """What the older API is set to; None where the two APIs contradict each other."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread and full precision within the block, so that the last digits are fixed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with full_precision("cpu"):
            yield
    finally:
        torch.set_num_threads(before)
