"""The codecs: how weights are stored, one way a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bulkedge._errors import CheckpointError
from bulkedge._globs import unwrapped
from bulkedge.checkpoint.header import TensorInfo

from .awq import Awq
from .base import Candidate, Codec
from .bitsandbytes_4bit import FourBits
from .bitsandbytes_8bit import EightBits
from .block_fp8 import BlockFp8
from .fp4 import Fp4
from .gptq import Gptq
from .mlx import MlxAffine
from .packed_int import PackedInt
from .plain import Companion, Plain
from .scaled import Scaled

__all__ = [
    "CODECS",
    "Awq",
    "BlockFp8",
    "Candidate",
    "Codec",
    "Companion",
    "EightBits",
    "FourBits",
    "Fp4",
    "Gptq",
    "MlxAffine",
    "PackedInt",
    "Plain",
    "Scaled",
    "weights_of",
]

CODECS: tuple[type[Codec], ...] = (
    Scaled, BlockFp8, FourBits, EightBits, MlxAffine, Fp4, PackedInt, Gptq, Awq
)  # fmt: skip
"""Each may claim a tensor, in this order; what none of them claims is plain."""


def weights_of(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Codec]:
    """What the tensors of a checkpoint are.

    Args:
        tensors: The tensors, by their names without the wrappers of training libraries.
        config: The content of the checkpoint's ``config.json``.

    Returns:
        The codec of each tensor, by the name of the weight that it holds, in the order of
        ``tensors``.  Companions are listed under their own names.

    Raises:
        CheckpointError: If two tensors hold the same weight.
    """
    claimed = {
        name: _claim(Candidate(name, info, tensors, config)) for name, info in tensors.items()
    }
    endings = tuple(end for codec in CODECS for end in codec.companion_endings)
    companions = {info.name for codec in claimed.values() if codec for info in codec.companions}
    found: dict[str, Codec] = {}
    for name, info in tensors.items():
        part = info.name in companions or info.name.endswith(endings)
        codec = Companion(info) if part else claimed[name] or Plain(info)
        key = name if codec.name == info.name else unwrapped(codec.name)
        if (other := found.get(key)) is not None:
            raise CheckpointError(
                f"{info.file}: tensors {other.info.name!r} and {info.name!r} both hold the weight "
                f"{key!r}; remove one"
            )
        found[key] = codec
    return found


def _claim(stored: Candidate) -> Codec | None:
    """The codec that a tensor is read by; None for none but the plain one."""
    claims = (codec.claim(stored) for codec in CODECS)
    return next((codec for codec in claims if codec is not None), None)
