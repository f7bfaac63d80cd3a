"""An adapter of our methods written as a LoRA: exactly, and without an SVD."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from bulkedge._errors import InputError
from bulkedge.checkpoint.format import PREFIX
from bulkedge.checkpoint.write import new_folder

from .config import METHODS, FactoredConfig
from .layer import FactoredLayer


def lora_factors(
    model: nn.Module, adapter_name: str = "default"
) -> dict[str, tuple[Tensor, Tensor]]:
    """The updates of an adapter as factors of a LoRA of scale 1.

    Args:
        model: A model wrapped by PEFT, or one that an adapter was injected into.
        adapter_name: Which adapter.

    Returns:
        B, A by module name in the model as it was before: ``ΔW = B A`` of shape ``(out, in)``,
        with as many columns in B as the method has (spectral adapters 2r if additive, r if
        rotational), in float32 or float64.

    Raises:
        InputError: If the model has no such adapter of this kind.

    Example:
        >>> from torch import nn
        >>> from peft import get_peft_model
        >>> from bulkedge.tune.peft import SpectralConfig
        >>> model = nn.Sequential(nn.Linear(6, 5))
        >>> model = get_peft_model(model, SpectralConfig(r=2, target_modules=["0"]))
        >>> B, A = lora_factors(model)["0"]
        >>> B.shape, A.shape
        (torch.Size([5, 4]), torch.Size([4, 6]))
    """
    _config(model, adapter_name)
    with torch.no_grad():
        return {
            name: (X.contiguous(), Y.mT.contiguous())
            for name, layer in _layers(model, adapter_name)
            for X, Y in [layer.factors(adapter_name)]
        }


def export_lora(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default"
) -> Path:
    """Write an adapter as a plain LoRA, which stock PEFT and programs that serve LoRA load.

    Exact, without an SVD: the factors of ΔW are thin already (a spectral adapter's of rank 2r if
    additive, r if rotational), with a scale of 1.  Modules that were trained in full are written,
    too.

    Args:
        model: A model wrapped by PEFT, or one that an adapter was injected into.
        path: The folder to write; it must not exist.
        adapter_name: Which adapter.

    Returns:
        The folder.

    Raises:
        InputError: If the model has no such adapter of this kind.
        OutputError: If the folder exists or cannot be written.
    """
    from safetensors.torch import save_file

    config = _config(model, adapter_name)
    state = peft.get_peft_model_state_dict(model, adapter_name=adapter_name)
    own = f".{config.method}_"
    tensors = {_with_prefix(name): x for name, x in state.items() if own not in name}
    for name, (B, A) in lora_factors(model, adapter_name).items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B
    lora = _lora_config(model, config, adapter_name)
    with new_folder(Path(path)) as folder:
        lora.save_pretrained(str(folder))
        on_cpu = {name: x.detach().contiguous().cpu() for name, x in tensors.items()}
        save_file(on_cpu, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return Path(path)


def _config(model: Any, adapter_name: str) -> FactoredConfig:
    """The configuration of an adapter; InputError if it is of another method."""
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, FactoredConfig):
        kinds = " or ".join(METHODS)
        raise InputError(f"expected a model with a {kinds} adapter {adapter_name!r}, got none")
    return config


def _lora_config(model: nn.Module, config: FactoredConfig, adapter_name: str) -> peft.LoraConfig:
    """The configuration of the LoRA that an adapter is written as; its scale α/r is 1."""
    return peft.LoraConfig(
        # PEFT trains and saves the heads of a wrapped model by its task
        task_type=config.task_type if isinstance(model, peft.PeftModel) else None,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        r=config.columns,
        lora_alpha=config.columns,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        modules_to_save=config.modules_to_save,
        # if some of the layers are not transposed, PEFT corrects this for each when it loads them
        fan_in_fan_out=any(layer._transposed for _, layer in _layers(model, adapter_name)),
    )


def _layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, FactoredLayer]]:
    """The layers of an adapter, by their names in the model without PEFT."""
    if isinstance(model, BaseTuner):
        model = model.model
    for name, layer in model.named_modules():
        if isinstance(layer, FactoredLayer) and adapter_name in layer.settings:
            yield name.removeprefix(PREFIX), layer


def _with_prefix(name: str) -> str:
    """The name of a saved tensor with the prefix, which an injected model lacks."""
    return name if name.startswith(PREFIX) else PREFIX + name
