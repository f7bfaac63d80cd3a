"""Weights held inside the spectral ball ‖W‖₂ ≤ bound, after each step of an optimiser."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from bulkedge._errors import InputError
from bulkedge._linmap import Dense
from bulkedge.triplet import singular_triplet, thin_svd

from ._track import as_matrix, fresh_start, track
from .norm import cap_factor, require_bound

Method = Literal["rescale", "clip"]


def project_spectral_ball(W: Tensor, bound: float = 1.0, method: Method = "clip") -> Tensor:
    """The matrix of the ball {‖X‖₂ ≤ bound} that belongs to W; no gradient.

    ``"clip"`` is the nearest one in the Frobenius norm: singular values above the bound become the
    bound, ``W − U (Σ − bound)₊ Vᵀ``.  ``"rescale"`` multiplies by ``min(1, bound/‖W‖₂)``: cheaper,
    further away, a retraction (docs/errata.md, A38).  Inside the ball both return W to the bit.

    Cost: ``"rescale"``, one leading triplet.  ``"clip"``, as many triplets as values exceed the
    bound, in rounds of 4, 16, …, or one SVD if they are more than a quarter.

    Args:
        W: Shape ``(m, n)``, or more dimensions, flattened after the first.
        bound: The largest norm allowed.
        method: Which projection.

    Returns:
        Shape and dtype of W.

    Raises:
        InputError: If the bound is not positive or the method unknown.

    Example:
        >>> W = torch.diag(torch.tensor([4.0, 1.0]))
        >>> project_spectral_ball(W, 2.0).tolist()
        [[2.0, 0.0], [0.0, 1.0]]
        >>> project_spectral_ball(W, 2.0, "rescale").tolist()
        [[2.0, 0.0], [0.0, 0.5]]
    """
    require_bound(bound)
    if method not in ("rescale", "clip"):
        raise InputError(f'expected method="rescale" or "clip", got {method!r}')
    with torch.no_grad():
        matrix = as_matrix(W.detach())
        matrix = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
        if method == "rescale":
            return (W * cap_factor(singular_triplet(matrix).sigma[0], bound)).to(W.dtype)
        return (W - _excess(matrix, bound).view_as(W)).to(W.dtype)


def hold_spectral_ball(
    optimizer: torch.optim.Optimizer,
    bound: float = 1.0,
    *,
    parameters: Iterable[Tensor] | None = None,
    method: Method = "clip",
    rtol: float = 1e-3,
) -> RemovableHandle:
    """Project weights onto the spectral ball after each step of ``optimizer``.

    Projected gradient descent: the step, then the projection; the gradient is that of the loss at
    the weight itself, nothing is differentiated through.  A warm-started triplet tells whether a
    weight left the ball, at four passes; only then is it touched, and only by what exceeds.

    Args:
        optimizer: Any optimiser of torch.
        bound: The largest norm allowed.
        parameters: Which weights; None for all of at least two dimensions.
        method: As :func:`project_spectral_ball`.
        rtol: Residual of the test relative to σ₁.

    Returns:
        A handle: ``handle.remove()`` ends it.

    Raises:
        InputError: If the bound is not positive, or the method unknown.

    Example:
        >>> layer = torch.nn.Linear(20, 10)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=10.0)
        >>> handle = hold_spectral_ball(optimizer, 2.0)
        >>> layer(torch.ones(4, 20)).square().sum().backward()
        >>> optimizer.step()
        >>> bool(torch.linalg.matrix_norm(layer.weight, 2) <= 2.0001)
        True
    """
    project_spectral_ball(torch.zeros(1, 1), bound, method)  # refuse now, not at the first step
    chosen = None if parameters is None else {id(parameter) for parameter in parameters}
    starts = WeakTensorKeyDictionary()

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    if weight.ndim >= 2 and (chosen is None or id(weight) in chosen):
                        _hold(weight, bound, method, rtol, starts)

    return optimizer.register_step_post_hook(hook)


def _hold(
    weight: Tensor, bound: float, method: Method, rtol: float, starts: WeakTensorKeyDictionary
) -> None:
    """Project one weight in place if it left the ball."""
    matrix = as_matrix(weight.detach())
    A = Dense(matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix)
    if weight not in starts:
        starts[weight] = fresh_start(A)
    result, starts[weight] = track(A, starts[weight], rtol=rtol)
    norm = result.sigma[0] + result.residuals[0]
    if norm <= bound:
        return
    if method == "rescale":
        weight.mul_(cap_factor(result.sigma[0], bound).to(weight.dtype))
    else:
        weight.sub_(_excess(A.matrix, bound).view_as(weight).to(weight.dtype))


def _excess(matrix: Tensor, bound: float) -> Tensor:
    """``U (Σ − bound)₊ Vᵀ``."""
    k, n = 4, min(matrix.shape)
    while True:
        if 4 * k >= n:
            U, S, V = thin_svd(matrix)
        else:
            found = singular_triplet(matrix, k)
            U, S, V = found.u, found.sigma, found.v
        if len(S) == n or bool(S[-1] <= bound):
            return (U * (S - bound).clamp_min(0)) @ V.mT
        k *= 4
