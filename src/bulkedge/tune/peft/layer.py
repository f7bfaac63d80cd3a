"""A linear layer with spectral adapters."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from bulkedge._errors import InputError
from bulkedge._precision import full_precision
from bulkedge.tune._layers import is_distributed
from bulkedge.tune._spectral import Basis, Rotation, additive, rotational, wide

from .config import SpectralConfig

MISFIT = 0.01
"""How far a stored basis may be from the weight beside it: a weight in bfloat16 is within 2e-3 of
itself in float32, and another model's is tenths away."""


class SpectralLayer(BaseTunerLayer):
    """What every layer with spectral adapters has; tensors are keyed by the adapter's name.

    What is trained and the basis are kept in float32, or in float64 beside a base in float64,
    whatever the dtype of the base and on every way of loading.
    """

    adapter_layer_names = ("spectral_left", "spectral_right")
    other_param_names = (
        "spectral_U", "spectral_S", "spectral_V", "spectral_dropout", "spectral_settings",
    )  # fmt: skip

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.spectral_left = nn.ParameterDict({})
        self.spectral_right = nn.ParameterDict({})
        self.spectral_U = BufferDict(persistent=True)
        self.spectral_S = BufferDict(persistent=True)
        self.spectral_V = BufferDict(persistent=True)
        self.spectral_dropout = nn.ModuleDict({})
        self.spectral_settings: dict[str, SpectralConfig] = {}
        self.spectral_name = ""
        self._unsettled: set[str] = set()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True

    @property
    def in_features(self) -> int:
        """Inputs of the layer, as PEFT's own layers tell them."""
        return self._weight.shape[1]

    @property
    def out_features(self) -> int:
        """Outputs of the layer."""
        return self._weight.shape[0]

    def update_layer(self, adapter_name: str, config: SpectralConfig) -> None:
        """Add an adapter: the leading triplets of the base, and zeros to train.

        Raises:
            InputError: If the rank exceeds a side of the weight, or another adapter is merged
                into it.
        """
        W0, r = self._weight, config.r
        if self.merged:
            raise InputError(
                f"expected a base without updates, got one with {', '.join(self.merged_adapters)} "
                "merged into it: unmerge_adapter() first"
            )
        if not W0.numel():
            raise InputError("expected a weight, got an empty one: wrap the model before ZeRO-3")
        m, n = W0.shape
        if r > min(m, n):
            raise InputError(f"expected r ≤ {min(m, n)} for a weight of {m} × {n}, got {r}")
        dtype = wide(W0.dtype)
        sizes = [(m, r), (n, r)] if config.variant == "additive" else [(r * (r - 1) // 2,)] * 2
        sides = (self.spectral_left, self.spectral_right)
        for side, size in zip(sides, sizes, strict=True):
            side[adapter_name] = nn.Parameter(torch.zeros(size, dtype=dtype))
        empty = (torch.zeros(size, dtype=dtype) for size in ((m, r), (r,), (n, r)))
        self._keep(adapter_name, Basis(*empty))
        dropout = config.spectral_dropout
        self.spectral_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.spectral_settings[adapter_name] = config
        self._unsettled.add(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        # PEFT moves parameters to "meta" as they are registered where a file is to bring them, and
        # the basis with them
        if self.spectral_left[adapter_name].device.type != "meta":
            self._settle(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """The update of an adapter as thin factors, never in half precision.

        Returns:
            X, Y with ``ΔW = X Yᵀ`` of shape ``(out, in)``.

        Raises:
            InputError: If the basis is not of this base.
        """
        if adapter_name in self._unsettled and not torch.compiler.is_compiling():
            self._settle(adapter_name)
        config, basis = self.spectral_settings[adapter_name], self._basis(adapter_name)
        dtype = wide(basis.U.dtype)
        basis = Basis(*(x.to(dtype) for x in (basis.U, basis.S, basis.V)))
        left, right = (
            side[adapter_name].to(dtype) for side in (self.spectral_left, self.spectral_right)
        )
        with torch.autocast(left.device.type, enabled=False):
            if config.variant == "additive":
                return additive(basis, left, right)
            rotation: Rotation = "exp" if config.rotation == "exp" else "cayley"
            return rotational(basis, left, right, rotation)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update in the layout of the base weight, in float32 or float64."""
        X, Y = self.factors(adapter)
        with full_precision(X.device):
            return Y @ X.mT if self._transposed else X @ Y.mT

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """An update by addition: PEFT may turn it into a LoRA (``export_lora`` is exact)."""
        return True

    def scale_layer(self, scale: float) -> None:
        """PEFT's interface; a spectral adapter has no scale."""
        if scale != 1:
            warnings.warn("a spectral adapter has no scale: left as it is", stacklevel=2)

    def unscale_layer(self, scale: float | None = None) -> None:
        """PEFT's interface; a spectral adapter has no scale."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add updates to the base weight; each sum is rounded to the dtype of the base once.

        Args:
            safe_merge: Look for NaN first.
            adapter_names: Which; the active ones if None.

        Raises:
            InputError: If ``safe_merge`` finds any.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.spectral_settings:
                continue
            merged = self._with(name, 1)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise InputError(f"the merged weight of adapter {name!r} is not finite")
            self._parameter.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take all merged updates out again, up to the rounding of the base's dtype."""
        while self.merged_adapters:
            self._parameter.data = self._with(self.merged_adapters[-1], -1)
            self.merged_adapters.pop()

    def _with(self, name: str, sign: int) -> Tensor:
        """The stored weight with an update added or subtracted."""
        weight = self._parameter.data
        return self.get_delta_weight(name).mul_(sign).add_(weight).to(weight.dtype)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """To the device of the base, but not, as PEFT would, to its dtype."""
        device = device or self._parameter.device
        if device.type == "meta" or adapter_name not in self.spectral_settings:
            return
        for name in (*self.adapter_layer_names, "spectral_U", "spectral_S", "spectral_V"):
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

    def _basis(self, name: str) -> Basis:
        held = (self.spectral_U[name], self.spectral_S[name], self.spectral_V[name])
        return Basis(*(cast("Tensor", x) for x in held))

    def _keep(self, name: str, basis: Basis) -> None:
        self.spectral_U[name], self.spectral_S[name] = basis.U, basis.S
        self.spectral_V[name] = basis.V

    def _settle(self, name: str) -> None:
        """Check the basis against the base; solve for it if none came from a file.

        Where the base is not at hand (offloaded, spread over processes, merged), later.

        Raises:
            InputError: If it is not of this base.
        """
        W0, basis = self._weight, self._basis(name)
        if self.merged or W0.device.type == "meta" or is_distributed(W0) or not W0.numel():
            return
        if not bool(basis.S.any()):
            self._keep(name, Basis.of(W0, self.spectral_settings[name].r))
        elif not (misfit := basis.misfit(W0)) < MISFIT:
            raise InputError(
                f"{self.spectral_name or type(self).__name__}: the stored basis of adapter "
                f"{name!r} is not that of this weight (off by {misfit:.2g} of its singular values, "
                f"expected below {MISFIT}): load the adapter beside the base that it was trained on"
            )
        self._unsettled.discard(name)


def settle_what_was_loaded(layer: SpectralLayer, _: object) -> None:
    """The hook that follows ``load_state_dict``: every basis is to be looked at again."""
    layer._unsettled = set(layer.spectral_settings)
    for name in layer.spectral_settings:
        layer._settle(name)


def refuse_mixed_batch(arguments: dict[str, Any]) -> None:
    """Raise InputError where each row of a batch is to have an adapter of its own."""
    if arguments.pop("adapter_names", None) is not None:
        raise InputError(
            "expected one adapter for a whole batch, got adapter_names: spectral adapters do not "
            "mix within a batch; call the model once for each with set_adapter(), or export_lora() "
            "them and mix the LoRAs"
        )


class SpectralLinear(nn.Module, SpectralLayer):
    """A linear layer, or a ``Conv1D`` of transformers, with spectral adapters."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SpectralConfig) -> None:
        super().__init__()
        SpectralLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)
        self.register_load_state_dict_post_hook(settle_what_was_loaded)

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
            if name not in self.spectral_settings:
                continue
            X, Y = self.factors(name)
            inner = self.spectral_dropout[name](self._cast_input_dtype(x, X.dtype))
            result = result + inner @ Y @ X.mT
        return result.to(dtype)

    def __repr__(self) -> str:
        return "spectral." + super().__repr__()
