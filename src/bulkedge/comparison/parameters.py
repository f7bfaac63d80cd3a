"""Parameters of three or more dimensions that are no layers: class tokens, position embeddings.

They are added to what flows through a model, or put before it, as biases are: no layer multiplies
by them.  One that is equal on both sides is no update.  A changed one counts as harmless if its
name says what it is, and is reported; any other is lost: it may be a layer of an unknown form.
"""

from __future__ import annotations

import re

from bulkedge._precision import exact
from bulkedge.records.tensors import Fate

from .comparison import Comparison

TOKENS = re.compile(
    r"(^|[._])((cls|class|mask|register|reg|dist|distillation|storage|query|latent|learnable)_"
    r"(tokens?|query|queries|embed|embedding|embeddings)|query_tokens|probe|latents|cls|"
    r"(pos|position|positional|time|temporal|spatial|absolute_pos|level|row|col)_"
    r"(embed|embedding|embeddings|emb|enc|encoding|bias_table)|embed_pos|pos_emb)([._]|$)"
)
"""The names that such parameters have in transformers, timm and open_clip."""

MAX_SIZE = 2**24
"""No such parameter is larger; what is would cost the plan its speed to read."""

EQUAL = "equal on both sides: a parameter that is no layer"
CHANGED = "changed, and no layer: a token or a position that is added as a bias is, not judged"


def judged_aside(comparison: Comparison, dimensions: int) -> tuple[str, Fate] | None:
    """What becomes of a pair that is neither a kernel nor a stack.

    Args:
        comparison: The pair.
        dimensions: Of its tensors.

    Returns:
        The reason why it is not compared, and its fate; None of an unknown form that has changed.
    """
    tuned = comparison.tuned
    if tuned is None or comparison.base.size > MAX_SIZE:
        return None
    if comparison.base.codec.shape == tuned.codec.shape and _equal(comparison):
        return EQUAL, "apart"
    known = dimensions == 3 and comparison.base.codec.shape[0] == 1
    return (CHANGED, "apart") if known and TOKENS.search(comparison.base.name) else None


def _equal(comparison: Comparison) -> bool:
    """Whether both sides store the same numbers."""
    import torch

    base, tuned = (matrix.codec.read(None, None) for matrix in comparison.matrices)
    return torch.equal(exact(base), exact(tuned))
