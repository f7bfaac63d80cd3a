"""Spikes lowered to a limit by the smallest change of the trained factors."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bulkedge._errors import InputError

from ._core_svd import Cores, accurate_spikes, spikes, stacked
from ._matrix import AdaptedMatrix, looked_up_once, storage_key

MARGIN = 1e-12
"""Spikes are lowered to this fraction below their limit: the rounding of spikes in float64."""
FIRST_MARGIN = 1 / 8
"""The part of the rounding of a dtype by which spikes are lowered further at first: the errors of
many entries cancel, so that the rounded factors mostly obey at once."""
MARGIN_GROWTH = 1.25
"""The factor by which the margin grows where rounding the factors led beyond the limit."""
FARTHEST = 1e12
"""A spike that many times its limit is that of a run that has diverged: the change that lowers it
cancels the factor to its rounding in float64, and what would be left of it is noise."""
FAR = 1e3
"""A spike that many times its limit hides those near the limit from a measurement by squares."""
PASSES = 100
"""How often lower spikes are written at most; it takes some ten passes in bfloat16 until the
rounded factors obey."""

Changeable = tuple[bool, bool]
"""Whether B and A may be changed."""
_Sides = tuple[tuple[object, ...], ...]


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
    with looked_up_once(matrices):
        found = spikes(matrices)
        gammas = {i: x for core in found for i, x in zip(core.members, core.gamma, strict=True)}
        beyond = [
            (i, core, place)
            for core in found
            for place, (i, bound) in enumerate(zip(core.members, core.bounds, strict=True))
            if not bound <= limits[i]
        ]
        changed = _clip(matrices, limits, beyond, gammas) if beyond else []
    return [gammas[i] for i in range(len(matrices))], changed


def strongest(gammas: Sequence[Tensor]) -> list[float]:
    """The first of each; a device is waited for once.

    Args:
        gammas: Each descending.

    Returns:
        Numbers, in the same order.
    """
    if not gammas:
        return []
    values = torch.cat([x.to(gammas[0].device) for x in gammas]).tolist()
    starts = itertools.accumulate((len(x) for x in gammas[:-1]), initial=0)
    return [values[start] for start in starts]


def _clip(
    matrices: Sequence[AdaptedMatrix],
    limits: Sequence[float],
    beyond: Sequence[tuple[int, Cores, int]],
    gammas: dict[int, Tensor],
) -> list[int]:
    """Lower those that exceed their limits; the indices of those that were changed.

    Args:
        matrices: All.
        limits: Of all.
        beyond: Those that may exceed their limits, and their places in what was measured; all
            others are known not to.
        gammas: The spikes of all, which are replaced where they are found more accurately.

    Returns:
        Indices.
    """
    changeable, batches = _sharing(_stored(matrices), tuple(x.trained for x in matrices))
    targets = [
        _Target(i, matrices[i], limits[i], changeable[i], core, place) for i, core, place in beyond
    ]
    changed = []
    for number, batch in enumerate(batches):
        own = [x for x in targets if x.index in batch]
        if number:  # they may have been lowered with another one
            own = _measured(own, spikes)
        own = _made_accurate(own)
        if number == 0:
            gammas |= {x.index: x.core.gamma[x.place] for x in own}
        own = [x for x in own if x.strength > 1]
        _write_lowered(own)
        changed += [x.index for x in own]
    return sorted(changed)


def first_of_tied(matrices: Sequence[AdaptedMatrix]) -> list[int]:
    """For each matrix the index of the first one with the same two factors, often its own."""
    first: dict[frozenset[object], int] = {}
    return [first.setdefault(pair, i) for i, pair in enumerate(_pairs(_stored(matrices)))]


def changeable_factors(matrices: Sequence[AdaptedMatrix]) -> list[Changeable]:
    """Which of B and A of each may be changed: trained, and not shared with another update."""
    return _sharing(_stored(matrices), tuple(x.trained for x in matrices))[0]


@functools.lru_cache(maxsize=4)
def _sharing(
    stored: tuple[_Sides, ...], trained: tuple[Changeable, ...]
) -> tuple[list[Changeable], list[list[int]]]:
    """What follows from where the factors are stored, which rarely changes from step to step.

    Args:
        stored: Where the parts of B and of A of each are.
        trained: Whether B and A of each are trained.

    Returns:
        Which of B and A may be changed, and indices in batches without ties.
    """
    pairs = _pairs(stored)
    owners: dict[object, set[frozenset[object]]] = defaultdict(set)
    for pair in pairs:
        for place in pair:
            owners[place].add(pair)
    own = [[all(len(owners[x]) == 1 for x in side) for side in sides] for sides in stored]
    changeable = [(a and x[0], b and x[1]) for (a, b), x in zip(trained, own, strict=True)]
    return changeable, _batches_without_ties(pairs)


@dataclass(frozen=True)
class _Target:
    """A matrix that may exceed its limit.

    Attributes:
        index: Which of all matrices it is.
        matrix: The matrix.
        limit: The limit of its spikes.
        changeable: Whether B and A may be changed.
        core: What was measured of it, among others.
        place: Its place there.
    """

    index: int
    matrix: AdaptedMatrix
    limit: float
    changeable: Changeable
    core: Cores
    place: int

    @property
    def strength(self) -> float:
        """The strongest spike over the limit."""
        return self.core.heads[self.place] / self.limit

    @property
    def eps(self) -> float:
        """The relative rounding of the dtype in which the factors are stored."""
        return max(torch.finfo(x.dtype).eps for side in self.matrix.leaves for x in side)

    @property
    def is_accurate(self) -> bool:
        """Whether what was measured says how to lower the spikes to within the rounding."""
        head, bound = self.core.heads[self.place], self.core.bounds[self.place]
        return bound <= head * (1 + FIRST_MARGIN / 4 * self.eps) and head <= FAR * self.limit


def _measured(
    targets: Sequence[_Target], measure: Callable[[Sequence[AdaptedMatrix]], list[Cores]]
) -> list[_Target]:
    """The same, measured now."""
    found = {
        i: (core, place)
        for core in measure([x.matrix for x in targets])
        for place, i in enumerate(core.members)
    }
    return [replace(x, core=found[i][0], place=found[i][1]) for i, x in enumerate(targets)]


def _made_accurate(targets: Sequence[_Target]) -> list[_Target]:
    """The same; those of which squares say too little are measured by SVDs."""
    unclear = [x for x in targets if not x.is_accurate]
    found = {x.index: x for x in _measured(unclear, accurate_spikes)}
    return [found.get(x.index, x) for x in targets]


def _write_lowered(targets: Sequence[_Target]) -> None:
    """Write factors with lower spikes, with a growing margin until the rounded ones obey."""
    for target in targets:
        _require_changeable(target)
        if not target.strength <= FARTHEST:
            raise _diverged(target)
    kinds = [(x.changeable, id(x.core)) for x in targets]
    groups = list(stacked([x.matrix.factors for x in targets], kinds))
    margins = [max(MARGIN, FIRST_MARGIN * x.eps) for x in targets]
    left = list(range(len(targets)))
    for _ in range(PASSES):
        aims = {i: max(0.0, targets[i].limit * (1 - margins[i])) for i in left}
        for members, B, A in groups:
            _write(targets, members, B, A, aims)
        excess = dict(zip(left, _excess([targets[i] for i in left]), strict=True))
        left = [i for i in left if excess[i] > -MARGIN / 10]
        if not left:
            return
        for i in left:
            margins[i] = MARGIN_GROWTH * (margins[i] + excess[i])
    raise _diverged(targets[left[0]])


def _write(
    targets: Sequence[_Target], members: list[int], B: Tensor, A: Tensor, aims: Mapping[int, float]
) -> None:
    """Write factors with spikes at their aims; those without an aim stay.

    Args:
        targets: All.
        members: Those that were measured together and whose factors have one shape.
        B: Their left factors before, one above the other.
        A: Their right factors before.
        aims: By the places of all.
    """
    rows = [row for row, i in enumerate(members) if i in aims]
    if not rows:
        return
    if len(rows) < len(members):
        B, A = B[rows], A[rows]
    own = [targets[members[row]] for row in rows]
    N, M = own[0].core.changes(
        [x.place for x in own], [aims[members[row]] for row in rows], own[0].changeable
    )
    for target, left, right in zip(own, B + B @ N, A + M @ A, strict=True):
        target.matrix.write(left, right)


def _excess(targets: Sequence[_Target]) -> list[float]:
    """By what part the strongest spike of each exceeds its limit now; or a bound on it."""
    now = _measured(targets, spikes)
    found = {x.index: x.core.bounds[x.place] / x.limit - 1 for x in now}
    unclear = [x for x in now if found[x.index] > -MARGIN / 10]
    found |= {x.index: x.strength - 1 for x in _measured(unclear, accurate_spikes)}
    return [found[x.index] for x in targets]


def _stored(matrices: Sequence[AdaptedMatrix]) -> tuple[_Sides, ...]:
    """Where the parts of B and of A of each are stored."""
    return tuple(tuple(tuple(map(storage_key, side)) for side in m.leaves) for m in matrices)


def _pairs(stored: Sequence[_Sides]) -> list[frozenset[object]]:
    """The factors of each, by where they are stored."""
    return [frozenset(itertools.chain(*sides)) for sides in stored]


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
