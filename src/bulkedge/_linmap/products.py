"""The products of a map that somebody wrote: of the right kind, and made of its tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from bulkedge._errors import InputError

MEANING = {"matmat": "W X", "rmatmat": "Wᵀ Y", "to_dense": "W"}
"""The members of a map that return numbers of the matrix."""


def check_members(cls: type) -> None:
    """Let a class check what its members return, wherever they are called.

    Cost: some comparisons a product, none of them of numbers.

    Args:
        cls: A class of maps.
    """
    checks: dict[str, Callable[..., Any]] = {"with_tensors": _named}
    if not cls.__module__.startswith("bulkedge."):  # ours are right, and may be compiled
        checks["pullback"] = _fitting
    checks |= {member: functools.partial(_checked, member) for member in MEANING}
    for member in checks.keys() & vars(cls).keys():
        setattr(cls, member, checks[member](vars(cls)[member]))


def _traced() -> bool:
    """Whether torch traces or fakes tensors, so that there are no numbers to look at."""
    if torch.compiler.is_compiling():
        return True
    keys = torch._C._TorchDispatchModeKey
    modes = (keys.FAKE, keys.PROXY, keys.FUNCTIONAL)
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in modes)


def _named(with_tensors: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(with_tensors)
    def method(self: Any, *tensors: Tensor) -> Any:
        if _traced():  # a try would break the graph elsewhere
            return with_tensors(self, *tensors)
        name = f"{type(self).__name__}.with_tensors"
        try:
            found = with_tensors(self, *tensors)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:
            raise InputError(
                f"expected {name} to make a map of any tensors, those of torch.func and the meta "
                f"device included, got an error: {error}; keep the tensors as they are, and "
                "compute with them in the products alone"
            ) from error
        made_of = getattr(found, "tensors", ())
        if [x.is_meta for x in made_of] != [x.is_meta for x in tensors]:  # as one of them is asked
            raise InputError(
                f"expected {name} to return a map made of the tensors that it is given, got "
                f"{found!r}, which is made of others"
            )
        return found

    return method


def _checked(member: str, product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(product)
    def method(self: Any, *args: Tensor, **kwargs: Tensor) -> Tensor:
        found = product(self, *args, **kwargs)
        m, n = self.shape
        like = next(iter((*args, *kwargs.values())), self)  # the block, for a product
        columns = (n,) if like is self else like.shape[1:]
        wanted = (n if member == "rmatmat" else m, *columns)
        fits = isinstance(found, Tensor) and found.shape == wanted and found.dtype == like.dtype
        if not (fits and _same_device(found.device, like.device)):
            raise InputError(
                f"expected {type(self).__name__}.{member} to return {MEANING[member]} of shape "
                f"{wanted} in {like.dtype} on {like.device}, got {_kind(found)}; correct it, or "
                "the shape, dtype and device of the map"
            )
        return found

    return method


def _fitting(pullback: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(pullback)
    def method(self: Any, L: Tensor, R: Tensor, needs: Sequence[bool] = ()) -> Any:
        gradients = pullback(self, L, R, needs)
        return gradients if _traced() else _fitted(self, gradients, L, R, needs)

    return method


def _fitted(
    A: Any, gradients: Sequence[Tensor | None], L: Tensor, R: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients, if they fit the tensors; an error waits in those that lose L and R."""
    wanted = [tuple(x.shape) for x in A.tensors]
    found = [None if g is None else tuple(g.shape) for g in gradients]
    if len(found) != len(wanted) or any(
        f not in (None, w) for f, w in zip(found, wanted, strict=True)
    ):
        raise InputError(
            f"expected {type(A).__name__}.pullback to return a gradient, or None, for each tensor "
            f"of the map, of shapes {wanted}, got {found}"
        )
    followed = _levels(L) | _levels(R) if torch.is_grad_enabled() else set[int]()
    fitted = list(gradients)
    for i, gradient in enumerate(gradients):
        if gradient is None or (needs and not needs[i]):
            continue
        if not followed <= _levels(gradient) and bool(_numbers(gradient).any()):
            fitted[i] = _Once.apply(_once(A, i), gradient, L, R)
    return tuple(fitted)


