"""Stored tensors read from their files, whole or a range of elements, and written in place."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from bulkedge._errors import CheckpointError

from .gguf import ENDING
from .header import BITS, TensorInfo, open_regular

if TYPE_CHECKING:  # listing names needs neither library: `bulkedge inspect` stays quick
    import torch
    from torch import Tensor


def read_tensor(info: TensorInfo) -> Tensor:
    """Read one tensor, a private copy in memory, dtype as stored.

    Args:
        info: From the header of its file.

    Returns:
        The tensor.

    Raises:
        CheckpointError: If the file has changed, cannot be read any more, or holds what torch
            cannot.
    """
    if info.file.suffix == ENDING:  # no safetensors; its header was checked against the file
        return read_elements(info, 0, info.size).reshape(info.shape)
    import safetensors

    try:
        found = info.file.stat()
        # a file that was changed is opened anew
        opened = _opened(info.file, (found.st_ino, found.st_size, found.st_mtime_ns))
        tensor = opened.get_tensor(info.name)
    # torch refuses a dtype or a size with RuntimeError, TypeError or ValueError
    except (
        OSError,
        safetensors.SafetensorError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r} cannot be read ({error or type(error).__name__}); "
            f"was the file changed meanwhile, or is {info.dtype} {info.shape} too much for torch?"
        ) from None
    if tuple(tensor.shape) != info.shape:
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r} was {info.shape}, is now {tuple(tensor.shape)}; "
            "the file was changed meanwhile, start again"
        )
    return tensor


@lru_cache(maxsize=4)
def _opened(file: Path, _stamp: tuple[int, ...]) -> Any:
    """A file kept open: the library reads the whole header each time that it opens one."""
    import safetensors

    return safetensors.safe_open(file, framework="pt", backend="pread")


def read_elements(info: TensorInfo, first: int, count: int, file: Path | None = None) -> Tensor:
    """Read ``count`` elements of a tensor from the ``first`` on, in the order they are stored.

    The safetensors library reads a whole tensor for the sake of a slice; this reads the slice.

    Args:
        info: From the header of its file.
        first: The first element, of the flattened tensor.
        count: How many, at least one.
        file: A copy of its file to read from.

    Returns:
        A 1-D tensor, a private copy in memory, dtype as stored.

    Raises:
        CheckpointError: If the file has changed or cannot be read any more.
    """
    import torch

    width = BITS[info.dtype] // 8
    content = read_bytes(info, first * width, count * width, file)
    return torch.frombuffer(content, dtype=torch_dtypes()[info.dtype])


def read_bytes(info: TensorInfo, first: int, count: int, file: Path | None = None) -> bytearray:
    """Read ``count`` bytes of a tensor from the ``first`` on, whatever its dtype.

    Args:
        info: From the header of its file.
        first: The first byte, counted from where the tensor begins.
        count: How many, at least one; within the tensor, so that its header bounds them.
        file: A copy of its file to read from.

    Returns:
        The bytes; in memory that :func:`torch.frombuffer` may write to.

    Raises:
        CheckpointError: If the file has changed or cannot be read any more.
    """
    content = bytearray(count)
    try:
        opened, _ = open_regular(file or info.file)
        with opened:
            opened.seek(info.start + first)
            read = opened.readinto(content)  # pyright: ignore[reportAttributeAccessIssue]
    except OSError as error:
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r} cannot be read ({error.strerror}); was the file "
            "changed meanwhile?"
        ) from None
    if read != count:
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r} ends too early; the file was changed meanwhile, "
            "start again"
        )
    return content


def torch_dtypes() -> dict[str, torch.dtype]:
    """The dtypes that are read and written element by element, by their names in a header."""
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I8": torch.int8,
        "U8": torch.uint8,
    }


def rounding_of(info: TensorInfo) -> float:
    """The machine epsilon of a tensor's dtype; 0 of one that is no floating-point number."""
    import torch

    dtype = torch_dtypes().get(info.dtype, torch.uint8)
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def write_elements(info: TensorInfo, first: int, values: Tensor, file: Path) -> None:
    """Write elements over those of a stored tensor, from the ``first`` on.

    Args:
        info: The tensor.
        first: The first element, of the flattened tensor.
        values: Any shape, in the dtype of the tensor.
        file: A copy of its file, of the same layout.
    """
    with file.open("r+b") as out:
        out.seek(info.start + first * BITS[info.dtype] // 8)
        write_bytes(out, values)


def write_bytes(out: BinaryIO, tensor: Tensor) -> None:
    """The bytes of a tensor."""
    import torch

    # a view, because converting a large tensor to bytes copies it
    out.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
