"""The update that keeps the task's outputs and the base's: one linear solve for each layer.

With the second moments of a layer's inputs on text of the kind to be kept, ``C_b``, and on the
task's, ``C_t``, each scaled to mean diagonal 1 and with a ridge on it,

    min over D'  ‖(D' − ΔW) C_t^½‖² + λ ‖D' C_b^½‖²    ⇒    D' = ΔW T,   T = C_t (C_t + λ C_b)⁻¹.

T acts on the input side, so an update ``s·B·A`` becomes ``s·B·(A T)``: the rank stays, B stays.
Where both moments are sketches or diagonals, ``C_t + λ C_b = S (I + F Fᵀ) S`` with S diagonal and F
of a few columns, and its inverse is that of Woodbury: nothing of the size n² is formed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._linmap import LowRank
from bulkedge._precision import exact
from bulkedge.moments import Moment, Sketch, diagonal, right_times, to_dense

RIDGE = 0.03
"""Part of the mean diagonal that is added to both moments, for directions that few texts have used:
the task and what is kept are those of a tenth or a hundredth of it, the update is smaller."""
KEPT = 2
"""Number of factorised pairs of moments that are kept: the projections of one attention share a
pair, and one other layer may come between them."""
MOST_STRENGTH = 1e100
"""The largest strength of a layer: with more, what is computed with it overflows."""
NOT_POSITIVE = "expected moments that are positive, got one that is not; measure it again"

T = TypeVar("T")
Solve = Callable[[Tensor], Tensor]
"""``A ↦ A T`` in float64."""


@dataclass(frozen=True)
class Scaled:
    """A moment with mean diagonal 1 and a ridge on it, not formed.

    Attributes:
        moment: As it was measured, in any form.
        mean: Of its diagonal.
        ridge: Added to the diagonal, in parts of its mean.

    Raises:
        InputError: If the mean is not positive.
    """

    moment: Moment
    mean: float
    ridge: float

    @classmethod
    def of(cls, moment: Moment, ridge: float = RIDGE) -> Scaled:
        """A measured moment, scaled."""
        mean = float(exact(diagonal(moment)).mean())
        if not mean > 0:
            raise InputError("expected inputs that are not all zero, got a moment of zero")
        return cls(moment, mean, ridge)

    def times(self, A: Tensor) -> Tensor:
        """``A C``."""
        return right_times(A, self.moment) / self.mean + self.ridge * A

    def dense(self) -> Tensor:
        """C, shape ``(n, n)``, a new tensor in float64."""
        C = exact(to_dense(self.moment)) / self.mean
        C.diagonal().add_(self.ridge)
        return C

    def rest(self) -> Tensor:
        """The diagonal part of a diagonal or a sketch, shape ``(n,)``."""
        rest = self.moment.rest if isinstance(self.moment, Sketch) else self.moment
        return exact(rest) / self.mean + self.ridge

    def half(self) -> Tensor:
        """``V values^½``, shape ``(n, r)``, of a sketch; without columns of a diagonal."""
        if isinstance(self.moment, Sketch):
            values = exact(self.moment.values) / self.mean
            return exact(self.moment.vectors) * values.clamp_min(0.0).sqrt()
        return self.moment.new_zeros(len(self.moment), 0, dtype=torch.float64)

    @property
    def thin(self) -> bool:
        """Whether it is a diagonal and a few columns."""
        return isinstance(self.moment, Sketch) or self.moment.ndim == 1


def protected(
    A: Tensor, base: Moment, task: Moment | None, strength: float, ridge: float = RIDGE
) -> Tensor:
    """``A T`` with ``T = C_t (C_t + λ C_b)⁻¹``.

    Cost: one Cholesky factorisation in float64, n³/3; of sketches of k vectors together one thin
    SVD, ``6 n k²``; of diagonals nothing.

    Args:
        A: Shape ``(r, n)``.
        base: ``C_b``: shape ``(n, n)``, or ``(n,)`` if it is diagonal, or a sketch.
        task: ``C_t``, likewise; the identity if None.
        strength: λ ≥ 0.
        ridge: Added to the diagonals of both, in parts of their means.

    Returns:
        Shape ``(r, n)``, float64; A itself for λ = 0.

    Raises:
        InputError: If a moment is zero or not positive.

    Example:
        >>> A, C = torch.eye(2), torch.diag(torch.tensor([2.0, 0.0]))
        >>> protected(A, C, None, 1.0).diagonal().round(decimals=2).tolist()
        [0.34, 0.97]
    """
    if strength == 0:
        return exact(A)
    return solver(*pair_of(base, task, ridge), strength)(exact(A))


def pair_of(base: Moment, task: Moment | None, ridge: float = RIDGE) -> tuple[Scaled, Scaled]:
    """Both moments scaled, the identity standing in for a task that was not measured."""
    if task is None:
        task = torch.ones_like(diagonal(base), dtype=torch.float64)
    return Scaled.of(base, ridge), Scaled.of(task, ridge)


def solver(base: Scaled, task: Scaled, strength: float) -> Solve:
    """Factorise a pair of moments once, for as many updates as use it.

    Args:
        base: ``C_b``.
        task: ``C_t``.
        strength: λ > 0.

    Returns:
        The function ``A ↦ A T``.

    Raises:
        InputError: If ``C_t + λ C_b`` is not positive definite, or λ too large.
    """
    if not strength <= MOST_STRENGTH:
        raise InputError(
            f"expected a strength of at most {MOST_STRENGTH:g} in a layer, got {strength:g}; give "
            "a smaller one"
        )
    if base.thin and task.thin:
        half = torch.cat([task.half(), strength**0.5 * base.half()], dim=1)
        if half.shape[1] < half.shape[0]:
            return _by_woodbury(task, task.rest() + strength * base.rest(), half)
    factor, failed = torch.linalg.cholesky_ex(task.dense().add_(base.dense(), alpha=strength))
    if int(failed):
        raise InputError(NOT_POSITIVE)
    return lambda A: torch.cholesky_solve(task.times(A).mT, factor).mT


def _by_woodbury(task: Scaled, rest: Tensor, half: Tensor) -> Solve:
    """``A C_t (S² + H Hᵀ)⁻¹`` with S² the diagonal ``rest``, by ``S⁻¹ H = P Σ Qᵀ``."""
    if not bool((rest > 0).all()):
        raise InputError(NOT_POSITIVE)
    S = rest.sqrt()
    if half.shape[1] == 0:
        return lambda A: task.times(A) / rest
    P, sigma, _ = torch.linalg.svd(half / S[:, None], full_matrices=False)
    share = sigma.square() / (1 + sigma.square())

    def solve(A: Tensor) -> Tensor:
        X = task.times(A) / S
        return (X - (X @ P * share) @ P.mT) / S

    return solve


class Pairs(Generic[T]):
    """What is made of a pair of moments, made once for all layers that share the pair.

    A pair is known by the identity of its tensors, which are held as long as it is kept.

    Args:
        make: What to make of both moments, scaled, and of what else is asked with.
        device: Where to compute.
        ridge: Of both moments.
    """

    def __init__(self, make: Callable[..., T], device: torch.device, ridge: float = RIDGE) -> None:
        self._make, self._device, self._ridge = make, device, ridge
        self._kept: OrderedDict[tuple[Any, ...], tuple[Moment, Moment | None, T]] = OrderedDict()

    def __call__(self, base: Moment, task: Moment | None, *more: float) -> T:
        """What was made of a pair.

        Args:
            base: ``C_b`` as it was measured.
            task: ``C_t``; None for the identity.
            more: Passed on; part of what a pair is known by.

        Returns:
            The same object as long as no more than :data:`KEPT` others were asked for.
        """
        key = id(base), id(task), *more
        if key not in self._kept:
            while len(self._kept) >= KEPT:  # before the next one takes its memory
                self._kept.popitem(last=False)
            at = None if task is None else task.to(self._device)
            made = self._make(*pair_of(base.to(self._device), at, self._ridge), *more)
            self._kept[key] = base, task, made
        self._kept.move_to_end(key)
        return self._kept[key][2]


def moved(update: Tensor | LowRank, moment: Moment) -> float:
    """``tr(ΔW C ΔWᵀ) = E‖ΔW x‖²``, of factors by thin products.

    Args:
        update: Shape ``(m, n)``, or ``s·B·A``.
        moment: C.

    Returns:
        The mean square.

    Example:
        >>> moved(2 * torch.eye(2), torch.eye(2))
        8.0
    """
    if isinstance(update, LowRank):
        A, B = exact(update.A), exact(update.B)
        inner = right_times(A, moment) @ A.mT
        return float(update.scale**2 * ((B.mT @ B) * inner).sum())
    W = exact(update)
    return float((W * right_times(W, moment)).sum())


def drift(update: Tensor | LowRank, W0: Tensor, moment: Moment) -> float:
    """``tr(ΔW C ΔWᵀ) / tr(W0 C W0ᵀ)``: what part of a layer's output an update changes.

    Args:
        update: ΔW, shape ``(m, n)``.
        W0: The base.
        moment: Second moment of its inputs.

    Returns:
        The ratio of mean squares.

    Example:
        >>> drift(torch.eye(2), 2 * torch.eye(2), torch.eye(2))
        0.25
    """
    there, gone = moved(W0, moment), moved(update, moment)
    return gone / there if there else float("inf") if gone else 0.0


def difference(now: Tensor | LowRank, before: Tensor | LowRank) -> Tensor | LowRank:
    """``now − before`` of two updates of one form, of factors in the sum of their ranks.

    Args:
        now: An update.
        before: Another.

    Returns:
        The difference.

    Raises:
        TypeError: If one is full and the other is not.

    Example:
        >>> B, A = torch.ones(2, 1), torch.ones(1, 3)
        >>> difference(LowRank(B, 3 * A), LowRank(2 * B, A)).to_dense().tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    if isinstance(now, LowRank) and isinstance(before, LowRank):
        if torch.equal(now.B, before.B.to(now.B)) and now.scale == before.scale:
            return LowRank(now.B, now.A - before.A.to(now.A), now.scale)
        wide = torch.cat([now.scale * now.B, -before.scale * before.B.to(now.B)], dim=1)
        return LowRank(wide, torch.cat([now.A, before.A.to(now.A)]))
    if isinstance(now, Tensor) and isinstance(before, Tensor):
        return now - before
    raise TypeError("expected two updates of one form")
