"""Products in the precision of their dtype, whatever the process was told before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


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
    # nothing is computed on the meta device, and torch has no autocast for it
    plain = nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)
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
