"""Tensors that no matrix is read from, such as norms, biases and new heads: are they damaged?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from torch import Tensor

from bulkedge.checkpoint import Adapter, Checkpoint, read_header, read_tensor
from bulkedge.checkpoint.header import FLOATING, TensorInfo
from bulkedge.records.recipe import Recipe
from bulkedge.records.tensors import InputSide, Skipped

from .account import Key, keys_of
from .comparison import Comparison, Vector
from .leftover import why_excluded

PIECE = 2**20
"""So many numbers are looked at together."""
REMEDY = "save the model again, or download it again"


def what_is_not_finite(tensor: Tensor) -> str | None:
    """How many numbers of a tensor are NaN or infinite, in words; None where none is.

    Args:
        tensor: Any.

    Returns:
        ``"3 NaN and 0 Inf"``.
    """
    if all(bool(piece.isfinite().all()) for piece in tensor.flatten().split(PIECE)):
        return None
    return in_words(int(tensor.isnan().sum()), int(tensor.isinf().sum()))


def in_words(nan: int, inf: int) -> str:
    """How many numbers are NaN, and how many infinite."""
    return f"{nan} NaN and {inf} Inf"


def with_damaged(
    skipped: Iterable[Skipped],
    base: Checkpoint,
    tuned: Checkpoint | Adapter,
    comparisons: Iterable[Comparison],
    recipe: Recipe,
) -> list[Skipped]:
    """The tensors that are left out; those that hold NaN or Inf count as lost.

    Looked at is what no matrix is read from: of the fine-tune every tensor, of the base its
    vectors.  A matrix of the base that an adapter keeps is not read.

    Args:
        skipped: The rows so far.
        base: The base.
        tuned: The fine-tune.
        comparisons: What is compared; all numbers that are read for it are checked then.
        recipe: What is wanted; a tensor that it leaves out is not read.

    Returns:
        The rows, with one for each such tensor.
    """
    skipped = list(skipped)
    # of a vocabulary that was resized some rows are not read
    passed_over = {key for c in comparisons if c.resized is None for key in keys_of(c)}
    passed_over |= {(row.side, row.name) for row in skipped if row.accepted}
    damaged: dict[Key, Skipped] = {}
    for side, info, names in _unread(base, tuned):
        if (side, info.name) in passed_over or why_excluded(recipe, info.name, *names):
            continue
        if (found := what_is_not_finite(read_tensor(info))) is not None:
            reason = f"{side} holds {found}: {REMEDY}, or --exclude this tensor"
            damaged[side, info.name] = Skipped(
                name=info.name, reason=reason, lost=True, side=side, not_finite=found
            )
    kept = [row for row in skipped if row.lost or (row.side, row.name) not in damaged]
    known = {(row.side, row.name) for row in kept}
    return [*kept, *(row for key, row in damaged.items() if key not in known)]


def with_zeroed(skipped: Iterable[Skipped], vectors: Iterable[Vector]) -> list[Skipped]:
    """The tensors that are left out, with a mark at vectors that are all zeros.

    Args:
        skipped: The rows so far.
        vectors: The vectors of the tuned side.

    Returns:
        The rows; marked are those whose vector in the base is not all zeros.
    """
    zeroed = {
        vector.tuned.name
        for vector in vectors
        if vector.base is not None and _is_zero(vector.tuned) and not _is_zero(vector.base)
    }
    return [
        row.model_copy(update={"zeroed": True})
        if row.side == "tuned" and row.name in zeroed
        else row
        for row in skipped
    ]


def _is_zero(info: TensorInfo) -> bool:
    """Whether all numbers of a tensor are zero; False of one that holds no numbers."""
    return floating(info) and not bool(read_tensor(info).any())


def _unread(
    base: Checkpoint, tuned: Checkpoint | Adapter
) -> Iterator[tuple[InputSide, TensorInfo, list[str]]]:
    """The vectors of the base and all tensors of the fine-tune that hold floating-point numbers."""
    of_base, of_tuned = glob_names(base), glob_names(tuned)
    for info in base.tensors.values():
        if len(info.shape) < 2 and floating(info):
            yield "base", info, of_base[info.name]
    for info in stored_tensors(tuned):
        if floating(info):
            yield "tuned", info, of_tuned[info.name]


def stored_tensors(side: Checkpoint | Adapter) -> list[TensorInfo]:
    """Every tensor in the files of one side."""
    if isinstance(side, Checkpoint):
        return list(side.tensors.values())
    return list(side.stored or read_header(side.files[0])[0].values())


def glob_names(side: Checkpoint | Adapter) -> defaultdict[str, list[str]]:
    """What globs may call a tensor besides the name in its file, by that name."""
    found = defaultdict[str, list[str]](list)
    if isinstance(side, Checkpoint):
        for name, codec in side.weights.items():
            found[codec.info.name].append(name)
        return found
    for name, info in side.tensors.items():
        found[info.name].append(name)
    for row in side.unhandled:
        found[row.info.name].append(row.name)
    return found


def floating(info: TensorInfo) -> bool:
    """Whether a tensor holds floating-point numbers, and any at all."""
    return info.dtype in FLOATING and not info.empty
