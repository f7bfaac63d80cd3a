"""What the models of our methods of PEFT share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from bulkedge._errors import InputError

from .config import FactoredConfig
from .layer import FactoredLayer, refuse_mixed_batch


class FactoredModel(BaseTuner):
    """A model with adapters of one method, of which it names the layer."""

    tuner_layer_cls: type[FactoredLayer]  # pyright: ignore[reportIncompatibleVariableOverride]
    target_module_mapping = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.prefix = f"{cls.tuner_layer_cls.method}_"

    def _create_and_replace(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        peft_config: FactoredConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        """Replace a target by a layer with the adapter, or add the adapter to such a layer."""
        try:
            if isinstance(target, self.tuner_layer_cls):
                target.update_layer(adapter_name, peft_config)
                return
            layer = self._new_layer(peft_config, adapter_name, target)
        except InputError as error:
            raise InputError(f"{current_key}: {error}") from None
        layer.layer_name = current_key
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter trains when it is chosen
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT calls this around a forward pass; adapters for single rows are refused."""
        refuse_mixed_batch(kwargs)
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a weighted sum of such updates is none of the same method.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"expected adapters that can be added with weights, got {self.tuner_layer_cls.method} "
            "ones: export_lora() turns each into a LoRA, exactly, and add_weighted_adapter of "
            "LoRAs combines those"
        )

    def _new_layer(self, config: FactoredConfig, name: str, target: nn.Module) -> FactoredLayer:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        weight = getattr(base, "weight", None)
        known = isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D"
        if not known or not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise InputError(
                f"expected a Linear or Conv1D layer with a floating-point weight, got "
                f"{type(base).__name__}; name others in target_modules"
            )
        return self.tuner_layer_cls(target, name, config)
