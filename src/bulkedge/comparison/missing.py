"""Vectors of the base that a full fine-tune should store and does not.

A program that loads the fine-tune starts such a vector anew: a bias at zero, a norm at one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from bulkedge.checkpoint import Checkpoint, Codec
from bulkedge.checkpoint.codec import Companion
from bulkedge.checkpoint.header import FLOATING
from bulkedge.checkpoint.model import lacks

from .comparison import Comparison

COMPUTED = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|freqs(_cis)?|rope_freqs|rotary_\w+|masked_bias|alibi|slopes|"
    r"\w*cumprod\w*|betas|alphas|sigmas|posterior_\w+|(cos|sin)_cached|"
    r"(input|output|weight|activation|act|kv|[kqv])_(global_)?scales?(_inv)?|"
    r"(\w+_)?zero_points?|(\w+_)?amax)(\.|$)"
)
"""Parts of the names of what a program computes from its configuration, or quantisers measure."""

SAME = (".decoder.bias", ".bias")
"""The ends of two names that one bias of an output layer has; versions store one of them or both.
"""


def missing_vectors(
    base: Checkpoint, tuned: Checkpoint, pairs: Iterable[Comparison]
) -> Iterator[str]:
    """The vectors that a program needs from the fine-tune and does not find there.

    A bias is needed where the fine-tune stores the weight of its layer, as one tensor like the
    base.  Any other vector is needed unless a module around it, matrices included, is not stored:
    then the class has no such module, or its matrices are lost.  Not needed are integers, what a
    program computes by itself, and layers that the class of the fine-tune lacks.

    Args:
        base: The base.
        tuned: The fine-tune.
        pairs: What was paired, vectors included.

    Yields:
        Names of vectors in the base's files.
    """
    pairs = list(pairs)
    stored = {pair.base.info.name for pair in pairs}
    whole = set(_stored_alike(pairs))
    matrices = {name: codec for name, codec in base.weights.items() if len(codec.shape) > 1}
    kept = {above for name, codec in base.weights.items() if codec.info.name in stored
            for above in _above(name)}  # fmt: skip
    absent = {above for name in matrices for above in _above(name)} - kept
    renamed = "gguf" in (base.kind, tuned.kind)  # a converter chooses the names of norms
    for name, codec in base.weights.items():
        if codec.info.name in stored or not _is_vector(codec) or lacks(tuned.config, name):
            continue
        others = (base.weights[other] for other in _same(name) if other in base.weights)
        if COMPUTED.search(name) or any(other.info.name in stored for other in others):
            continue
        weight = f"{name.removesuffix('bias')}weight"
        if name.endswith("bias") and weight in matrices:
            needed = matrices[weight].info.name in whole
        else:
            needed = not renamed and absent.isdisjoint(_above(name))
        if needed:
            yield codec.info.name


def _is_vector(codec: Codec) -> bool:
    """Whether a tensor is a vector or a number of its own, in floating point."""
    plain = codec.info.dtype in FLOATING and not isinstance(codec, Companion)
    return plain and len(codec.shape) < 2 and not codec.info.empty


def _stored_alike(pairs: Iterable[Comparison]) -> Iterator[str]:
    """The base's weights that are one tensor on either side: so is the bias beside them."""
    ours: dict[str, set[object]] = {}
    theirs: dict[object, set[str]] = {}
    for pair in pairs:
        if pair.tuned is None:
            continue
        name, other = pair.base.info.name, (pair.tuned.info.name, pair.tuned.alias)
        ours.setdefault(name, set()).add(other)
        theirs.setdefault(other, set()).add(name)
    for name, found in ours.items():
        if len(found) == 1 and all(len(theirs[other]) == 1 for other in found):
            yield name


def _above(name: str) -> list[str]:
    """The modules that a tensor lies in: ``a.b`` and ``a`` for ``a.b.weight``."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _same(name: str) -> Iterator[str]:
    """The other name that the bias of an output layer may have."""
    for end, other in (SAME, SAME[::-1]):
        if name.endswith(end):
            yield name.removesuffix(end) + other