class _Once(torch.autograd.Function):
    """A gradient that may be used, and not be differentiated: the result would silently be zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, gradient: Tensor, L: Tensor, R: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise InputError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, *_: Tensor) -> None:
        raise InputError(ctx.message)


def _once(A: Any, i: int) -> str:
    return (
        f"expected the pullback of {type(A).__name__}, by default the derivative of its matmat, to "
        f"be differentiable itself, got a gradient of tensors[{i}] that is not; write it with "
        "torch functions of L and R; where the map is linear in all its tensors together, "
        "pushforward may return self.with_tensors(*tangents)"
    )


def _levels(x: Tensor) -> set[int]:
    """The derivatives of torch.func that follow a tensor, by their numbers; 0 for autograd."""
    functorch, found = cast("Any", torch._C)._functorch, set[int]()
    while functorch.is_functorch_wrapped_tensor(x):
        found |= {functorch.maybe_get_level(x)} if x.requires_grad else set()
        x = functorch.get_unwrapped(x)
    found = {level for level in found if level > 0}  # a derivative that has ended has none
    return found | ({0} if x.requires_grad else set())


def _same_device(one: torch.device, other: torch.device | str) -> bool:
    """Whether two devices are the same, where an index is left out, too."""
    other = torch.device(other)
    return one == other or (one.type == other.type and None in (one.index, other.index))


def _kind(found: object) -> str:
    if not isinstance(found, Tensor):
        return f"an object of {type(found).__name__}"
    return f"shape {tuple(found.shape)} in {found.dtype} on {found.device}"


def gradients_by_matmat(
    A: Any, L: Tensor, R: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradient of ``tr(Lᵀ A R)`` by each tensor of a map, from the derivative of its matmat.

    Args:
        A: The map.
        L: Shape ``(m, b)``.
        R: Shape ``(n, b)``.
        needs: Which tensors' gradients are wanted; empty for all.

    Returns:
        One for each tensor.

    Raises:
        InputError: If matmat has no derivative, or misses one of the wanted tensors.
        OutOfMemoryError: From torch.
    """
    missed: list[int] = []

    def product(*tensors: Tensor) -> Tensor:
        found = A.with_tensors(*tensors).matmat(R)
        wanted = (i for i in range(len(tensors)) if not needs or needs[i])
        missed.extend(i for i in wanted if tensors[i].numel() and not _reaches(found, tensors[i]))
        return found

    try:
        gradients = torch.func.vjp(product, *A.tensors)[1](L)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise InputError(f"{_no_derivative(A)}, got an error: {error}; {_REMEDY}") from error
    if missed:
        _require_independent(A, R, missed)
    return _fitted(A, gradients, L, R, needs)


_REMEDY = (
    "write matmat and with_tensors with torch functions of these tensors alone, without detach() "
    "or NumPy, or give the class a pullback"
)


def _no_derivative(A: Any) -> str:
    return f"expected {type(A).__name__}.matmat to have a derivative by all tensors of the map"


def _reaches(result: Tensor, tensor: Tensor) -> bool:
    """Whether torch has recorded how a result depends on a tensor."""
    seen, left = set[Any](), [result.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) is tensor:
            return True
        seen.add(node)
        left.extend(earlier for earlier, _ in node.next_functions)
    return result is tensor


def _require_independent(A: Any, R: Tensor, missed: Sequence[int]) -> None:
    """InputError if a product changes with tensors by which torch has recorded no derivative."""
    with torch.no_grad():
        R, tensors = _numbers(R), [_numbers(x) for x in A.tensors]
        moved = [x + (1 + x.abs()) / 2 if i in missed else x for i, x in enumerate(tensors)]
        if torch.equal(A.with_tensors(*tensors).matmat(R), A.with_tensors(*moved).matmat(R)):
            return  # rightly no derivative
    names = ", ".join(f"tensors[{i}]" for i in missed)
    raise InputError(f"{_no_derivative(A)}, got none by {names}; {_REMEDY}")


def _numbers(x: Tensor) -> Tensor:
    """The tensor behind all transforms of torch.func, the first one of a batch."""
    functorch = cast("Any", torch._C)._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        dim = functorch.maybe_get_bdim(x) if functorch.is_batchedtensor(x) else None
        x = functorch.get_unwrapped(x)
        x = x if dim is None else x.select(dim, 0)
    return x.detach()
