"""What the layers of our methods of PEFT share: a linear layer with updates ``ΔW = X Yᵀ``."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, ClassVar, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from bulkedge._errors import InputError
from bulkedge._precision import full_precision

from .config import FactoredConfig


class FactoredLayer(nn.Module, BaseTunerLayer):
    """A linear layer, or a ``Conv1D`` of transformers, with adapters of one method.

    A method names its tensors, which are keyed by the adapter's name, and defines ``_allocate`` and
    ``factors``.  The names of trained parameters begin with that of the method.

    Args:
        base_layer: The layer.
        adapter_name: The first adapter.
        config: Its configuration.

    Raises:
        InputError: As ``update_layer``.
    """

    method: ClassVar[str]
    """The name of the method, in lower case."""
    adapter_layer_names: tuple[str, ...]
    """Trained parameters."""
    buffer_names: ClassVar[tuple[str, ...]] = ()
    """Tensors that are stored and not trained."""
    other_param_names: tuple[str, ...]
    dropout_name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # PEFT 0.19 looks for modules of deleted adapters, but for those named after the method
        cls.dropout_name = f"{cls.method}_dropout"
        cls.other_param_names = (*cls.buffer_names, cls.dropout_name, "settings")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: FactoredConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict({}))
        for name in self.buffer_names:
            setattr(self, name, BufferDict(persistent=True))
        setattr(self, self.dropout_name, nn.ModuleDict({}))
        self.settings: dict[str, FactoredConfig] = {}
        self.layer_name = ""
        self._unsettled: set[str] = set()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)
        self.register_load_state_dict_post_hook(settle_what_was_loaded)

    @property
    def in_features(self) -> int:
        """The number of inputs of the layer, as in PEFT's own layers."""
        return self._weight.shape[1]

    @property
    def out_features(self) -> int:
        """The number of outputs of the layer."""
        return self._weight.shape[0]

    def update_layer(self, adapter_name: str, config: FactoredConfig) -> None:
        """Add an adapter, of which the update is zero.

        Raises:
            InputError: If the rank exceeds a side of the weight, or another adapter is merged
                into it.
        """
        self._require_fit(config.r)
        self._allocate(adapter_name, config)
        dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        getattr(self, self.dropout_name)[adapter_name] = dropout
        self.settings[adapter_name] = config
        self._unsettled.add(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        # PEFT registers parameters on "meta" before it loads a file: nothing to settle yet
        if getattr(self, self.adapter_layer_names[0])[adapter_name].device.type != "meta":
            self._settle(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _require_fit(self, r: int) -> None:
        """InputError unless an adapter of this rank can be added to the base."""
        if self.merged:
            raise InputError(
                f"expected a base without updates, got one with {', '.join(self.merged_adapters)} "
                "merged into it: unmerge_adapter() first"
            )
        if not self._weight.numel():
            raise InputError("expected a weight, got an empty one: wrap the model before ZeRO-3")
        m, n = self._weight.shape
        if r > min(m, n):
            raise InputError(f"expected r ≤ {min(m, n)} for a weight of {m} × {n}, got {r}")

    @abstractmethod
    def _allocate(self, adapter_name: str, config: Any) -> None:
        """Add parameters that make an update of zero, and buffers."""

    @abstractmethod
    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """The update of an adapter as thin factors, in float32 or float64.

        Returns:
            X, Y with ``ΔW = X Yᵀ`` of shape ``(out, in)``.
        """

    def _settle(self, name: str) -> None:
        """Complete or check what was allocated or loaded, or leave it for a later call."""
        self._unsettled.discard(name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update in the layout of the base weight, in float32 or float64."""
        X, Y = self.factors(adapter)
        with full_precision(X.device):
            return Y @ X.mT if self._transposed else X @ Y.mT

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: PEFT may approximate the update by a LoRA (``export_lora`` is exact)."""
        return True

    def scale_layer(self, scale: float) -> None:
        """Required by PEFT; an update of such a method has no scale."""
        if scale != 1:
            warnings.warn(f"a {self.method} adapter has no scale: left as it is", stacklevel=2)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Required by PEFT; an update of such a method has no scale."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add updates to the base weight; each sum is rounded to the dtype of the base once.

        Args:
            safe_merge: Check for NaN first.
            adapter_names: Which adapters; the active ones if None.

        Raises:
            InputError: If ``safe_merge`` finds any.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.settings:
                continue
            merged = self._merged_weight(name, 1)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise InputError(f"the merged weight of adapter {name!r} is not finite")
            self._parameter.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take all merged updates out again, up to the rounding of the base's dtype."""
        while self.merged_adapters:
            self._parameter.data = self._merged_weight(self.merged_adapters[-1], -1)
            self.merged_adapters.pop()

    def _merged_weight(self, name: str, sign: int) -> Tensor:
        """The stored weight with an update added or subtracted."""
        weight = self._parameter.data
        return self.get_delta_weight(name).mul_(sign).add_(weight).to(weight.dtype)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter to the device of the base, but not, as PEFT would, to its dtype."""
        device = device or self._parameter.device
        if device.type == "meta" or adapter_name not in self.settings:
            return
        for name in (*self.adapter_layer_names, *self.buffer_names):
            held = getattr(self, name)
            tensor = held[adapter_name]
            if tensor.device in (device, torch.device("meta")):
                continue
            if isinstance(tensor, nn.Parameter):
                tensor.data = tensor.data.to(device)
            else:
                held[adapter_name] = tensor.to(device)

    @property
    def _transposed(self) -> bool:
        """Whether the base stores ``(in, out)``."""
        return not isinstance(self.get_base_layer(), nn.Linear)

    @property
    def _parameter(self) -> nn.Parameter:
        """The base weight as it is stored."""
        return cast("nn.Parameter", self.get_base_layer().weight)

    @property
    def _weight(self) -> Tensor:
        """W0 as ``(out, in)``."""
        weight = self._parameter.data
        return weight.T if self._transposed else weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer and the active updates; an update is two thin products."""
        refuse_mixed_batch(kwargs)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name not in self.settings:
                continue
            X, Y = self.factors(name)
            inner = getattr(self, self.dropout_name)[name](self._cast_input_dtype(x, X.dtype))
            result = result + inner @ Y @ X.mT
        return result.to(dtype)

    def __repr__(self) -> str:
        return f"{self.method}." + super().__repr__()


def settle_what_was_loaded(layer: FactoredLayer, _: object) -> None:
    """The hook after ``load_state_dict``: settle every adapter."""
    layer._unsettled = set(layer.settings)
    for name in layer.settings:
        layer._settle(name)


def refuse_mixed_batch(arguments: dict[str, Any]) -> None:
    """InputError if each row of a batch is to have an adapter of its own."""
    if arguments.pop("adapter_names", None) is not None:
        raise InputError(
            "expected one adapter for a whole batch, got adapter_names: adapters of this kind do "
            "not mix within a batch; call the model once for each with set_adapter(), or "
            "export_lora() them and mix the LoRAs"
        )
