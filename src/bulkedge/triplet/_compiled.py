"""Registered operators: ``torch.compile`` and ``vmap`` take a solve as one node.

An operator takes tensors and plain values alone, so a strategy object travels as a number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bulkedge._linmap import Dense

from ._numbers import NEAR, Evidence, flatten, implicit, leading


def one_by_one(
    function: Callable[..., tuple[Tensor, ...]],
    info: Any,
    in_dims: tuple[int | None, ...],
    *args: Any,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The vmap rule of everything here: apply to each element of the batch, and stack."""
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


# what torch.compiler.assume_constant_result sets, without loading the compiler at import
token._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@torch.library.custom_op("bulkedge::leading_triplets", mutates_args=())
def op_leading(
    A: Tensor,
    start: Tensor | None,
    k: int,
    solver: int,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The k leading triplets of a matrix, see :func:`~bulkedge.triplet._numbers.flatten`."""
    return flatten(leading(Dense(A), k, _STRATEGIES[solver], start, None, strict=strict))


@op_leading.register_fake
def _(A: Tensor, start: Tensor | None, k: int, solver: int, strict: bool) -> tuple[Tensor, ...]:
    (m, n), near = A.shape, NEAR
    shapes = ((k,), (m, k), (n, k), (k,), (k,))
    counts = torch.empty(3, dtype=torch.int64, device="cpu")
    return (
        *(A.new_empty(s) for s in shapes),
        counts,
        A.new_empty(near),
        A.new_empty(min(m, n), near),
    )


@torch.library.custom_op("bulkedge::implicit_solve", mutates_args=())
def op_implicit(
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
    judge: bool,
) -> tuple[Tensor, Tensor]:
    """The system of the derivative, see :func:`~bulkedge.triplet._numbers.implicit`."""
    evidence = Evidence(residuals, gaps, (theta, Z))
    method, triplets = _STRATEGIES[adjoint], (sigma, u, v)
    return implicit(Dense(A), method, triplets, (phi, psi), evidence, xi=xi, judge=judge)


@op_implicit.register_fake
def _(
    xi: object, phi: object, psi: object, sigma: Tensor, u: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), torch.empty_like(v)


op_leading.register_vmap(partial(one_by_one, op_leading))
op_implicit.register_vmap(partial(one_by_one, op_implicit))
