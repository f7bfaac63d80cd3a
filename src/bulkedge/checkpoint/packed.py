"""Weights packed in ways that no codec reads, refused by name.

What was lost in packing is of the size of what a fine-tune changes: the checkpoint from before
quantisation is the better base.
"""

from __future__ import annotations

from bulkedge._errors import CheckpointError

from .codec import Plain
from .codec.block_fp8 import FP8
from .header import TensorInfo
from .read import Checkpoint

GPTQ_OR_AWQ = "GPTQ or AWQ"
METHODS = {"gptq": "GPTQ", "awq": "AWQ", "auto-round": "AutoRound"}
"""What packs weights so, by the name in ``config.json``."""

PACKED = {
    ".qzeros": GPTQ_OR_AWQ,
    ".qweight": GPTQ_OR_AWQ,
    ".W_q": "HQQ",
    # read where the settings lie beside them; these have lost them
    ".weight.absmax": "bitsandbytes (4 bits)",
    ".weight.quant_map": "bitsandbytes (4 bits)",
    ".SCB": "bitsandbytes (8 bits)",
    # torchao's subclasses of tensors, taken apart
    "_weight_qdata": "torchao",
    ".weight_packed": "compressed-tensors",
    ".weight_shape": "compressed-tensors",
    ".weight_scale": "compressed-tensors or ModelOpt",
    ".weight_scale_2": "ModelOpt",
    ".scale_weight": "ComfyUI's scaled fp8",
}
"""What packs weights, by the end of the names of its tensors."""

PACKED_DTYPES = ("U8", "I8", "I32", "F4", *FP8)


def refuse_packed(checkpoint: Checkpoint) -> None:
    """Refuse weights that are packed in a way that is not read here.

    Args:
        checkpoint: Its headers.

    Raises:
        CheckpointError: Naming the first such tensor and what packed it.
    """
    if (found := packed_by(checkpoint)) is not None:
        info, name, method = found
        raise CheckpointError(
            f"{info.file}: tensor {name!r} is part of a weight quantised by {method}, "
            "whose numbers are packed; give the checkpoint from before quantisation, or "
            "a dequantised one"
        )


def packed_by(checkpoint: Checkpoint) -> tuple[TensorInfo, str, str] | None:
    """The first tensor of a weight that is packed in a way that is not read here.

    Args:
        checkpoint: Its headers.

    Returns:
        The tensor, its name and what packed it; None if there is none.
    """
    codecs = (codec for codec in checkpoint.weights.values() if not isinstance(codec, Plain))
    read = {info.name for codec in codecs for info in codec.infos}
    for name, info in checkpoint.tensors.items():
        if info.name in read:
            continue
        for end, method in PACKED.items():
            if name.endswith(end) and _is_packed(name, end, info, checkpoint):
                which = _gptq_or_awq(name.removesuffix(end), checkpoint)
                return info, name, which if method == GPTQ_OR_AWQ else method
    return None


def _is_packed(name: str, end: str, info: TensorInfo, checkpoint: Checkpoint) -> bool:
    """Whether what ends like packed weights is some, and no weight by a name of its own."""
    if end in {".W_q", "_weight_qdata"}:
        return info.dtype in PACKED_DTYPES
    if end in {".weight_scale", ".weight_scale_2", ".scale_weight"}:
        weight = checkpoint.tensors.get(name.removesuffix(end) + ".weight")
        return weight is not None and weight.dtype in PACKED_DTYPES
    return True


def _gptq_or_awq(layer: str, checkpoint: Checkpoint) -> str:
    """Which of the two: by the configuration, else by the axis along which codes are packed."""
    settings = checkpoint.config.get("quantization_config")
    said = settings.get("quant_method") if isinstance(settings, dict) else None
    if isinstance(said, str) and said in METHODS:
        return METHODS[said]
    codes, scales = (checkpoint.tensors.get(f"{layer}.{part}") for part in ("qweight", "scales"))
    if codes is None or scales is None or not codes.shape or not scales.shape:
        return GPTQ_OR_AWQ
    # scales are (groups, out); GPTQ packs along the inputs, AWQ along the outputs
    return "GPTQ" if codes.shape[-1] == scales.shape[-1] else "AWQ"
