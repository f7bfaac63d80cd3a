"""Quantised weights: which of them can be read as numbers, and why the others are refused.

Block-wise fp8 (as of DeepSeek-V3, arXiv:2412.19437) keeps, beside a weight in fp8, one factor for
each block of it, under the weight's name and ``_scale_inv``; weight times factor is the matrix.
The other ways pack several numbers into one element, each in its own order, and what was lost in
packing is of the size of what a fine-tune changes: the checkpoint from before is the better base.
"""

from __future__ import annotations

from bulkedge._errors import CheckpointError
from bulkedge._globs import unwrapped

from .header import FLOATING, TensorInfo
from .matrix import BlockScales
from .names import of_experts
from .read import Checkpoint

FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = "_scale_inv"
DEFAULT_BLOCK = (128, 128)
# how a packed weight gives itself away: the end of a tensor's name, and what it was packed by
PACKED = {
    ".qzeros": "GPTQ or AWQ",
    ".qweight": "GPTQ or AWQ",
    ".weight.absmax": "bitsandbytes (4 bits)",
    ".weight.quant_map": "bitsandbytes (4 bits)",
    ".SCB": "bitsandbytes (8 bits)",
    "_blocks": "MXFP4",
    ".weight_packed": "compressed-tensors",
    ".weight_shape": "compressed-tensors",
    ".weight_scale": "compressed-tensors or ModelOpt",
    ".weight_scale_2": "ModelOpt",
    ".scale_weight": "ComfyUI's scaled fp8",
}
PACKED_DTYPES = ("U8", "I8", "I32", "F4", *FP8)


def scales_of(info: TensorInfo, checkpoint: Checkpoint) -> BlockScales | None:
    """The factors of a weight in block-wise fp8; None of another, or if they do not fit."""
    if info.dtype not in FP8 or len(info.shape) < 2:
        return None
    scales = checkpoint.tensors.get(unwrapped(info.name) + SCALES)
    if scales is None or scales.dtype not in FLOATING:
        return None
    *experts, height, width = info.shape
    rows, columns = _block(checkpoint)
    # a block larger than the weight is as large: nothing of the size it claims is ever made
    rows, columns = min(rows, max(height, 1)), min(columns, max(width, 1))
    expected = (*experts, -(-height // rows), -(-width // columns))
    if scales.size != 1 and (scales.shape != expected or len(experts) != of_experts(info.name)):
        return None
    return BlockScales(scales, (rows, columns))


def refuse_packed(checkpoint: Checkpoint) -> None:
    """Refuse weights that are packed in a way that is not read here.

    Args:
        checkpoint: Its headers.

    Raises:
        CheckpointError: Naming the first such tensor and what packed it.
    """
    for name, info in checkpoint.tensors.items():
        for end, method in PACKED.items():
            if name.endswith(end) and _is_packed(name, end, info, checkpoint):
                raise CheckpointError(
                    f"{info.file}: tensor {name!r} is part of a weight quantised by {method}, "
                    "whose numbers are packed; give the checkpoint from before quantisation, or "
                    "a dequantised one"
                )


def _is_packed(name: str, end: str, info: TensorInfo, checkpoint: Checkpoint) -> bool:
    """Whether what ends like packed weights is some, and no weight by a name of its own."""
    if end == "_blocks":
        return info.dtype == "U8" and name.removesuffix(end) + "_scales" in checkpoint.tensors
    if end in {".weight_scale", ".weight_scale_2", ".scale_weight"}:
        weight = checkpoint.tensors.get(name.removesuffix(end) + ".weight")
        return weight is not None and weight.dtype in PACKED_DTYPES
    return True


def _block(checkpoint: Checkpoint) -> tuple[int, int]:
    """Rows and columns of a block."""
    settings = checkpoint.config.get("quantization_config")
    size = settings.get("weight_block_size") if isinstance(settings, dict) else None
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    return DEFAULT_BLOCK
