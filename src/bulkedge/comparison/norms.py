"""How far the vectors of norms have moved: no matrix shows that, and no drift measures it.

A norm multiplies inputs of mean square one by its weight and adds its bias.  So the size of either
change is relative to that of the base's weight.  It is noted where the recipe leaves them out, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from bulkedge._precision import exact
from bulkedge.checkpoint import StoredMatrix
from bulkedge.records.tensors import Skipped

from .account import Dropped
from .finite import floating


def with_norm_changes(skipped: Iterable[Skipped], dropped: Iterable[Dropped]) -> list[Skipped]:
    """The tensors that are left out, with the relative change of the vectors of norms.

    Args:
        skipped: The rows so far.
        dropped: The pairs that are not compared.

    Returns:
        The rows.  The change of a weight w is ``‖w − w0‖ / ‖w0‖``, that of the bias beside it
        ``‖b − b0‖ / ‖w0‖``; None of others, and of a base of zeros.
    """
    pairs = {
        pair.base.codec.name: (pair.base, pair.tuned)
        for pair in (each.comparison for each in dropped)
        if pair.tuned is not None and all(map(_is_vector, pair.matrices))
    }
    found: dict[str, float] = {}
    for name, (base, tuned) in pairs.items():
        weight = f"{name.removesuffix('bias')}weight" if name.endswith("bias") else name
        if weight.endswith("weight") and weight in pairs and base.codec.shape == tuned.codec.shape:
            size = float((exact(tuned.read()) - exact(base.read())).norm())
            whole = float(exact(pairs[weight][0].read()).norm())
            if whole and math.isfinite(size) and math.isfinite(whole):
                found[tuned.info.name] = size / whole
    return [
        row.model_copy(update={"relative_change": found[row.name]})
        if row.side == "tuned" and row.name in found
        else row
        for row in skipped
    ]


def _is_vector(matrix: StoredMatrix) -> bool:
    """Whether a tensor is a vector of floating-point numbers."""
    return len(matrix.codec.shape) == 1 and floating(matrix.info)
