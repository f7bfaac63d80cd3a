"""Spikes held below a limit by changing what is trained, and nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from bulkedge._errors import InputError

from ._matrix import AdaptedMatrix, storage_of
from ._spikes import Spikes, spikes_of

GUARD = 1e-12
"""By so much less than the limit is aimed at: the rounding of spikes in float64."""
GROWTH = 1.25
"""By how much the distance to the limit grows where rounding the factors led beyond it."""
FARTHEST = 1e12
"""A spike that many times its limit is that of a run that has diverged: in float64 the change that
lowers it cancels the factor to its rounding, and what would be left of it is noise."""
PASSES = 100
"""How often lower spikes are written at most before the rounded factors obey; it takes some ten in
bfloat16."""

Free = tuple[bool, bool]


def hold(
    matrices: Sequence[AdaptedMatrix], limits: Sequence[float]
) -> tuple[list[Tensor], list[int]]:
    """Set ``γ_j(s·B·A) ← min(γ_j, limit)``: no spike of the stored factors exceeds its limit.

    The factors are rounded when they are written, to their own dtype.  So the spikes are measured
    again afterwards, and where one is beyond its limit a little less is aimed at.

    Matrices with the same two factors (tied ones) are held one after the other, so that what one of
    them brought about counts for the next.  A factor that matrices with different partners share is
    left alone, as a frozen one is: a change that lowers one update may raise another.

    Args:
        matrices: The matrices.
        limits: What no spike may exceed, one for each.

    Returns:
        The spikes of all before, and which matrices were changed.

    Raises:
        InputError: If a factor is not finite, or a limit is exceeded and no factor may be changed,
            or by so much that training has diverged.
    """
    before = spikes_of(matrices)
    gammas = [spikes.gamma for spikes in before]
    if all(float(gamma[0]) <= limit for gamma, limit in zip(gammas, limits, strict=True)):
        return gammas, []
    free = free_factors(matrices)
    changed = []
    for number, turn in enumerate(_turns(_pairs(matrices))):
        found = spikes_of([matrices[i] for i in turn]) if number else [before[i] for i in turn]
        cases = [
            _Case(matrices[i], limits[i], free[i], spikes)
            for i, spikes in zip(turn, found, strict=True)
        ]
        _lower([case for case in cases if case.exceeds])
        changed += [i for i, case in zip(turn, cases, strict=True) if case.exceeds]
    return gammas, changed


def partners_of(matrices: Sequence[AdaptedMatrix]) -> list[int]:
    """The first matrix with the same two factors, for each: itself, or the one it is tied to."""
    first: dict[frozenset[object], int] = {}
    return [first.setdefault(pair, i) for i, pair in enumerate(_pairs(matrices))]


def free_factors(matrices: Sequence[AdaptedMatrix]) -> list[Free]:
    """Which of B and A of each may be changed: trained, and not shared with another update."""
    pairs = _pairs(matrices)
    owners: dict[object, set[frozenset[object]]] = defaultdict(set)
    for pair in pairs:
        for storage in pair:
            owners[storage].add(pair)

    def free(matrix: AdaptedMatrix) -> Free:
        own = [len(owners[storage_of(x)]) == 1 for x in matrix.parameters]
        trained = matrix.trained
        return trained[0] and own[0], trained[1] and own[1]

    return [free(matrix) for matrix in matrices]


@dataclass(frozen=True)
class _Case:
    """A matrix, what no spike of it may exceed, what may be changed, and its spikes."""

    matrix: AdaptedMatrix
    limit: float
    free: Free
    spikes: Spikes

    @property
    def exceeds(self) -> bool:
        """Whether the strongest spike is beyond the limit."""
        return float(self.spikes.gamma[0]) > self.limit

    @property
    def strength(self) -> float:
        """The strongest spike over the limit."""
        return float(self.spikes.gamma[0]) / self.limit


def _lower(cases: Sequence[_Case]) -> None:
    """Write lower spikes, aiming at less until the rounded factors obey."""
    for case in cases:
        _require_free(case)
        if not case.strength <= FARTHEST:
            raise _diverged(case)
    stored = [tuple(x.clone() for x in case.matrix.factors) for case in cases]
    below = [GUARD] * len(cases)
    left = list(range(len(cases)))
    for _ in range(PASSES):
        for i in left:
            aim = max(0.0, cases[i].limit * (1 - below[i]))
            B, A = stored[i]
            cases[i].matrix.write(*cases[i].spikes.lowered(B, A, aim, cases[i].free))
        now = spikes_of([cases[i].matrix for i in left])
        excess = {i: float(x.gamma[0]) / cases[i].limit - 1 for i, x in zip(left, now, strict=True)}
        left = [i for i in left if excess[i] > -GUARD / 10]
        if not left:
            return
        for i in left:
            below[i] = GROWTH * (below[i] + excess[i])
    raise _diverged(cases[left[0]])


def _pairs(matrices: Sequence[AdaptedMatrix]) -> list[frozenset[object]]:
    """The two factors of each, by where they are stored."""
    return [frozenset(storage_of(x) for x in matrix.parameters) for matrix in matrices]


def _turns(pairs: Sequence[frozenset[object]]) -> list[list[int]]:
    """Indices of matrices in turns, in which no two have the same factors."""
    turns: list[list[int]] = []
    count: dict[frozenset[object], int] = defaultdict(int)
    for i, pair in enumerate(pairs):
        if count[pair] == len(turns):
            turns.append([])
        turns[count[pair]].append(i)
        count[pair] += 1
    return turns


def _require_free(case: _Case) -> None:
    """InputError unless one of the factors may be changed."""
    if not any(case.free):
        raise InputError(
            f"{case.matrix.name}: expected a factor that is trained and its own, got two that are "
            f"frozen or shared with other layers, and a spike {case.strength:.3g} times its limit; "
            "train one of them, or leave the layer out with modules="
        )


def _diverged(case: _Case) -> InputError:
    """The error for factors that cannot be brought below the limit."""
    return InputError(
        f"{case.matrix.name}: expected spikes that can be lowered to their limit, got one "
        f"{case.strength:.3g} times as strong; training has diverged: lower the learning rate, or "
        "go back to a checkpoint"
    )
