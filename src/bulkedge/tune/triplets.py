"""Leading triplets of many weights, from step to step: what spectral optimisers ask for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import TOLERANCE, check_values, whole
from bulkedge.triplet import SingularTriplets, Status
from bulkedge.triplet.solver._start import generic

STACKED = 1 << 21
"""Weights of one shape are stacked into one batch while they have so many entries each or fewer."""


@dataclass
class _Group:
    """Weights of one shape, and the right vectors that their last solve left."""

    members: list[int]
    start: Tensor | None = None


class LeadingTriplets:
    """The k leading triplets of each of a list of weights, warm-started, with their residuals.

    For optimisers that need ``u₁v₁ᵀ`` or ``‖W‖₂`` of every weight at every step.  Weights change
    little from step to step, and so do their leading vectors: usually one iteration of the block
    does, two products with each weight.  Weights of one shape go through batched products.  Every
    value comes with its residual: whoever takes a fixed number of power iterations does not know
    what was computed.

    A weight of three or more dimensions is a batch of matrices.  For attention heads give views:
    ``weight.unflatten(0, (heads, -1))``.

    Cost of a call: two products of every weight with ``k + oversample`` vectors an iteration.

    Args:
        weights: Tensors of two or more dimensions; they are read anew at each call.
        k: How many triplets.
        rtol: Wanted residual, relative to σ₁.
        oversample: Vectors carried beyond k; the last is renewed at each call, so that a direction
            that overtakes the known ones is seen.
        max_steps: Iterations a call at most; ``Status.MAX_STEPS`` where they do not suffice.

    Raises:
        InputError: If a weight has fewer than two dimensions, or no entries, or k does not fit.

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
        weights: Sequence[Tensor],
        k: int = 1,
        *,
        rtol: float = 1e-2,
        oversample: int = 3,
        max_steps: int = 50,
    ) -> None:
        self.weights, self.k = list(weights), k
        sizes = {"oversample": (oversample, whole(0)), "max_steps": (max_steps, whole(1))}
        check_values(self, k=(k, whole(1)), rtol=(rtol, TOLERANCE), **sizes)
        self.rtol, self.oversample, self.max_steps = rtol, oversample, max_steps
        groups: dict[object, list[int]] = defaultdict(list)
        for i, weight in enumerate(self.weights):
            if weight.ndim < 2 or weight.numel() == 0 or not 1 <= k <= min(weight.shape[-2:]):
                raise InputError(
                    f"expected weights of shape (..., m, n) with min(m, n) ≥ {k}, got "
                    f"{tuple(weight.shape)} at {i}"
                )
            alone = weight.shape[-2:].numel() > STACKED
            key = (weight.shape[-2:], weight.dtype, weight.device)
            groups[(*key, i) if alone else key].append(i)
        self._groups = [_Group(members) for members in groups.values()]

    def __call__(self) -> list[SingularTriplets]:
        """The triplets of all weights as they are now, in their order; no gradient."""
        found: dict[int, SingularTriplets] = {}
        with torch.no_grad():
            for group in self._groups:
                batches = [_matrices(self.weights[i]) for i in group.members]
                W = batches[0] if len(batches) == 1 else torch.cat(batches)
                result, group.start = self._solve(W, group.start)
                sizes = [len(batch) for batch in batches]
                for i, part in zip(group.members, _split(result, sizes), strict=True):
                    found[i] = _shaped(part, self.weights[i].shape[:-2])
        return [found[i] for i in range(len(self.weights))]

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
        if start is None:
            return fresh
        return torch.cat([start[..., :-1], fresh[..., -1:]], dim=-1)

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


def _matrices(weight: Tensor) -> Tensor:
    """A batch of matrices, in float32 at least."""
    half = weight.dtype in (torch.float16, torch.bfloat16)
    return (weight.detach().float() if half else weight.detach()).reshape(-1, *weight.shape[-2:])


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
