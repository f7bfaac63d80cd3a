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
from bulkedge.tune._matrix import is_distributed, product_dtype
from bulkedge.tune._spectral import Basis, Rotation, additive, rotational

from .config import SpectralConfig

TOLERANCE = 0.01
"""The largest relative residual of a stored basis.  Rounding a weight to bfloat16 causes 2e-3; the
weight of another model has some tenths."""


class SpectralLayer(BaseTunerLayer):
    """The base class of layers with spectral adapters; tensors are keyed by the adapter's name.

    Trained parameters and basis are kept in float32, or in float64 if the base is in float64,
    however the adapter was made or loaded.
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
        self._unverified: set[str] = set()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True

    @property
    def in_features(self) -> int:
        """The number of inputs of the layer, as in PEFT's own layers."""
        return self._weight.shape[1]

    @property
    def out_features(self) -> int:
        """The number of outputs of the layer."""
        return self._weight.shape[0]

    def update_layer(self, adapter_name: str, config: SpectralConfig) -> None:
        """Add an adapter: the leading triplets of the base, and parameters that begin at zero.

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
        dtype = product_dtype(W0.dtype)
        sizes = [(m, r), (n, r)] if config.variant == "additive" else [(r * (r - 1) // 2,)] * 2
        sides = (self.spectral_left, self.spectral_right)
        for side, size in zip(sides, sizes, strict=True):
            side[adapter_name] = nn.Parameter(torch.zeros(size, dtype=dtype))
        empty = (torch.zeros(size, dtype=dtype) for size in ((m, r), (r,), (n, r)))
        self._store_basis(adapter_name, Basis(*empty))
        dropout = config.spectral_dropout
        self.spectral_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.spectral_settings[adapter_name] = config
        self._unverified.add(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        # PEFT registers parameters on "meta" before it loads a file: no basis to check yet
        if self.spectral_left[adapter_name].device.type != "meta":
            self._verify_or_solve(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """The update of an adapter as thin factors, in float32 or float64.

        Returns:
            X, Y with ``ΔW = X Yᵀ`` of shape ``(out, in)``.

        Raises:
            InputError: If the stored basis does not belong to this base.
        """
        if adapter_name in self._unverified and not torch.compiler.is_compiling():
            self._verify_or_solve(adapter_name)
        config, basis = self.spectral_settings[adapter_name], self._basis(adapter_name)
        dtype = product_dtype(basis.U.dtype)
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
        """True: PEFT may approximate the update by a LoRA (``export_lora`` is exact)."""
        return True

    def scale_layer(self, scale: float) -> None:
        """Required by PEFT; a spectral adapter has no scale."""
        if scale != 1:
            warnings.warn("a spectral adapter has no scale: left as it is", stacklevel=2)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Required by PEFT; a spectral adapter has no scale."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add updates to the base weight; each sum is rounded to the dtype of the base once.

        Args:
            safe_merge: Check for NaN first.
            adapter_names: Which adapters; the active ones if None.

        Raises:
            InputError: If ``safe_merge`` finds any.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.spectral_settings:
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

    def _store_basis(self, name: str, basis: Basis) -> None:
        self.spectral_U[name], self.spectral_S[name] = basis.U, basis.S
        self.spectral_V[name] = basis.V

    def _verify_or_solve(self, name: str) -> None:
        """Check a stored basis against the base; compute the basis if none was loaded.

        If the base is not available (offloaded, spread over processes, merged), this is left for a
        later call.

        Raises:
            InputError: If the stored basis does not belong to this base.
        """
        W0, basis = self._weight, self._basis(name)
        if self.merged or W0.device.type == "meta" or is_distributed(W0) or not W0.numel():
            return
        if not bool(basis.S.any()):
            self._store_basis(name, Basis.of(W0, self.spectral_settings[name].r))
        elif not (residual := basis.relative_residual(W0)) < TOLERANCE:
            raise InputError(
                f"{self.spectral_name or type(self).__name__}: the stored basis of adapter "
                f"{name!r} is not that of this weight (off by {residual:.2g} of its singular "
                f"values, expected below {TOLERANCE}): load the adapter beside the base that it "
                "was trained on"
            )
        self._unverified.discard(name)


def verify_loaded_bases(layer: SpectralLayer, _: object) -> None:
    """The hook after ``load_state_dict``: check every basis against the base."""
    layer._unverified = set(layer.spectral_settings)
    for name in layer.spectral_settings:
        layer._verify_or_solve(name)


def refuse_mixed_batch(arguments: dict[str, Any]) -> None:
    """InputError if each row of a batch is to have an adapter of its own."""
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
        self.register_load_state_dict_post_hook(verify_loaded_bases)

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
