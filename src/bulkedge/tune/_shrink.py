"""An update brought back to a limit of drift by the smallest change of its weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._precision import exact

from ._clip_spikes import FARTHEST, MARGIN_GROWTH, PASSES, Changeable
from ._core_svd import RANK_TOLERANCE
from ._drift import Grams, LayerDrift, measure, precise

MARGIN = 1e-6
"""Drift is lowered to this fraction below its limit: the rounding of products in float32."""
FINE = 1e-3
"""A rounding by less is a margin; by more it is measured."""
NEWTON_STEPS = 60
"""How many steps find λ at most; about six do."""


@dataclass(frozen=True)
class Target:
    """A layer whose drift exceeds the limit.

    Attributes:
        layer: The layer.
        drift: Its drift.
        changeable: Whether B and A may be changed.
        scale: Whether the update is scaled as a whole: its factors are those of other layers, too,
            and a change of shape for one might raise the drift of another.
        grams: What the drift is made of, as it was measured; measured anew if None.
    """

    layer: LayerDrift
    drift: float
    changeable: Changeable
    scale: bool
    grams: Grams | None = None


def lower(targets: Sequence[Target], limit: float) -> None:
    """Write the nearest factors whose drift is at the limit, as they are rounded.

    Single and double precision round by so little that the margin is known beforehand; other
    factors are measured again once they are written.

    Args:
        targets: Layers of which no two share both factors.
        limit: The limit.

    Raises:
        InputError: If neither factor of one may be changed, or its drift cannot be lowered.
    """
    for target in targets:
        _require_possible(target, limit)
    with precise([target.layer for target in targets]):
        found = directions(targets)
    margins = [max(MARGIN, one.rounding * (one.rounding <= FINE)) for one in found]
    left = list(range(len(targets)))
    for turn in range(PASSES):
        _write([found[i] for i in left], [max(0.0, limit * (1 - margins[i])) for i in left])
        if turn == 0:
            left = [i for i in left if found[i].rounding > FINE]
        if not left:
            return
        now = dict(zip(left, measure([targets[i].layer for i in left]), strict=True))
        left = [i for i in left if now[i] > limit]
        if not left:
            return
        for i in left:
            margins[i] = MARGIN_GROWTH * (margins[i] + now[i] / limit - 1)
    problem = _diverged(targets[left[0]], limit)
    raise problem


def _require_possible(target: Target, limit: float) -> None:
    """InputError unless a factor may be changed, and is still a number after it was."""
    if not any(target.changeable):
        raise InputError(
            f"{target.layer.matrix.name}: expected a factor that is trained and its own, got two "
            f"that are frozen or shared with other layers, and a drift {target.drift / limit:.3g} "
            "times its limit; train one of them, or leave the layer out with exclude="
        )
    if not target.drift <= FARTHEST * limit:
        raise _diverged(target, limit)


def _diverged(target: Target, limit: float) -> InputError:
    """The error for factors that cannot be brought back to the limit."""
    return InputError(
        f"{target.layer.matrix.name}: expected a drift that can be lowered to its limit, got one "
        f"{target.drift / limit:.3g} times as large; training has diverged: lower the learning "
        "rate, or go back to a checkpoint"
    )


@dataclass(frozen=True)
class Directions:
    """The directions in which ``S = A Aᵀ`` and ``G = A C Aᵀ`` are both diagonal, for one layer.

    ``S = T Tᵀ`` and ``G = T diag(g) Tᵀ``, so that ``S (S + λG)⁻¹ = T diag(1/(1 + λg)) T⁺``.

    Attributes:
        target: The layer.
        factors: B and A in float64.
        T: Shape ``(r, r)``, zero columns where A has not full rank.
        inverse: Its pseudo-inverse.
        g: Shape ``(r,)``.
        shares: The drift of each direction as a share of the whole, shape ``(r,)``.
        rounding: By what part the rounding of the factors may raise the drift.
    """

    target: Target
    factors: tuple[Tensor, Tensor]
    T: Tensor
    inverse: Tensor
    g: Tensor
    shares: Tensor
    rounding: float


def directions(targets: Sequence[Target]) -> list[Directions]:
    """The directions of each layer; those of one rank are found together.

    Args:
        targets: The layers.

    Returns:
        In the same order.
    """
    groups = defaultdict(list)
    stored: list[tuple[Tensor, Tensor]] = []
    for i, target in enumerate(targets):
        matrix: Any = target.layer.matrix  # adapted: a holder has no others
        B, A = matrix.factors
        stored.append((B, A))
        groups[B.shape, A.shape, B.dtype, A.dtype, A.device].append(i)
    found: dict[int, Directions] = {}
    for members in groups.values():
        chosen = [targets[i] for i in members], [stored[i] for i in members]
        found |= zip(members, _of_one_shape(*chosen), strict=True)
    return [found[i] for i in range(len(targets))]


def _of_one_shape(
    targets: Sequence[Target], stored: Sequence[tuple[Tensor, Tensor]]
) -> list[Directions]:
    """The directions of layers whose factors have one shape."""
    B, A = (exact(torch.stack([pair[side] for pair in stored])) for side in (0, 1))
    factors = list(zip(B, A, strict=True))
    known = [
        target.grams or _grams(target.layer, *x) for target, x in zip(targets, factors, strict=True)
    ]
    S = A @ A.mT
    G, K = (torch.stack([getattr(x, name) for x in known]).to(S) for name in ("of_A", "of_B"))
    values, vectors = torch.linalg.eigh(S)
    counted = values > RANK_TOLERANCE * values[:, -1:]
    sizes = values.where(counted, torch.ones_like(values)).sqrt()
    root = vectors * (sizes * counted)[:, None]
    inverse = vectors * (counted / sizes)[:, None]
    small = inverse.mT @ G @ inverse
    g, Q = torch.linalg.eigh((small + small.mT) / 2)
    T, T_inverse = root @ Q, (inverse @ Q).mT
    g = g.clamp_min(0)
    shares = (T * (K @ T)).sum(dim=1) * g
    total = shares.sum(dim=1)
    sides = [x.diagonal(dim1=1, dim2=2).sum(dim=1) for x in (K, S)]
    spread = (sides[0] * sides[1] / total).sqrt().tolist()
    shares = shares / total[:, None]
    rows = zip(targets, factors, T, T_inverse, g, shares, strict=True)
    return [
        Directions(*row, rounding=_rounding(row[0], pair[0], one))
        for row, pair, one in zip(rows, stored, spread, strict=True)
    ]


def _rounding(target: Target, B: Tensor, spread: float) -> float:
    """By what part the rounding of both factors may raise the drift ``‖B A C^½‖²``.

    With a relative rounding ε of B and of A, ``‖B A C^½‖`` changes by 2ε‖B‖‖A‖√(tr C) at most.

    Args:
        target: The layer.
        B: A factor as it is stored.
        spread: ``‖B‖‖A‖ / ‖B A C^½‖``.

    Returns:
        The part.
    """
    eps = torch.finfo(B.dtype).eps / 2
    return 4 * eps * spread * target.layer.moment.trace**0.5


def _grams(layer: LayerDrift, B: Tensor, A: Tensor) -> Grams:
    """The Gram matrices of factors, where those of the measurement cannot be used."""
    AC = exact(layer.moment.times(A.to(layer.matrix.dtype)))  # pyright: ignore
    return Grams(B.mT @ B, AC @ A.mT)


def _write(found: Sequence[Directions], aims: Sequence[float]) -> None:
    """Write the factors with lower drifts; each takes half of the change if both may change."""
    groups = defaultdict(list)
    for i, one in enumerate(found):
        B, A = one.factors
        groups[B.shape, A.shape, A.device, one.target.changeable, one.target.scale].append(i)
    for members in groups.values():
        _write_alike([found[i] for i in members], [aims[i] for i in members])


def _write_alike(found: Sequence[Directions], aims: Sequence[float]) -> None:
    """The same for factors of one shape, that may be changed alike."""
    T, inverse = (torch.stack([getattr(x, name) for x in found]) for name in ("T", "inverse"))
    B, A = (torch.stack([x.factors[side] for x in found]) for side in (0, 1))
    changeable = found[0].target.changeable
    kept = _kept(found, aims)
    small = T * ((kept.sqrt() if all(changeable) else kept) - 1)[:, None] @ inverse
    B = B + B @ small if changeable[0] else B
    A = A + small @ A if changeable[1] else A
    for one, own_B, own_A in zip(found, B, A, strict=True):
        matrix: Any = one.target.layer.matrix
        matrix.write(own_B, own_A)


def _kept(found: Sequence[Directions], aims: Sequence[float]) -> Tensor:
    """What is left of each direction at a lower drift, between 0 and 1, shape ``(k, r)``."""
    g, shares = (torch.stack([getattr(x, name) for x in found]) for name in ("g", "shares"))
    drifts = [x.target.drift for x in found]
    part = g.new_tensor([aim / drift for aim, drift in zip(aims, drifts, strict=True)])[:, None]
    if found[0].target.scale:
        return part.sqrt().expand_as(g)
    positive = part.where(part > 0, torch.ones_like(part))
    found_for = _multipliers(g, shares, positive)
    return torch.where(part > 0, 1 / (1 + found_for * g), 0.0)


def _multipliers(g: Tensor, shares: Tensor, part: Tensor) -> Tensor:
    """λ with ``Σ sharesᵢ/(1 + λ gᵢ)² = part``, for each row.

    Newton's method on the inverse root of the sum, which is increasing and concave in λ: from 0
    it rises to the solution and never passes it.

    Args:
        g: The drift of each direction for its size, shape ``(k, r)``.
        shares: The drift of each as a share of the whole.
        part: The drift that is to be left, as a share, shape ``(k, 1)``, positive.

    Returns:
        λ, shape ``(k, 1)``.
    """
    largest = g.amax(dim=1, keepdim=True)
    x = g / largest
    found, aim = torch.zeros_like(part), part.rsqrt()
    for _ in range(NEWTON_STEPS):
        inverse = 1 / (1 + found * x)
        left = shares * inverse.square()
        total = left.sum(dim=1, keepdim=True)
        slope = (left * inverse * x).sum(dim=1, keepdim=True) * total**-1.5
        step = (aim - total.rsqrt()) / slope
        found = found + step
        if bool((step <= 1e-15 * found).all()):
            break
    return found / largest
