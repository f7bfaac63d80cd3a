"""A model with spectral adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from bulkedge._errors import InputError

from .config import SpectralConfig
from .layer import SpectralLayer, SpectralLinear, refuse_mixed_batch


class SpectralModel(BaseTuner):
    """A model with spectral adapters, as ``get_peft_model`` makes it of a ``SpectralConfig``."""

    prefix = "spectral_"
    tuner_layer_cls = SpectralLayer
    target_module_mapping = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        peft_config: SpectralConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        """Replace a target by a layer with the adapter, or add the adapter to such a layer."""
        try:
            if isinstance(target, SpectralLayer):
                target.update_layer(adapter_name, peft_config)
                return
            layer = self._new_layer(peft_config, adapter_name, target)
        except InputError as error:
            raise InputError(f"{current_key}: {error}") from None
        layer.spectral_name = current_key
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter trains when it is chosen
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT calls this around a forward pass; adapters for single rows are refused."""
        refuse_mixed_batch(kwargs)
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a weighted sum of spectral updates is no spectral update.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "expected adapters that can be added with weights, got spectral ones: export_lora() "
            "turns each into a LoRA, exactly, and add_weighted_adapter of LoRAs combines those"
        )

    @staticmethod
    def _new_layer(config: SpectralConfig, name: str, target: nn.Module) -> SpectralLinear:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        weight = getattr(base, "weight", None)
        known = isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D"
        if not known or not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise InputError(
                f"expected a Linear or Conv1D layer with a floating-point weight, got "
                f"{type(base).__name__}; name others in target_modules"
            )
        return SpectralLinear(target, name, config)
