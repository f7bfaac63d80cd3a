"""What the recipe leaves out may have changed, but not have lost its numbers.

Every tensor of the fine-tune that is left out is read once, packed weights as the numbers that they
stand for.  NaN and Inf where the base's numbers are finite are noted in its row, and so are zeros
alone where the base has others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bulkedge.checkpoint import Adapter, Checkpoint, StoredMatrix, read_tensor
from bulkedge.checkpoint.codec.base import strips
from bulkedge.records.recipe import Recipe
from bulkedge.records.tensors import Skipped

from .account import Dropped
from .comparison import Comparison
from .finite import floating, glob_names, in_words, stored_tensors
from .leftover import EXCLUDED, accepted, why_excluded

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class _Damage:
    """What is wrong with the numbers of a tensor.

    Attributes:
        nan: How many are NaN, where those of the base are finite.
        inf: How many are infinite, likewise.
        zeroed: Whether all are zero, where those of the base are not.
    """

    nan: int = 0
    inf: int = 0
    zeroed: bool = False

    def add(self, other: _Damage) -> None:
        """Take in that of another part of the tensor."""
        self.nan, self.inf = self.nan + other.nan, self.inf + other.inf
        self.zeroed = self.zeroed or other.zeroed

    @property
    def fields(self) -> dict[str, object]:
        """What a row says of it; empty where nothing is wrong."""
        found: dict[str, object] = {"zeroed": True} if self.zeroed else {}
        if self.nan or self.inf:
            found["not_finite"] = in_words(self.nan, self.inf)
        return found


def with_excluded_damage(
    skipped: Iterable[Skipped],
    tuned: Checkpoint | Adapter,
    dropped: Iterable[Dropped],
    recipe: Recipe,
) -> list[Skipped]:
    """The tensors that are left out, with a mark at those of the recipe's that are damaged.

    Cost: one pass over the tensors that the recipe leaves out, and over those of the base that they
    replace.

    Args:
        skipped: The rows so far.
        tuned: The fine-tune.
        dropped: The pairs that are not compared.
        recipe: What is wanted.

    Returns:
        The rows; each damaged tensor has one.
    """
    skipped = list(skipped)
    found = _of_pairs(each.comparison for each in dropped if each.fate == "excluded")
    left_out = {row.name for row in skipped if row.accepted and row.side == "tuned"}
    names = glob_names(tuned)
    for info in stored_tensors(tuned):
        if info.name in found or not floating(info):
            continue
        if info.name in left_out or why_excluded(recipe, info.name, *names[info.name]):
            found[info.name] = _count(read_tensor(info))
    marks = {name: damage.fields for name, damage in found.items() if damage.fields}
    rows = {row.name for row in skipped if row.side == "tuned"}
    skipped += [accepted(name, EXCLUDED) for name in marks if name not in rows]
    return [
        row.model_copy(update=marks[row.name])
        if row.side == "tuned" and row.name in marks and not row.lost
        else row
        for row in skipped
    ]


def _of_pairs(comparisons: Iterable[Comparison]) -> dict[str, _Damage]:
    """What is wrong with the full tensors of pairs, by their names."""
    found: dict[str, _Damage] = {}
    for pair in comparisons:
        if pair.tuned is None or not all(map(_is_readable, pair.matrices)):
            continue
        found.setdefault(pair.tuned.info.name, _Damage()).add(_damage(pair.base, pair.tuned))
        for info in pair.tuned.codec.companions:  # read with it
            found.setdefault(info.name, _Damage())
    return found


def _is_readable(matrix: StoredMatrix) -> bool:
    """Whether a tensor, a vector included, has numbers that can be read."""
    return 0 not in matrix.codec.shape and matrix.codec.unreadable is None


def _damage(base: StoredMatrix, tuned: StoredMatrix) -> _Damage:
    """What is wrong with a tensor that replaces one of the base."""
    alike = base.acts_as == tuned.acts_as
    total, ours, theirs = _Damage(), False, False
    if alike and base.transposed == tuned.transposed:
        for before, after in zip(_strips(base), _strips(tuned), strict=True):
            total.add(_count(after, before))
            ours, theirs = ours or bool(before.any()), theirs or bool(after.any())
    else:
        before, after = base.read(), tuned.read()
        total = _count(after, before if alike else None)
        ours, theirs = bool(before.any()), bool(after.any())
    total.zeroed = ours and not theirs
    return total


def _strips(matrix: StoredMatrix) -> Iterator[Tensor]:
    """The numbers of a matrix, some rows at a time where its file allows that."""
    if matrix.transposed:
        yield matrix.read()
        return
    height, width = matrix.shape
    first = matrix.rows[0] if matrix.rows else 0
    for at, size in strips(first, first + height, width):
        yield replace(matrix, rows=(at, at + size)).read()


def _count(tensor: Tensor, base: Tensor | None = None) -> _Damage:
    """How many numbers are not finite where those of the base are, if there are any."""
    nan, inf = tensor.isnan(), tensor.isinf()
    if base is not None:
        finite = base.isfinite()
        nan, inf = nan & finite, inf & finite
    return _Damage(int(nan.sum()), int(inf.sum()))
