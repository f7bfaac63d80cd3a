"""The leading triplets of many weights at every step, as spectral optimisers need them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Union

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import TOLERANCE, check_values, whole
from bulkedge._precision import full_precision
from bulkedge.triplet import SingularTriplets, Status
from bulkedge.triplet.solver._start import generic

from ._matrix import is_distributed, product_dtype, require_in_memory

Weights = Union[Sequence[Tensor], Callable[[], Sequence[Tensor]]]  # noqa: UP007 — Python 3.10
"""Weights, or a function that returns them."""
STACKED = 1 << 21
"""Weights of one shape are stacked into one batch if each has at most so many entries."""


class LeadingTriplets:
    """The k leading triplets of each of a list of weights, warm-started, with their residuals.

    For optimisers that need ``u₁v₁ᵀ`` or ``‖W‖₂`` of every weight at every step.  Weights change
    little from step to step, and so do their leading vectors: usually one block iteration suffices,
    which is two products with each weight.  Weights of one shape go through batched products.
    Every value comes with its residual, which a fixed number of power iterations does not give.

    Weights may change dtype or device between calls.  If a weight may be replaced by another
    tensor, give ``weights`` as a function.

    A weight of three or more dimensions is a batch of matrices.  For attention heads give views:
    ``weight.unflatten(0, (heads, -1))``.

    Cost of a call: two products of every weight with ``k + oversample`` vectors an iteration.

    Args:
        weights: Tensors of two or more dimensions, whose values are read at each call; or a
            function without arguments that returns them, called at each call: ``lambda:
            list(model.parameters())`` sees parameters that were replaced.
        k: How many triplets.
        rtol: Wanted residual, relative to σ₁.
        oversample: Vectors carried beyond k; the last is replaced by a generic one at each call, so
            that a direction that overtakes the known ones is found.
        max_steps: At most so many iterations a call; the status is ``Status.MAX_STEPS`` if they do
            not suffice.

    Raises:
        InputError: If a weight has fewer than two dimensions or no entries, or k exceeds a side;
            at a call, if a weight is not finite, not in memory, or spread over processes.

    References:
        Halko, Martinsson, Tropp, arXiv:0909.4061: the block iteration.

    Example:
        >>> weights = [torch.diag(torch.tensor([3.0, 1.0])), torch.ones(4, 2, 3)]
        >>> first, second = LeadingTriplets(weights)()
        >>> round(float(first.sigma[0]), 3), second.sigma.shape, second.u.shape
        (3.0, torch.Size([4, 1]), torch.Size([4, 2, 1]))
    """

    def __init__(
        self,
        weights: Weights,
        k: int = 1,
        *,
        rtol: float = 1e-2,
        oversample: int = 3,
        max_steps: int = 50,
    ) -> None:
        sizes = {"oversample": (oversample, whole(0)), "max_steps": (max_steps, whole(1))}
        check_values(self, k=(k, whole(1)), rtol=(rtol, TOLERANCE), **sizes)
        self._source, self.k = weights, k
        self.rtol, self.oversample, self.max_steps = rtol, oversample, max_steps
        self._starts: dict[tuple[int, ...], Tensor] = {}
        for i, weight in enumerate(self.weights):
            self._require_fit(i, weight)

    @property
    def weights(self) -> list[Tensor]:
        """The present weights."""
        return list(self._source() if callable(self._source) else self._source)

    def __call__(self) -> list[SingularTriplets]:
        """The triplets of the present weights, in their order, without a gradient."""
        found: dict[int, SingularTriplets] = {}
        weights = self.weights
        with torch.no_grad():
            for members in self._groups(weights):
                batches = [_matrices(weights[i]) for i in members]
                W = batches[0] if len(batches) == 1 else torch.cat(batches)
                _require_finite(members, batches, W)
                with full_precision(W.device):
                    result, self._starts[members] = self._solve_scaled(W, self._starts.get(members))
                sizes = [len(batch) for batch in batches]
                for i, part in zip(members, _split(result, sizes), strict=True):
                    found[i] = _reshape(part, weights[i].shape[:-2])
        return [found[i] for i in range(len(weights))]

    def _groups(self, weights: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """Indices of the weights that go through one batch: of one shape, dtype and device."""
        groups: dict[object, list[int]] = defaultdict(list)
        for i, weight in enumerate(weights):
            self._require_fit(i, weight)
            alone = weight.shape[-2:].numel() > STACKED
            key = (weight.shape[-2:], weight.dtype, weight.device)
            groups[(*key, i) if alone else key].append(i)
        return [tuple(members) for members in groups.values()]

    def _require_fit(self, i: int, weight: Tensor) -> None:
        """InputError unless a weight is a matrix or a batch of them, in memory as a whole."""
        fits = weight.ndim >= 2 and weight.numel() > 0 and self.k <= min(weight.shape[-2:])
        if not fits or not weight.is_floating_point():
            raise InputError(
                f"expected real weights of shape (..., m, n) with min(m, n) ≥ {self.k}, got "
                f"{tuple(weight.shape)} of {weight.dtype} at {i}"
            )
        require_in_memory(f"weight {i}", weight)
        if is_distributed(weight):
            raise InputError(
                f"weight {i}: expected a whole tensor, got one that is spread over processes; "
                "gather it first with full_tensor(), or take singular_triplet(sharded_map(weight))"
            )

    def _solve_scaled(self, W: Tensor, start: Tensor | None) -> tuple[SingularTriplets, Tensor]:
        """Solve; if squares of a matrix underflow, solve again for a multiple of it."""
        result, after = self._solve(W, start)
        limits = torch.finfo(W.dtype)
        if bool((result.sigma[..., 0] > limits.tiny**0.5 / limits.eps).all()):
            return result, after
        largest = W.abs().amax(dim=(-2, -1))
        _, power = torch.frexp(torch.where(largest > 0, largest, 1.0))
        half = power // 2  # in two steps, because 2**power may overflow
        halves = [2.0 ** x.to(W.dtype) for x in (half, power - half)]
        result, after = self._solve(_divide(W, halves), start)
        figures = {name: getattr(result, name) for name in ("sigma", "residuals", "gaps")}
        return replace(result, **{n: _multiply(x, halves) for n, x in figures.items()}), after

    def _solve(self, W: Tensor, start: Tensor | None) -> tuple[SingularTriplets, Tensor]:
        """Block iteration on a batch; the triplets, and where the next call begins."""
        columns = min(self.k + self.oversample, *W.shape[-2:])
        V = self._start_block(W, start, columns)
        step = 0
        while True:
            step += 1
            Q, _ = torch.linalg.qr(W @ V)
            Z, R = torch.linalg.qr(W.mT @ Q)  # QᵀW = Rᵀ Zᵀ
            X, S, Yt = torch.linalg.svd(R.mT)
            U, V = Q @ X, Z @ Yt.mT
            # Wᵀu = σv by construction: the residual is on the other side
            u, sigma, v = U[..., : self.k], S[..., : self.k], V[..., : self.k]
            residuals = torch.linalg.vector_norm(W @ v - u * sigma[..., None, :], dim=-2)
            converged = bool((residuals <= self.rtol * sigma[..., :1]).all())
            if converged or step >= self.max_steps:
                return self._result(U, S, V, residuals, step, converged), V

    def _start_block(self, W: Tensor, start: Tensor | None, columns: int) -> Tensor:
        """The vectors of the last call with a generic last one; all generic at the first call."""
        fresh = generic(W.shape[-1], columns, W).expand(len(W), -1, -1)
        if start is None or start.shape != fresh.shape:
            return fresh
        return torch.cat([start[..., :-1].to(fresh), fresh[..., -1:]], dim=-1)

    def _result(
        self, U: Tensor, S: Tensor, V: Tensor, residuals: Tensor, steps: int, converged: bool
    ) -> SingularTriplets:
        """The first k of a block; the value after them gives the gap of the last."""
        k = self.k
        below = torch.cat([S, torch.zeros_like(S[..., :1])], dim=-1)
        down = (below[..., :-1] - below[..., 1:])[..., :k]
        up = torch.cat([torch.full_like(down[..., :1], torch.inf), down[..., :-1]], dim=-1)
        return SingularTriplets(
            sigma=S[..., :k],
            u=U[..., :k],
            v=V[..., :k],
            residuals=residuals,
            gaps=torch.minimum(up, down),
            steps=steps,
            passes=3 * steps,
            status=Status.CONVERGED if converged else Status.MAX_STEPS,
        )


def _divide(W: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Each matrix of a batch divided by its factors, one after the other."""
    for factor in factors:
        W = W / factor[:, None, None]
    return W


