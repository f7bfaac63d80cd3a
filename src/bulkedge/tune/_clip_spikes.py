"""Spikes lowered to a limit by the smallest change of the trained factors."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._precision import exact

from ._core_svd import CoreSVD, core_svds, lowered
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
        before = core_svds(matrices)
        gammas = [svd.gamma for svd in before]
        found = zip(strongest(gammas), limits, strict=True)
        changed = _clip(matrices, limits, before) if any(x > limit for x, limit in found) else []
    return gammas, changed


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
    matrices: Sequence[AdaptedMatrix], limits: Sequence[float], before: Sequence[CoreSVD]
) -> list[int]:
    """Lower all that exceed their limits; the indices of those that were changed."""
    stored = _stored(matrices)
    changeable = _changeable(matrices, stored)
    changed = []
    for number, batch in enumerate(_batches_without_ties(_pairs(stored))):
        now = core_svds([matrices[i] for i in batch]) if number else [before[i] for i in batch]
        heads = strongest([svd.gamma for svd in now])
        targets = {
            i: _Target(matrices[i], limits[i], changeable[i], svd, head / limits[i])
            for i, svd, head in zip(batch, now, heads, strict=True)
            if head > limits[i]
        }
        _write_lowered(list(targets.values()))
        changed += targets
    return changed


def first_of_tied(matrices: Sequence[AdaptedMatrix]) -> list[int]:
    """For each matrix the index of the first one with the same two factors, often its own."""
    first: dict[frozenset[object], int] = {}
    return [first.setdefault(pair, i) for i, pair in enumerate(_pairs(_stored(matrices)))]


def changeable_factors(matrices: Sequence[AdaptedMatrix]) -> list[Changeable]:
    """Which of B and A of each may be changed: trained, and not shared with another update."""
    return _changeable(matrices, _stored(matrices))


def _changeable(matrices: Sequence[AdaptedMatrix], stored: Sequence[_Sides]) -> list[Changeable]:
    """The same, of factors whose places are known."""
    owners: dict[object, set[frozenset[object]]] = defaultdict(set)
    for pair in _pairs(stored):
        for place in pair:
            owners[place].add(pair)
    found = []
    for matrix, sides in zip(matrices, stored, strict=True):
        own = [all(len(owners[place]) == 1 for place in side) for side in sides]
        trained = matrix.trained
        found.append((trained[0] and own[0], trained[1] and own[1]))
    return found


@dataclass(frozen=True)
class _Target:
    """A matrix, the limit of its spikes, which factors may be changed, its SVD, how far it is.

    ``strength`` is the strongest spike over the limit.
    """

    matrix: AdaptedMatrix
    limit: float
    changeable: Changeable
    svd: CoreSVD
    strength: float


def _write_lowered(targets: Sequence[_Target]) -> None:
    """Write factors with lower spikes, with a growing margin until the rounded ones obey."""
    for target in targets:
        _require_changeable(target)
        if not target.strength <= FARTHEST:
            raise _diverged(target)
    groups = _alike(targets)
    left = list(range(len(targets)))
    margins = [0.0] * len(targets)
    for group in groups:
        for i in group.members:
            margins[i] = max(MARGIN, FIRST_MARGIN * group.eps)
    for _ in range(PASSES):
        aims = {i: max(0.0, targets[i].limit * (1 - margins[i])) for i in left}
        for group in groups:
            group.write(aims)
        now = core_svds([targets[i].matrix for i in left])
        heads = strongest([svd.gamma for svd in now])
        excess = {i: x / targets[i].limit - 1 for i, x in zip(left, heads, strict=True)}
        left = [i for i in left if excess[i] > -MARGIN / 10]
        if not left:
            return
        for i in left:
            margins[i] = MARGIN_GROWTH * (margins[i] + excess[i])
    raise _diverged(targets[left[0]])


@dataclass(frozen=True)
class _Alike:
    """Matrices whose factors have the same shapes, which are lowered together.

    Attributes:
        targets: All that exceed their limits.
        members: Which of them are these.
        factors: Their B and A before, one above the other, float64.
        eps: The relative rounding of the dtype in which they are stored.
    """

    targets: Sequence[_Target]
    members: list[int]
    factors: tuple[Tensor, Tensor]
    eps: float

    def write(self, aims: Mapping[int, float]) -> None:
        """Write factors with spikes at their aims; those without an aim stay."""
        if not (places := [j for j, i in enumerate(self.members) if i in aims]):
            return
        chosen = [self.targets[self.members[j]] for j in places]
        B, A = self.factors
        if len(places) < len(self.members):
            B, A = B[places], A[places]
        found = lowered(
            [x.svd for x in chosen], B, A, [aims[self.members[j]] for j in places],
            chosen[0].changeable,
        )  # fmt: skip
        for target, own_B, own_A in zip(chosen, *found, strict=True):
            target.matrix.write(own_B, own_A)


def _alike(targets: Sequence[_Target]) -> list[_Alike]:
    """Groups of those whose factors have one shape, dtype and device, and may be changed alike."""
    groups: dict[object, list[int]] = defaultdict(list)
    factors = [target.matrix.factors for target in targets]
    for i, (B, A) in enumerate(factors):
        key = B.shape, A.shape, B.dtype, A.dtype, A.device, targets[i].changeable
        groups[key].append(i)
    found = []
    for members in groups.values():
        B, A = (exact(torch.stack([factors[i][side] for i in members])) for side in (0, 1))
        eps = max(torch.finfo(x.dtype).eps for x in factors[members[0]])
        found.append(_Alike(targets, members, (B, A), eps))
    return found


def _stored(matrices: Sequence[AdaptedMatrix]) -> list[_Sides]:
    """Where the parts of B and of A of each are stored."""
    return [tuple(tuple(map(storage_key, side)) for side in m.leaves) for m in matrices]


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
