"""Weights held inside the spectral ball ‖W‖₂ ≤ bound, after each step of an optimiser."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from bulkedge._errors import InputError
from bulkedge._guard import matrix as require_matrix
from bulkedge._guard import precise
from bulkedge._linmap import Dense
from bulkedge.triplet import BlockKrylov, singular_triplet, thin_svd
from bulkedge.triplet._tracing import require_numbers

from ._track import as_matrix, fresh_start, track
from .norm import cap_factor, require_bound

Method = Literal["rescale", "clip"]

FEW = 16  # triplets tried for a clip
LARGE = 512  # shorter side from which they are cheaper than a full SVD


@precise
def project_spectral_ball(W: Tensor, bound: float = 1.0, method: Method = "clip") -> Tensor:
    """The matrix of the ball {‖X‖₂ ≤ bound} that belongs to W; no gradient.

    ``"clip"`` is the nearest one in the Frobenius norm: singular values above the bound become the
    bound, ``W − U (Σ − bound)₊ Vᵀ``.  ``"rescale"`` multiplies by ``min(1, bound/‖W‖₂)``: cheaper,
    further away, a retraction (docs/errata.md, A38).  Inside the ball both return W to the bit.

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
    require_numbers(W, "project_spectral_ball")
    with torch.no_grad():
        matrix = as_matrix(require_matrix("W", W, dims=None).detach())
        if method == "rescale":
            return (W * cap_factor(singular_triplet(matrix).sigma[0], bound)).to(W.dtype)
        return _clipped(matrix, bound).view_as(W).to(W.dtype)


# it branches on singular values: it breaks a compiled graph, and the reason is given here
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

    Projected gradient descent: the step, then the projection; the gradient is that of the loss at
    the weight itself, nothing is differentiated through.  The weights are projected once now, so
    that the first forward is inside.  After a step a warm-started triplet tells whether a weight
    left the ball, at four passes; only then is it touched, and only by what exceeds.

    Held are the trainable weights of at least two dimensions, embeddings included, that the
    optimiser has now; groups added later are not.  Kernels are held in their reshaped form.

    ``"rescale"`` is the cheaper one, but shrinks all of a weight for one direction of it; with
    steps as large as Adam's that can cost accuracy (examples/lipschitz_digits).

    Args:
        optimizer: Any optimiser of torch.
        bound: The largest norm allowed.
        parameters: Which weights; None for all of at least two dimensions.
        method: As :func:`project_spectral_ball`.
        rtol: Residual of the test relative to σ₁.

    Returns:
        A handle: ``handle.remove()`` ends it.

    Raises:
        InputError: If the bound is not positive, the method unknown, or ``parameters`` are none of
            the optimiser's weights; and after a step, if a weight is not finite.

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
    held = _chosen(optimizer, parameters)
    starts = WeakTensorKeyDictionary()

    def hook(*_: Any) -> None:
        with torch.no_grad():
            for place, weight in held:
                try:
                    _hold(weight, bound, method, rtol, starts)
                except InputError as error:
                    raise InputError(f"{place} of shape {tuple(weight.shape)}: {error}") from error

    hook()
    return optimizer.register_step_post_hook(hook)


def _chosen(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor] | None
) -> list[tuple[str, Tensor]]:
    """The weights to hold, each with its place in the optimiser."""
    weights = [
        (f"parameter {i} of group {j}", weight)
        for j, group in enumerate(optimizer.param_groups)
        for i, weight in enumerate(group["params"])
        if weight.ndim >= 2 and weight.requires_grad
    ]
    if parameters is not None:
        wanted = {id(p) for p in ([parameters] if isinstance(parameters, Tensor) else parameters)}
        weights = [(place, weight) for place, weight in weights if id(weight) in wanted]
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
def _hold(
    weight: Tensor, bound: float, method: Method, rtol: float, starts: WeakTensorKeyDictionary
) -> None:
    """Project one weight in place if it left the ball."""
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
        weight.copy_(_clipped(A.matrix, bound).view_as(weight))


def _clipped(matrix: Tensor, bound: float) -> Tensor:
    """``U min(Σ, bound) Vᵀ``; the matrix itself inside the ball."""
    if min(matrix.shape) >= LARGE:
        S, U, V = singular_triplet(matrix, FEW, solver=BlockKrylov())
        # what is taken away must not be so large that rounding of it matters
        if S[-1] <= bound and S[0] <= 10 * bound:
            return matrix - (U * (S - bound).clamp_min(0)) @ V.mT
    U, S, V = thin_svd(matrix)
    return matrix if S[0] <= bound else (U * S.clamp_max(bound)) @ V.mT