def _multiply(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Each row of figures times its factors, one after the other."""
    for factor in factors:
        x = x * factor[:, None]
    return x


def _matrices(weight: Tensor) -> Tensor:
    """A weight as a batch of matrices, in float32 or float64."""
    weight = weight.detach().to(product_dtype(weight.dtype))
    return weight.reshape(-1, *weight.shape[-2:])


def _require_finite(members: Sequence[int], batches: Sequence[Tensor], W: Tensor) -> None:
    """InputError that names the first weight that is not finite."""
    if not bool(W.isfinite().all()):
        i = next(i for i, x in zip(members, batches, strict=True) if not bool(x.isfinite().all()))
        raise InputError(
            f"weight {i}: expected finite entries, got NaN or infinity; training has diverged: "
            "lower the learning rate, or go back to a checkpoint"
        )


def _split(result: SingularTriplets, sizes: list[int]) -> list[SingularTriplets]:
    """The result of a batch, split into parts of these sizes."""
    names = ("sigma", "u", "v", "residuals", "gaps")
    parts = zip(*(getattr(result, name).split(sizes) for name in names), strict=True)
    return [
        SingularTriplets(*part, steps=result.steps, passes=result.passes, status=result.status)
        for part in parts
    ]


def _reshape(result: SingularTriplets, batch: torch.Size) -> SingularTriplets:
    """The same with the batch dimensions of the weight; a matrix has none."""
    names = ("sigma", "u", "v", "residuals", "gaps")
    tensors = [getattr(result, name) for name in names]
    return SingularTriplets(
        *(x.reshape(*batch, *x.shape[1:]) for x in tensors),
        steps=result.steps,
        passes=result.passes,
        status=result.status,
    )
