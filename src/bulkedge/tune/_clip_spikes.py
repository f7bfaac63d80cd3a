"""Spikes lowered to a limit by the smallest change of the trained factors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from bulkedge._errors import InputError

from ._core_svd import CoreSVD, core_svds
from ._matrix import AdaptedMatrix, storage_key

MARGIN = 1e-12
"""Spikes are lowered to this fraction below their limit: the rounding of spikes in float64."""
MARGIN_GROWTH = 1.25
"""The factor by which the margin grows where rounding the factors led beyond the limit."""
FARTHEST = 1e12
"""A spike that many times its limit is that of a run that has diverged: the change that lowers it
cancels the factor to its rounding in float64, and what would be left of it is noise."""
PASSES = 100
"""How often lower spikes are written at most; it takes some ten passes in bfloat16 until the
rounded factors obey."""

Changeable = tuple[bool, bool]
"""Whether B and A may be changed."""


def clip_spikes(
    matrices: Sequence[AdaptedMatrix], limits: Sequence[float]
) -> tuple[list[Tensor], list[int]]:
    """Set ``γ_j(s·B·A) ← min(γ_j, limit)``: no spike of the stored factors exceeds its limit.

    The factors are rounded to their own dtype when they are written.  So the spikes are measured
    again afterwards, and where one exceeds its limit the margin is enlarged.

    Matrices with the same two factors (tied ones) are treated one after the other, so that a change
    for one of them counts for the next.  A factor that matrices with different partners share is
    left alone, as a frozen one is: a change that lowers one update may raise another.

    Args:
        matrices: The matrices.
        limits: The strength that no spike may exceed, for each matrix.

    Returns:
        The spikes of each matrix before, and the indices of the matrices that were changed.

    Raises:
        InputError: If a factor is not finite, or a limit is exceeded and no factor may be changed,
            or by so much that training has diverged.
    """
    before = core_svds(matrices)
    gammas = [svd.gamma for svd in before]
    if all(float(gamma[0]) <= limit for gamma, limit in zip(gammas, limits, strict=True)):
        return gammas, []
    changeable = changeable_factors(matrices)
    changed = []
    for number, batch in enumerate(_batches_without_ties(_factor_pairs(matrices))):
        now = core_svds([matrices[i] for i in batch]) if number else [before[i] for i in batch]
        targets = [
            _Target(matrices[i], limits[i], changeable[i], svd)
            for i, svd in zip(batch, now, strict=True)
        ]
        _write_lowered([target for target in targets if target.exceeds])
        changed += [i for i, target in zip(batch, targets, strict=True) if target.exceeds]
    return gammas, changed


def first_of_tied(matrices: Sequence[AdaptedMatrix]) -> list[int]:
    """For each matrix the index of the first one with the same two factors, often its own."""
    first: dict[frozenset[object], int] = {}
    return [first.setdefault(pair, i) for i, pair in enumerate(_factor_pairs(matrices))]


def changeable_factors(matrices: Sequence[AdaptedMatrix]) -> list[Changeable]:
    """Which of B and A of each may be changed: trained, and not shared with another update."""
    pairs = _factor_pairs(matrices)
    owners: dict[object, set[frozenset[object]]] = defaultdict(set)
    for pair in pairs:
        for storage in pair:
            owners[storage].add(pair)

    def changeable(matrix: AdaptedMatrix) -> Changeable:
        own = [all(len(owners[storage_key(x)]) == 1 for x in side) for side in matrix.leaves]
        trained = matrix.trained
        return trained[0] and own[0], trained[1] and own[1]

    return [changeable(matrix) for matrix in matrices]


@dataclass(frozen=True)
class _Target:
    """A matrix, the limit of its spikes, which factors may be changed, and its SVD."""

    matrix: AdaptedMatrix
    limit: float
    changeable: Changeable
    svd: CoreSVD

    @property
    def exceeds(self) -> bool:
        """Whether the strongest spike exceeds the limit."""
        return float(self.svd.gamma[0]) > self.limit

    @property
    def strength(self) -> float:
        """The strongest spike over the limit."""
        return float(self.svd.gamma[0]) / self.limit


def _write_lowered(targets: Sequence[_Target]) -> None:
    """Write factors with lower spikes, with a growing margin until the rounded ones obey."""
    for target in targets:
        _require_changeable(target)
        if not target.strength <= FARTHEST:
            raise _diverged(target)
    stored = [tuple(x.clone() for x in target.matrix.factors) for target in targets]
    margins = [MARGIN] * len(targets)
    left = list(range(len(targets)))
    for _ in range(PASSES):
        for i in left:
            target, (B, A) = targets[i], stored[i]
            aim = max(0.0, target.limit * (1 - margins[i]))
            target.matrix.write(*target.svd.lowered(B, A, aim, target.changeable))
        now = core_svds([targets[i].matrix for i in left])
        excess = {
            i: float(svd.gamma[0]) / targets[i].limit - 1 for i, svd in zip(left, now, strict=True)
        }
        left = [i for i in left if excess[i] > -MARGIN / 10]
        if not left:
            return
        for i in left:
            margins[i] = MARGIN_GROWTH * (margins[i] + excess[i])
    raise _diverged(targets[left[0]])


def _factor_pairs(matrices: Sequence[AdaptedMatrix]) -> list[frozenset[object]]:
    """The factors of each, by where they are stored."""
    return [frozenset(storage_key(x) for side in m.leaves for x in side) for m in matrices]


def _batches_without_ties(pairs: Sequence[frozenset[object]]) -> list[list[int]]:
    """Indices of matrices in batches, each without two matrices of the same factors."""
    batches: list[list[int]] = []
    count: dict[frozenset[object], int] = defaultdict(int)
    for i, pair in enumerate(pairs):
        if count[pair] == len(batches):
            batches.append([])
        batches[count[pair]].append(i)
        count[pair] += 1
    return batches


def _require_changeable(target: _Target) -> None:
    """InputError unless one of the factors may be changed."""
    if not any(target.changeable):
        raise InputError(
            f"{target.matrix.name}: expected a factor that is trained and its own, got two that "
            f"are frozen or shared with other layers, and a spike {target.strength:.3g} times its "
            "limit; train one of them, or leave the layer out with exclude="
        )


def _diverged(target: _Target) -> InputError:
    """The error for factors that cannot be brought below the limit."""
    return InputError(
        f"{target.matrix.name}: expected spikes that can be lowered to their limit, got one "
        f"{target.strength:.3g} times as strong; training has diverged: lower the learning rate, "
        "or go back to a checkpoint"
    )
