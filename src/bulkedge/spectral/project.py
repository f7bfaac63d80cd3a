"""Projection onto the spectral ball ‖W‖₂ ≤ bound, once or after each step of an optimiser."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from bulkedge._errors import InputError
from bulkedge._guard import matrix as require_matrix
from bulkedge._guard import precise, require_strided
from bulkedge._linmap import Dense, frobenius, times_power
from bulkedge.triplet import BlockKrylov, singular_triplet
from bulkedge.triplet._thin_svd import factored
from bulkedge.triplet._tracing import require_numbers

from ._track import as_matrix, fresh_start, track
from .norm import cap_factor, require_bound

Method = Literal["rescale", "clip"]

LEADING = 16
"""The number of leading triplets that are computed first to clip a large matrix."""
LARGE = 512
"""The shorter side from which that is cheaper than a full SVD."""


@precise
def project_spectral_ball(W: Tensor, bound: float = 1.0, method: Method = "clip") -> Tensor:
    """A projection of W onto the ball {‖X‖₂ ≤ bound}, without a gradient.

    ``"clip"`` gives the nearest matrix in the Frobenius norm: singular values above the bound
    become the bound, ``W − U (Σ − bound)₊ Vᵀ``.  ``"rescale"`` multiplies by
    ``min(1, bound/‖W‖₂)``: it is cheaper, but changes W more (docs/errata.md, A38).  Inside the
    ball both return W bit by bit.

    The result is rounded to the dtype of W, which may leave its norm above the bound, by at most
    ``½ eps ‖W‖_F``.  The unit ½ eps is 0.4 % in bfloat16, 0.05 % in float16, 6e-8 in float32 and
    1e-16 in float64.  A smaller bound leaves room for it.

    Cost: ``"rescale"``, one leading triplet.  ``"clip"``, the 16 leading triplets of a large matrix
    if no more exceed the bound, else one SVD.

    Args:
        W: Shape ``(m, n)``, or more dimensions, flattened after the first.
        bound: The largest norm allowed.
        method: Which projection.

    Returns:
        Shape and dtype of W.

    Raises:
        InputError: If the bound is not positive or the method unknown, W is not real and finite, or
            its entries cannot be looked at (vmap, tracers, FakeTensorMode, the meta device).

    Example:
        >>> W = torch.diag(torch.tensor([4.0, 1.0]))
        >>> project_spectral_ball(W, 2.0).tolist()
        [[2.0, 0.0], [0.0, 1.0]]
        >>> project_spectral_ball(W, 2.0, "rescale").tolist()
        [[2.0, 0.0], [0.0, 0.5]]
    """
    require_bound(bound)
    _require_method(method)
    if isinstance(W, Tensor):
        require_strided("W", W)
        require_numbers(W, "project_spectral_ball")
    with torch.no_grad():
        matrix = as_matrix(require_matrix("W", W, dims=None).detach())
        if method == "rescale":
            return (W * cap_factor(singular_triplet(matrix).sigma[0], bound)).to(W.dtype)
        return _clip(matrix, bound).view_as(W).to(W.dtype)


# it branches on singular values, so torch.compile must break the graph here; this is the reason
# that torch prints
project_spectral_ball._torchdynamo_disable = True  # pyright: ignore[reportFunctionMemberAccess]
project_spectral_ball._torchdynamo_disable_msg = (  # pyright: ignore[reportFunctionMemberAccess]
    "bulkedge: project_spectral_ball branches on singular values, which one graph cannot hold; "
    "leave out fullgraph=True, or call it outside"
)


def hold_spectral_ball(
    optimizer: torch.optim.Optimizer,
    bound: float = 1.0,
    *,
    parameters: Iterable[Tensor] | None = None,
    method: Method = "clip",
    rtol: float = 1e-3,
) -> RemovableHandle:
    """Project weights onto the spectral ball after each step of ``optimizer``.

    This is projected gradient descent: the step, then the projection, which is not differentiated.
    The weights are also projected once now, so that the first forward pass is inside the ball.
    After a step a warm-started solve of four passes finds out whether a weight has left the ball;
    only then is the weight changed, and only the singular values that exceed the bound.

    It holds the trainable weights of at least two dimensions, embeddings included, that the
    optimiser has now, not those of groups that are added later.  Kernels of convolutions are held
    in their reshaped form.

    A weight is rounded to its dtype after the projection, so its norm may exceed the bound by
    about such a unit: see :func:`project_spectral_ball`.

    ``"rescale"`` is cheaper, but shrinks a whole weight because of one direction; with steps as
    large as Adam's that can cost accuracy (examples/lipschitz_digits).

    Args:
        optimizer: Any optimiser of torch.
        bound: The largest norm allowed.
        parameters: Which weights; None for all of at least two dimensions.
        method: As in :func:`project_spectral_ball`.
        rtol: The residual of the solve, relative to σ₁.

    Returns:
        A handle: ``handle.remove()`` ends it.

    Raises:
        InputError: If the bound is not positive, the method unknown, ``parameters`` are none of
            the optimiser's weights, or one of them is held already; and after a step, if a weight
            is not finite.

    Example:
        >>> layer = torch.nn.Linear(20, 10)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=10.0)
        >>> handle = hold_spectral_ball(optimizer, 2.0)
        >>> layer(torch.ones(4, 20)).square().sum().backward()
        >>> optimizer.step()
        >>> bool(torch.linalg.matrix_norm(layer.weight, 2) <= 2.0001)
        True
    """
    require_bound(bound)
    _require_method(method)
    weights = _select_weights(optimizer, parameters)
    _require_not_held(optimizer, weights)
    hook = _Hook(weights, bound, method, rtol)
    hook()
    return optimizer.register_step_post_hook(hook)


class _Hook:
    """What torch calls after each step: the projection of some weights, with their warm starts."""

    def __init__(
        self, weights: list[tuple[str, Tensor]], bound: float, method: Method, rtol: float
    ) -> None:
        self.weights, self.bound, self.rtol = weights, bound, rtol
        self.method: Method = method
        self.starts = WeakTensorKeyDictionary()

    @torch.no_grad()
    def __call__(self, *_: Any) -> None:
        for place, weight in self.weights:
            try:
                _project_in_place(weight, self.bound, self.method, self.rtol, self.starts)
            except InputError as error:
                raise InputError(f"{place} of shape {tuple(weight.shape)}: {error}") from error


def _require_not_held(optimizer: torch.optim.Optimizer, weights: list[tuple[str, Tensor]]) -> None:
    """InputError if an earlier call for this optimiser holds one of the weights."""
    hooks = [x for x in optimizer._optimizer_step_post_hooks.values() if isinstance(x, _Hook)]
    held = {id(weight) for hook in hooks for _, weight in hook.weights}
    for place, weight in weights:
        if id(weight) in held:
            raise InputError(
                f"expected weights that hold_spectral_ball does not hold yet, got {place} of shape "
                f"{tuple(weight.shape)}, which it holds; call remove() on the handle of the first "
                "call before the second"
            )


def _select_weights(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor] | None
) -> list[tuple[str, Tensor]]:
    """The weights to be held, each with its place in the optimiser."""
    weights = [
        (f"parameter {i} of group {j}", weight)
        for j, group in enumerate(optimizer.param_groups)
        for i, weight in enumerate(group["params"])
        if weight.ndim >= 2 and weight.requires_grad
    ]
    if parameters is not None:
        given = {id(p) for p in ([parameters] if isinstance(parameters, Tensor) else parameters)}
        weights = [(place, weight) for place, weight in weights if id(weight) in given]
    if not weights:
        raise InputError(
            "expected weights of at least two dimensions that the optimiser has, got none; pass "
            "parameters=model.parameters(), or an optimiser of the model"
        )
    return weights


def _require_method(method: str) -> None:
    if method not in ("rescale", "clip"):
        raise InputError(f'expected method="rescale" or "clip", got {method!r}')


@precise
def _project_in_place(
    weight: Tensor, bound: float, method: Method, rtol: float, starts: WeakTensorKeyDictionary
) -> None:
    """Project one weight in place if it has left the ball."""
    A = Dense(as_matrix(require_matrix("the weight", weight, dims=None).detach()))
    if weight not in starts:
        starts[weight] = fresh_start(A)
    result, starts[weight] = track(A, starts[weight], rtol=rtol)
    norm = result.sigma[0] + result.residuals[0]
    if norm <= bound:
        return
    if method == "rescale":
        weight.mul_(cap_factor(result.sigma[0], bound).to(weight.dtype))
    else:
        weight.copy_(_clip(A.matrix, bound).view_as(weight))


def _clip(matrix: Tensor, bound: float) -> Tensor:
    """``U min(Σ, bound) Vᵀ``; the matrix itself inside the ball."""
    limits, largest = torch.finfo(matrix.dtype), float(matrix.abs().max())
    if 0 < largest < limits.tiny / limits.eps:  # products of subnormal numbers round each of them
        power = 1 - math.frexp(limits.tiny)[1]
        lifted = times_power(matrix, power)
        clipped = _clip(lifted, times_power(bound, power))
        return matrix if clipped is lifted else times_power(clipped, -power)
    # a norm beyond the numbers of the dtype is no obstacle to an SVD, whose values are cut
    if min(matrix.shape) >= LARGE and frobenius(matrix) < torch.finfo(matrix.dtype).max:
        S, U, V = singular_triplet(matrix, LEADING, solver=BlockKrylov())
        # the difference below loses digits if σ₁ is much larger than the bound
        if S[-1] <= bound and S[0] <= 10 * bound:
            return matrix - (U * (S - bound).clamp_min(0)) @ V.mT
    U, S, V = factored(matrix)
    return matrix if S[0] <= bound else (U * S.clamp_max(bound)) @ V.mT
