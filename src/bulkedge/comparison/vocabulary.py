"""Embeddings and output layers whose vocabulary was resized: the rows that both sides have.

Programs append the rows of added tokens, and cut rows off at the end; what is left of the others
stays in its place.
"""

from __future__ import annotations

from dataclasses import replace

from bulkedge.checkpoint import LoraFactors, StoredMatrix
from bulkedge.checkpoint.model import is_input, is_output
from bulkedge.records.tensors import Skipped

from .comparison import Comparison
from .leftover import set_aside

MIN_COMMON = 0.5
"""The part of the larger side's rows that both must have: else one is no resized other."""

NORMS_OF_ALL_ROWS = (
    "DoRA of an embedding that was resized: its norms are those of columns over all rows, of which "
    "the base lacks some; merge the adapter and audit the merged checkpoint"
)


def common_rows(pair: Comparison) -> Comparison | str:
    """A pair on the rows that both sides have, if it is a vocabulary that was resized.

    Args:
        pair: The base's matrix, and what belongs to it.

    Returns:
        The pair on these rows, with ``resized`` set; the pair itself if it is something else; or
        why it cannot be judged on some rows.
    """
    base, heights = pair.base, _heights(pair)
    if len(heights) != 2 or not _is_vocabulary(pair):
        return pair
    common = min(heights)
    if common < MIN_COMMON * max(heights):
        return pair
    update = pair.factors
    if isinstance(update, LoraFactors) and update.embedding and update.magnitude is not None:
        return NORMS_OF_ALL_ROWS
    return replace(
        pair,
        base=_first_rows(base, common),
        tuned=None if pair.tuned is None else _first_rows(pair.tuned, common),
        factors=update if update is None else update.of(rows=(0, common)),
        resized=(base.acts_as[0], next(iter(heights - {base.acts_as[0]}))),
    )


def rows_left_over(pair: Comparison) -> Skipped | None:
    """What to say of the rows that only one side of a resized vocabulary has.

    Args:
        pair: What :func:`common_rows` returned.

    Returns:
        A row that names them; None of any other pair.
    """
    if pair.resized is None:
        return None
    before, after = pair.resized
    rows = f"rows {min(before, after)} to {max(before, after) - 1}"
    if after > before:
        reason = f"{rows} were added to the vocabulary: not in the base, and not judged"
        return set_aside(pair.stored_names[0], reason)
    reason = f"{rows} were cut off the vocabulary: not in the tuned side, and not judged"
    return set_aside(pair.base.info.name, reason, "base")


def _heights(pair: Comparison) -> set[int]:
    """The numbers of rows of the sides, one or two; none where the pair is no whole matrices."""
    matrices = pair.matrices
    if any(m.expert is not None or m.rows is not None or m.transposed for m in matrices):
        return set()
    if any(len(m.codec.shape) != 2 for m in matrices):
        return set()
    tuned = [m.acts_as for m in matrices[1:]]
    tuned += [] if pair.factors is None else [pair.factors.shape]
    # an update and the tensor below it are of one size, and all are of one width
    if len(set(tuned)) != 1 or tuned[0][1] != pair.base.acts_as[1]:
        return set()
    return {pair.base.acts_as[0], tuned[0][0]}


def _is_vocabulary(pair: Comparison) -> bool:
    """Whether the base's matrix has a row for each token, by its name or the layer's."""
    names = (pair.base.codec.name, f"{pair.base.alias}.weight", pair.tuned_name)
    return any(is_input(name) or is_output(name) for name in names)


def _first_rows(matrix: StoredMatrix, count: int) -> StoredMatrix:
    """The first rows of a matrix."""
    return matrix if matrix.acts_as[0] == count else replace(matrix, rows=(0, count))
