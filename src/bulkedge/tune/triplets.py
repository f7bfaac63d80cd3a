"""Leading triplets of many weights, from step to step: what spectral optimisers ask for."""

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

from ._matrix import is_distributed, require_in_memory

Weights = Union[Sequence[Tensor], Callable[[], Sequence[Tensor]]]  # noqa: UP007 — Python 3.10
STACKED = 1 << 21
"""Weights of one shape are stacked into one batch while they have so many entries each or fewer."""


class LeadingTriplets:
    """The k leading triplets of each of a list of weights, warm-started, with their residuals.

    For optimisers that need ``u₁v₁ᵀ`` or ``‖W‖₂`` of every weight at every step.  Weights change
    little from step to step, and so do their leading vectors: usually one iteration of the block
    does, two products with each weight.  Weights of one shape go through batched products.  Every
    value comes with its residual: whoever takes a fixed number of power iterations does not know
    what was computed.

    Weights may change dtype or device between calls; one that is replaced by another tensor is not
    seen, unless ``weights`` is a function that gives them.

    A weight of three or more dimensions is a batch of matrices.  For attention heads give views:
    ``weight.unflatten(0, (heads, -1))``.

    Cost of a call: two products of every weight with ``k + oversample`` vectors an iteration.

    Args:
        weights: Tensors of two or more dimensions, which are read anew at each call; or a function
            without arguments that gives them, called at each call: ``lambda:
            list(model.parameters())`` sees parameters that were replaced.
        k: How many triplets.
        rtol: Wanted residual, relative to σ₁.
        oversample: Vectors carried beyond k; the last is renewed at each call, so that a direction
            that overtakes the known ones is seen.
        max_steps: Iterations a call at most; ``Status.MAX_STEPS`` where they do not suffice.

    Raises:
        InputError: If a weight has fewer than two dimensions, or no entries, or k does not fit, or,
            when it is called, if one is not finite, not in memory, or spread over processes.

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
        self._given, self.k = weights, k
        self.rtol, self.oversample, self.max_steps = rtol, oversample, max_steps
        self._starts: dict[tuple[int, ...], Tensor] = {}
        for i, weight in enumerate(self.weights):
            self._require_fit(i, weight)

    @property
    def weights(self) -> list[Tensor]:
        """The weights as they are now."""
        return list(self._given() if callable(self._given) else self._given)

    def __call__(self) -> list[SingularTriplets]:
        """The triplets of all weights as they are now, in their order; no gradient."""
        found: dict[int, SingularTriplets] = {}
        weights = self.weights
        with torch.no_grad():
            for members in self._groups(weights):
                batches = [_matrices(weights[i]) for i in members]
                W = batches[0] if len(batches) == 1 else torch.cat(batches)
                _require_finite(members, batches, W)
                with full_precision(W.device):
                    result, self._starts[members] = self._scaled(W, self._starts.get(members))
                sizes = [len(batch) for batch in batches]
                for i, part in zip(members, _split(result, sizes), strict=True):
                    found[i] = _shaped(part, weights[i].shape[:-2])
        return [found[i] for i in range(len(weights))]

    def _groups(self, weights: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """Which weights go through one batch: those of one shape, dtype and device."""
        groups: dict[object, list[int]] = defaultdict(list)
        for i, weight in enumerate(weights):
            self._require_fit(i, weight)
            alone = weight.shape[-2:].numel() > STACKED
            key = (weight.shape[-2:], weight.dtype, weight.device)
            groups[(*key, i) if alone else key].append(i)
        return [tuple(members) for members in groups.values()]

    def _require_fit(self, i: int, weight: Tensor) -> None:
        """InputError unless a weight is a matrix, or a batch of them, in this process's memory."""
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

    def _scaled(self, W: Tensor, start: Tensor | None) -> tuple[SingularTriplets, Tensor]:
        """Solve; once more for multiples of matrices whose squares are too small for numbers."""
        result, after = self._solve(W, start)
        limits = torch.finfo(W.dtype)
        if bool((result.sigma[..., 0] > limits.tiny**0.5 / limits.eps).all()):
            return result, after
        largest = W.abs().amax(dim=(-2, -1))
        _, power = torch.frexp(torch.where(largest > 0, largest, 1.0))
        half = power // 2  # the whole power may be too large for a number
        halves = [2.0 ** x.to(W.dtype) for x in (half, power - half)]
        result, after = self._solve(_divided(W, halves), start)
        figures = {name: getattr(result, name) for name in ("sigma", "residuals", "gaps")}
        return replace(result, **{n: _multiplied(x, halves) for n, x in figures.items()}), after

    def _solve(self, W: Tensor, start: Tensor | None) -> tuple[SingularTriplets, Tensor]:
        """Block iteration on a batch; the triplets, and where the next call begins."""
        columns = min(self.k + self.oversample, *W.shape[-2:])
        V = self._begin(W, start, columns)
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

    def _begin(self, W: Tensor, start: Tensor | None, columns: int) -> Tensor:
        """The last call's vectors with a new last one; or vectors that no matrix is made for."""
        fresh = generic(W.shape[-1], columns, W).expand(len(W), -1, -1)
        if start is None or start.shape != fresh.shape:
            return fresh
        return torch.cat([start[..., :-1].to(fresh), fresh[..., -1:]], dim=-1)

    def _result(
        self, U: Tensor, S: Tensor, V: Tensor, residuals: Tensor, steps: int, converged: bool
    ) -> SingularTriplets:
        """The first k of a block; the next value tells the last gap."""
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


def _divided(W: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Each matrix of a batch over its factors, one after the other."""
    for factor in factors:
        W = W / factor[:, None, None]
    return W


def _multiplied(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Each row of figures times its factors, one after the other."""
    for factor in factors:
        x = x * factor[:, None]
    return x


def _matrices(weight: Tensor) -> Tensor:
    """A batch of matrices, in float32 at least."""
    half = weight.dtype in (torch.float16, torch.bfloat16)
    return (weight.detach().float() if half else weight.detach()).reshape(-1, *weight.shape[-2:])


def _require_finite(members: Sequence[int], batches: Sequence[Tensor], W: Tensor) -> None:
    """InputError that names the first weight that is not finite."""
    if not bool(W.isfinite().all()):
        i = next(i for i, x in zip(members, batches, strict=True) if not bool(x.isfinite().all()))
        raise InputError(
            f"weight {i}: expected finite entries, got NaN or infinity; training has diverged: "
            "lower the learning rate, or go back to a checkpoint"
        )


def _split(result: SingularTriplets, sizes: list[int]) -> list[SingularTriplets]:
    """A batch in parts of these sizes."""
    names = ("sigma", "u", "v", "residuals", "gaps")
    parts = zip(*(getattr(result, name).split(sizes) for name in names), strict=True)
    return [
        SingularTriplets(*part, steps=result.steps, passes=result.passes, status=result.status)
        for part in parts
    ]


def _shaped(result: SingularTriplets, batch: torch.Size) -> SingularTriplets:
    """The same with the weight's own batch in front; none for a matrix."""
    names = ("sigma", "u", "v", "residuals", "gaps")
    tensors = [getattr(result, name) for name in names]
    return SingularTriplets(
        *(x.reshape(*batch, *x.shape[1:]) for x in tensors),
        steps=result.steps,
        passes=result.passes,
        status=result.status,
    )
