"""A device without float64, simulated: tensors that say "lazy", held on the CPU.

Such a device (Apple's is one) refuses tensors of float64, and operations that mix it with the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy:0")


class Narrow(Tensor):
    """A tensor on that device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Narrow:
        if held.dtype is torch.float64:
            raise TypeError("cannot convert to float64: the device has none")
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE,
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"Narrow({self.held!r})"

    # what leaves the device as a number needs a driver where torch's own code does it
    def item(self) -> Any:
        return self.held.item()

    def tolist(self) -> Any:
        return self.held.tolist()

    def __float__(self) -> float:
        return float(self.held)

    def __int__(self) -> int:
        return int(self.held)

    def __bool__(self) -> bool:
        return bool(self.held)

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch(operation, args, kwargs or {})


def dispatch(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU, with the rules of the device."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    inside = any(isinstance(x, Narrow) for x in tensors)
    asked = kwargs.get("device")
    if inside:
        plain = [x for x in tensors if not isinstance(x, Narrow)]
        moved = operation in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if any(x.ndim for x in plain) and not moved:
            raise RuntimeError(f"{operation}: expected all tensors to be on one device")
    there = asked is not None and torch.device(asked).type == DEVICE.type
    if there:
        kwargs = kwargs | {"device": torch.device("cpu")}
    if kwargs.get("dtype") is torch.float64 and (there or (inside and asked is None)):
        raise TypeError(f"{operation}: cannot convert to float64: the device has none")
    unwrap = lambda x: x.held if isinstance(x, Narrow) else x  # noqa: E731
    found = operation(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if operation is torch.ops.aten.copy_.default or operation.__name__.split(".")[0].endswith("_"):
        return args[0]
    if there or (inside and asked is None):
        return tree_map(lambda x: Narrow(x) if isinstance(x, Tensor) else x, found)
    return found


class _Factories(TorchDispatchMode):
    """Lets ``torch.zeros(device="lazy")`` make such a tensor."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch(operation, args, kwargs or {})


@contextmanager
def narrow_device() -> Iterator[Any]:
    """Within the block the device is there; what is yielded moves a tensor to it."""
    with _Factories():
        yield Narrow
