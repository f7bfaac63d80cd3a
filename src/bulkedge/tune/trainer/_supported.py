"""Which ways of training spread or copy parameters so that nothing could be held, or watched."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.training_args import TrainingArguments

from bulkedge._errors import InputError
from bulkedge.tune._matrix import is_distributed


def takes_part(model: nn.Module, args: TrainingArguments) -> bool:
    """Whether this process checks layers: under DDP only the first does, since all have the same.

    Args:
        model: The model.
        args: Of the trainer.

    Returns:
        Whether it does.
    """
    require_readable(model)
    return args.process_index == 0 or is_spread(model)


def is_spread(model: nn.Module) -> bool:
    """Whether the parameters of a model are spread over processes, which check together.

    Args:
        model: The model.

    Returns:
        Whether any is.
    """
    return any(is_distributed(x) for x in model.parameters())


def require_readable(model: nn.Module) -> None:
    """InputError unless each parameter is whole, or a part that FSDP2 knows.

    Args:
        model: The model.

    Raises:
        InputError: For ZeRO-3 of DeepSpeed, and FSDP1.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        found, remedy = "those of DeepSpeed's ZeRO-3", "use FSDP2"
    elif any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        found, remedy = "the flat ones of FSDP1", "set fsdp_version to 2"
    else:
        return
    raise InputError(f"expected whole parameters, or those of FSDP2, got {found}; {remedy}")


def require_writable(model: nn.Module, optimizer: Any) -> None:
    """InputError unless what a holder writes stays: an optimiser with copies would overwrite it.

    Args:
        model: The model.
        optimizer: What the trainer steps, with all wrappers.

    Raises:
        InputError: For DeepSpeed of any stage, and FSDP1.
    """
    require_readable(model)
    inner = optimizer
    while inner is not None:
        if type(inner).__module__.partition(".")[0] == "deepspeed":
            raise InputError(
                f"expected an optimiser that trains the model's own parameters, got DeepSpeed's "
                f"{type(inner).__name__}: it keeps float32 copies of them and overwrites what a "
                "holder writes; use FSDP2, or DDP, or hold the fine-tune afterwards with "
                "`bulkedge repair --method clip`"
            )
        inner = getattr(inner, "optimizer", None)
