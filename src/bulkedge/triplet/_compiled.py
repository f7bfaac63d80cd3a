"""Registered operators: ``torch.compile`` and ``vmap`` take a solve as one node.

An operator takes tensors and plain values alone, so a strategy object travels as a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bulkedge._errors import InputError
from bulkedge._linmap import Dense

from ._numbers import NEAR, Ambiguity, ForwardEvidence, flatten, solve_leading, solve_outside_block


def vmap_by_loop(
    function: Callable[..., tuple[Tensor, ...]],
    info: Any,
    in_dims: tuple[int | None, ...],
    *args: Any,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The vmap rule of every function here: apply it to each element of the batch, and stack."""
    results = [
        function(
            *(
                arg if dim is None else arg.select(dim, i)
                for arg, dim in zip(args, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]
    stacked = tuple(torch.stack(list(column)) for column in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


_STRATEGIES: list[Any] = []


def token(strategy: object) -> int:
    """The number under which an operator finds the strategy; a constant to the compiler."""
    if strategy not in _STRATEGIES:  # equal strategies are the same strategy
        _STRATEGIES.append(strategy)
    return _STRATEGIES.index(strategy)


def strategy(number: int) -> Any:
    """The strategy of a token."""
    return _STRATEGIES[number]


# This is what torch.compiler.assume_constant_result sets; it would load the compiler at import.
token._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]

_by_rule = ContextVar("bulkedge_by_rule", default=False)


@contextmanager
def by_rule() -> Iterator[None]:
    """Say that the derivative rule calls the operators: it attaches every derivative itself."""
    before = _by_rule.set(True)
    try:
        yield
    finally:
        _by_rule.reset(before)


def require_no_tangents() -> None:
    """InputError in forward mode: a graph has no derivative rule, and would drop the tangent."""
    if forward_ad._current_level >= 0 and not _by_rule.get():
        raise InputError(
            "expected no forward mode around a compiled or traced function: the graph has no "
            "tangents; take the derivative inside it, "
            "torch.compile(lambda A, T: torch.func.jvp(f, (A,), (T,)))"
        )


def _no_backward(*_: Any) -> None:
    raise InputError(
        "expected no reverse mode around a traced function: the graph of make_fx has no derivative "
        "of its own; trace the derivative, make_fx(torch.func.grad(f))"
    )


@torch.library.custom_op("bulkedge::leading_triplets", mutates_args=())
def op_leading(
    A: Tensor,
    start: Tensor | None,
    k: int,
    solver: int,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The k leading triplets of a matrix, see :func:`~bulkedge.triplet._numbers.flatten`."""
    require_no_tangents()
    return flatten(solve_leading(Dense(A), k, _STRATEGIES[solver], start, None, strict=strict))


@op_leading.register_fake
def _(A: Tensor, start: Tensor | None, k: int, solver: int, strict: bool) -> tuple[Tensor, ...]:
    (m, n), near = A.shape, NEAR
    shapes = ((k,), (m, k), (n, k), (k,), (k,))
    counts = torch.empty(3, dtype=torch.int64, device="meta" if A.is_meta else "cpu")
    return (
        *(A.new_empty(s) for s in shapes),
        counts,
        A.new_empty(near),
        A.new_empty(min(m, n), near),
    )


@torch.library.custom_op("bulkedge::implicit_solve", mutates_args=())
def op_outside_block(
    xi: Tensor | None,
    phi: Tensor | None,
    psi: Tensor | None,
    sigma: Tensor,
    u: Tensor,
    v: Tensor,
    residuals: Tensor,
    gaps: Tensor,
    theta: Tensor,
    Z: Tensor,
    A: Tensor,
    adjoint: int,
    warn_of: str,
    tangent: bool,
) -> tuple[Tensor, Tensor]:
    """The system of the derivative, see :func:`~bulkedge.triplet._numbers.solve_outside_block`."""
    require_no_tangents()
    evidence = ForwardEvidence(residuals, gaps, (theta, Z))
    method, triplets = _STRATEGIES[adjoint], (sigma, u, v)
    ambiguity = cast("Ambiguity", warn_of)
    p, q = solve_outside_block(
        Dense(A),
        method,
        triplets,
        (phi, psi),
        evidence,
        xi=xi,
        warn_of=ambiguity,
        tangent=tangent,
        traced=True,
    )
    return p.contiguous(), q.contiguous()  # the layout of the fake tensors below


@op_outside_block.register_fake
def _(
    xi: object, phi: object, psi: object, sigma: Tensor, u: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), v.new_empty(v.shape)


op_leading.register_vmap(partial(vmap_by_loop, op_leading))
op_outside_block.register_vmap(partial(vmap_by_loop, op_outside_block))
op_leading.register_autograd(_no_backward)
op_outside_block.register_autograd(_no_backward)
