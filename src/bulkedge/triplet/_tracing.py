"""What torch is doing with the tensors: tracing, faking, batching, differentiating forward."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor

from bulkedge._errors import InputError


def numbers_hidden(*tensors: Tensor | None) -> bool:
    """Whether the numbers of the tensors can only be seen inside a registered operator, not here.

    This is so under the tracers (``torch.compile``, ``make_fx``), in ``FakeTensorMode``, on the
    meta device, and in autograd's own vmap (``is_grads_batched``), which is not torch.func's.
    Elsewhere no operator is used, because the first call of one loads the compiler.

    Returns:
        True where a registered operator is needed.
    """
    keys, batched = torch._C._TorchDispatchModeKey, _key("Batched")
    modes = (keys.FAKE, keys.PROXY, keys.FUNCTIONAL)
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in modes) or any(
        x.is_meta or hasattr(x, "fake_mode") or torch._C._dispatch_keys(x).has(batched)
        for x in tensors
        if x is not None
    )


def require_numbers(A: Tensor, what: str) -> None:
    """Raise InputError where an entry of the tensor cannot be looked at."""
    if numbers_hidden(A) or _vmapped(A):
        raise InputError(
            f"expected a tensor whose entries {what} can look at, got one that is traced, faked, "
            "vmapped or on the meta device; call it outside, matrix by matrix"
        )


def _vmapped(A: Tensor) -> bool:
    """Whether torch.func's vmap holds a batch behind it, under derivatives or not."""
    functorch = cast("Any", torch._C)._functorch
    while functorch.is_functorch_wrapped_tensor(A):
        if functorch.is_batchedtensor(A):
            return True
        A = functorch.get_unwrapped(A)
    return False


def unwrapped(A: Tensor) -> Tensor:
    """The tensor behind the derivatives of torch.func that are around."""
    functorch = cast("Any", torch._C)._functorch
    while functorch.is_functorch_wrapped_tensor(A):
        A = functorch.get_unwrapped(A)
    return A


def jvp_levels() -> int:
    """How many forward modes of torch.func are around; a constant to the compiler."""
    return _transforms().count("Jvp")


def functionalized() -> bool:
    """Whether torch.func.functionalize is around; a constant to the compiler."""
    return "Functionalize" in _transforms()


def _transforms() -> list[str]:
    """The transforms of torch.func that are around, by name: Grad, Jvp, Vmap, Functionalize."""
    if not torch._C._are_functorch_transforms_active():
        return []
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    return [level.key().name for level in retrieve_all_functorch_interpreters()]


@functools.cache
def _key(name: str) -> Any:
    return torch._C._parse_dispatch_key(name)


# This is what torch.compiler.assume_constant_result sets; it would load the compiler at import.
jvp_levels._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
functionalized._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
