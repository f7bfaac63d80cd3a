"""Corrected updates as stored factors again: one pair of tensors for each layer, or each stack.

An update of rank r that was corrected by c columns has rank r + c at most.  Where its true rank is
no larger than r, it is written in r columns.  Otherwise it is written in r + c, the first r as they
were.  If a largest rank is asked for, it is the optimal truncation to that rank (Eckart and Young).
The scale stays as it was, so a program that reads the factors without patterns of ranks is right,
too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bulkedge._linmap import LowRank, frobenius
from bulkedge._precision import exact
from bulkedge.checkpoint import Correctable
from bulkedge.comparison.pair import Pair
from bulkedge.update import update_svd

from .method import Correction


@dataclass(frozen=True)
class Part:
    """A corrected part of a layer's update: all of it, one expert's, a block of rows.

    Attributes:
        stored: Where it lies.
        correction: What is added to ``s·B·A``.
        meant: The corrected pair of DoRA; None of another kind.
    """

    stored: Correctable
    correction: Correction
    meant: Pair | None = None

    @property
    def magnitude(self) -> Tensor | None:
        """The new norms of its rows; None without any."""
        return None if self.meant is None else self.meant.magnitude


@dataclass(frozen=True)
class Stored:
    """What is to be stored of a layer.

    Attributes:
        tensors: New tensors by name, in the dtypes of the old ones.
        rank: Of each update.
        errors: ``‖stored − meant‖_F`` of each part: what dtype and rank leave out.
    """

    tensors: dict[str, Tensor]
    rank: int
    errors: list[float]


@dataclass(frozen=True)
class Layer:
    """The stored factors of a layer, or of a stack of experts, with all corrections to them.

    Attributes:
        whole: The factors, of all experts and rows.
        parts: The corrections.
    """

    whole: Correctable
    parts: list[Part]

    def store(self, max_rank: int | None, *, even: bool = False) -> Stored:
        """The tensors to store.

        Args:
            max_rank: The largest rank wanted; None for as many columns as it takes.
            even: Whether the rank must be even.

        Returns:
            The tensors, their rank, and what they leave out.
        """
        stacked = self.whole.experts > 1
        experts = list(range(self.whole.experts)) if stacked else [None]
        of = {e: [p for p in self.parts if not stacked or p.stored.expert == e] for e in experts}
        # experts that are not corrected need the rank that they have
        if max_rank is not None and not all(of.values()):
            max_rank = max(max_rank, self.whole.rank)
        pairs = [self._corrected(e, of[e], max_rank) for e in experts]
        rank = max(A.shape[0] for _, A in pairs)
        rank += rank % 2 if even else 0
        pairs = [_padded(B, A, rank) for B, A in pairs]
        norms = self._norms()
        rounded = [self.whole.rounded(B, A, norms) for B, A in pairs]
        of_expert = dict(zip(experts, rounded, strict=True))
        errors = [
            _error(part, *of_expert[part.stored.expert if stacked else None]) for part in self.parts
        ]
        return Stored(self.whole.stored(pairs, norms), rank, errors)

    def _corrected(
        self, expert: int | None, parts: list[Part], max_rank: int | None
    ) -> tuple[Tensor, Tensor]:
        """Factors of one expert or of the layer, as ``(out, in)``, scale divided out."""
        B, A, scale = self.whole.of(expert=expert).read()
        if not parts:
            return B, A
        X = torch.cat([_all_rows(part, len(B)) for part in parts], dim=1)
        Y = torch.cat([part.correction.Y for part in parts], dim=1)
        return compact(B, A, scale, Correction(X, Y), max_rank)

    def _norms(self) -> Tensor | None:
        """The norms of all rows, those of the parts replaced; None without any."""
        norms = self.whole.read_magnitude()
        if norms is None:
            return None
        for part in self.parts:
            if part.magnitude is not None:
                norms[_rows(part)] = part.magnitude.to(norms)
        return norms


def grouped(parts: Iterable[Part]) -> list[Layer]:
    """The layers, or stacks, that parts belong to."""
    layers: dict[str, Layer] = {}
    for part in parts:
        first, *_ = part.stored.infos
        layers.setdefault(first.name, Layer(part.stored.whole(), [])).parts.append(part)
    return list(layers.values())


def compact(
    B: Tensor, A: Tensor, scale: float, more: Correction, max_rank: int | None
) -> tuple[Tensor, Tensor]:
    """Factors of ``(s·B·A + X Yᵀ)/s`` in as few columns as they need.

    Args:
        B: Shape ``(m, r)``.
        A: Shape ``(r, n)``.
        scale: s, not zero.
        more: The correction.
        max_rank: The largest rank wanted.

    Returns:
        B and A, of rank r where that is enough.
    """
    r, limit = A.shape[0], max_rank or A.shape[0] + more.X.shape[1]
    X, Y = _evened(more.X / scale, more.Y)
    wide, tall = torch.cat([B, X], dim=1), torch.cat([A, Y.mT])
    found = update_svd(wide, tall, 1.0, (len(B), A.shape[1]))
    if r < found.rank == wide.shape[1] <= limit:
        return wide, tall
    rank = min(found.rank, limit)
    return _padded(found.P[:, :rank], found.Q[:, :rank].mT, min(r, limit))


def _error(part: Part, B: Tensor, A: Tensor, magnitude: Tensor | None) -> float:
    """``‖stored − meant‖_F`` of a part whose layer is stored as ``B A``."""
    if part.meant is not None and magnitude is not None:  # with DoRA, rounding changes every row
        scale, meant = part.stored.scale, part.meant
        update = LowRank(scale * exact(B[_rows(part)]), exact(A))
        norms = exact(magnitude[_rows(part)])
        now = replace(meant, factors=update, magnitude=norms)
        W, V = (pair.tuned_map(torch.float64).to_dense() for pair in (meant, now))
        return frobenius(V - W)
    old_B, old_A, scale = part.stored.read()
    X, Y = part.correction.X, part.correction.Y
    wide = torch.cat([scale * exact(B[_rows(part)]), -scale * old_B, -X], dim=1)
    tall = torch.cat([exact(A), old_A, Y.mT])
    return LowRank(wide, tall).norm_bound()


def _rows(part: Part) -> slice:
    """The output rows of a part."""
    return slice(None) if part.stored.rows is None else slice(*part.stored.rows)


def _all_rows(part: Part, rows: int) -> Tensor:
    """X, with zeros for the rows of other parts."""
    X = part.correction.X.new_zeros(rows, part.correction.X.shape[1])
    X[_rows(part)] = part.correction.X
    return X


def _evened(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, with columns of equal length on both sides."""
    x, y = (torch.linalg.vector_norm(side, dim=0) for side in (X, Y))
    root = (x * y).sqrt()
    return X * (root / x).nan_to_num(0.0, 0.0), Y * (root / y).nan_to_num(0.0, 0.0)


def _padded(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product in ``rank`` columns, the last of them zero."""
    missing = max(rank - A.shape[0], 0)
    return (
        torch.nn.functional.pad(B, (0, missing)),
        torch.nn.functional.pad(A, (0, 0, 0, missing)),
    )
