"""Projections that one model stores as one tensor and another as several, row after row.

``qkv_proj`` of Phi-3 holds the rows of ``q_proj``, then those of ``k_proj``, then those of
``v_proj``; ``gate_up_proj`` those of ``gate_proj`` and of ``up_proj``.  Only layouts of which that
is known are here: ``query_key_value`` of GPT-NeoX, BLOOM and Falcon interleaves the heads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from .codec import Codec

Rows = tuple[int, int]

QKV = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
GATE_UP = ("gate_proj.weight", "up_proj.weight")
# what a fused tensor is called, and the layers that it is made of, row by row
FUSED = (
    ("qkv_proj.weight", QKV),  # Phi-3, Phi-4
    ("W_pack.weight", QKV),  # Baichuan
    ("Wqkv.weight", QKV),  # MPT, DBRX, ModernBERT
    ("in_proj_weight", QKV),  # torch's MultiheadAttention
    ("gate_up_proj.weight", GATE_UP),  # Phi-3, GLM
)


def fused_from(weights: Mapping[str, Codec], other: Collection[str]) -> dict[str, list[Codec]]:
    """The fused tensors that a checkpoint stores in pieces.

    Args:
        weights: What it stores.
        other: The names of the other side: only kinds of tensors that it has are looked for.

    Returns:
        The pieces in the order of their rows, by the name that the fused tensor would have.
    """
    ends = {name.rpartition(".")[2] for name in other}
    ends |= {".".join(name.rsplit(".", 2)[-2:]) for name in other}
    found = {}
    for name in weights:
        for fused, pieces in FUSED:
            if fused not in ends:
                continue
            stem = name.removesuffix(pieces[0])
            if stem == name or (stem and not stem.endswith(".")):
                continue
            codecs = [weights.get(stem + piece) for piece in pieces]
            whole = [codec for codec in codecs if codec and len(codec.shape) == 2]
            if len(whole) == len(pieces) and len({codec.shape[1] for codec in whole}) == 1:
                found[stem + fused] = whole
    return found


def places_in_fused(name: str) -> Iterator[tuple[str, int, int]]:
    """Where a layer may lie, fused with others.

    Args:
        name: Such as ``layers.0.self_attn.k_proj.weight``.

    Yields:
        The fused tensor's name, the layer's place in it, and how many layers it has.
    """
    for fused, pieces in FUSED:
        for index, piece in enumerate(pieces):
            stem = name.removesuffix(piece)
            if stem != name and (not stem or stem.endswith(".")):
                yield stem + fused, index, len(pieces)


def rows_in_fused(index: int, of: int, rows: int, total: int) -> Rows | None:
    """Which rows of a fused tensor a layer has.

    Keys and values have as many rows as each other, queries may have more; gate and up are alike.

    Args:
        index: The layer's place.
        of: How many layers are fused.
        rows: The rows of the layer.
        total: The rows of the fused tensor.

    Returns:
        From and to; None where they do not add up.
    """
    if index == 0 and of > 1:
        others, odd = divmod(total - rows, of - 1)
        fits = others > 0 and not odd and (of > 2 or others == rows)
        return (0, rows) if fits else None
    first = total - (of - index) * rows
    if first <= 0 or (of == 2 and first != rows):
        return None
    return first, first + rows
