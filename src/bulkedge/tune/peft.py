"""Spectral adapters as a method of PEFT: importing this module registers it.

    import bulkedge.tune.peft
    model = get_peft_model(model, bulkedge.tune.peft.SpectralConfig(r=8, variant="additive"))

A saved adapter is loaded by stock PEFT wherever this module was imported before; what is served by
programs that know LoRA alone is written by :func:`export_lora`, exactly.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bulkedge._errors import InputError, MissingExtraError
from bulkedge.checkpoint.write import new_folder

from ._spectral import Basis, Rotation, additive, rotational

try:
    import peft
    from peft.tuners._buffer_dict import BufferDict
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
    from peft.utils.peft_types import PeftType, register_peft_method
except ImportError as error:
    raise MissingExtraError("bulkedge.tune.peft needs PEFT: pip install 'bulkedge[hf]'") from error

NAME = "SPECTRAL"
FITS = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""How far a stored basis may be from the weight that it is loaded beside, by the weight's dtype."""


def _enter_type() -> None:
    """Make the method's name one of PEFT's: its registry takes no others."""
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    hashable = getattr(PeftType, "_hashable_values_", None)  # Python 3.12 and later
    if hashable is not None:
        hashable.append(NAME)


_enter_type()


@dataclass
class SpectralConfig(peft.PeftConfig):
    """Configuration of a spectral adapter.

    Attributes:
        r: How many leading triplets of each weight are trained.
        variant: ``"additive"`` trains r(m + n) numbers a layer and may move values and spaces;
            ``"rotational"`` trains r(r − 1) and keeps both.
        rotation: Of the rotational one: ``"cayley"`` or ``"exp"``.
        target_modules: As in ``LoraConfig``.
        exclude_modules: Likewise.
        layers_to_transform: Likewise.
        layers_pattern: Likewise.
        modules_to_save: Likewise.
        spectral_dropout: Dropout on the input of the update.
        bias: Only ``"none"``.

    References:
        Zhang and Pilanci, arXiv:2405.13952; corrected as docs/errata-intruders.md has it.
    """

    r: int = field(default=8)
    variant: str = field(default="additive")
    rotation: str = field(default="cayley")
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    spectral_dropout: float = field(default=0.0)
    bias: str = field(default="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[NAME]
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if self.r < 1:
            raise InputError(f"expected r ≥ 1, got {self.r}")
        if self.variant not in ("additive", "rotational"):
            raise InputError(f'expected variant "additive" or "rotational", got {self.variant!r}')
        if self.rotation not in ("cayley", "exp"):
            raise InputError(f'expected rotation "cayley" or "exp", got {self.rotation!r}')
        if self.bias != "none":
            raise InputError(f'expected bias "none", got {self.bias!r}: biases are not trained')


class SpectralLayer(BaseTunerLayer):
    """What every layer with spectral adapters has; tensors are keyed by the adapter's name."""

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
        self._checked: dict[str, tuple[int, ...]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True

    def update_layer(self, adapter_name: str, config: SpectralConfig) -> None:
        """Add an adapter: the leading triplets of the base, and zeros to train.

        Raises:
            InputError: If the rank exceeds a side of the weight.
        """
        W0, r = self._weight, config.r
        m, n = W0.shape
        if r > min(m, n):
            raise InputError(f"expected r ≤ {min(m, n)} for a weight of {m} × {n}, got {r}")
        self.spectral_settings[adapter_name] = config
        on_meta = W0.device.type == "meta" or torch.empty(0).device.type == "meta"
        if on_meta:  # the values come from a file
            shapes = ((m, r), (r,), (n, r))
            basis = Basis(*(torch.empty(shape, device="meta") for shape in shapes))
        else:
            basis = Basis.of(W0, r)
        sizes = [(m, r), (n, r)] if config.variant == "additive" else [(r * (r - 1) // 2,)] * 2
        sides = (self.spectral_left, self.spectral_right)
        for side, size in zip(sides, sizes, strict=True):
            side[adapter_name] = nn.Parameter(torch.zeros(size))
        dropout = config.spectral_dropout
        self.spectral_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self._keep(adapter_name, basis)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if not on_meta:
            self._keep(adapter_name, basis)  # in its own precision, not in that of the base
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """The update of an adapter as thin factors.

        Returns:
            X, Y with ``ΔW = X Yᵀ`` of shape ``(out, in)``.

        Raises:
            InputError: If the basis is not of this base.
        """
        config, basis = self.spectral_settings[adapter_name], self._basis(adapter_name)
        left, right = self.spectral_left[adapter_name], self.spectral_right[adapter_name]
        basis = Basis(*(x.to(left.dtype) for x in (basis.U, basis.S, basis.V)))
        if config.variant == "additive":
            return additive(basis, left, right)
        rotation: Rotation = "exp" if config.rotation == "exp" else "cayley"
        return rotational(basis, left, right, rotation)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update in the layout of the base weight."""
        X, Y = self.factors(adapter)
        return Y @ X.mT if self._transposed else X @ Y.mT

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """An update by addition: PEFT may turn it into a LoRA (:func:`export_lora` is exact)."""
        return True

    def scale_layer(self, scale: float) -> None:
        """PEFT's interface; a spectral adapter has no scale."""
        if scale != 1:
            warnings.warn("a spectral adapter has no scale: left as it is", stacklevel=2)

    def unscale_layer(self, scale: float | None = None) -> None:
        """PEFT's interface; a spectral adapter has no scale."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add updates to the base weight.

        Args:
            safe_merge: Look for NaN first.
            adapter_names: Which; the active ones if None.

        Raises:
            InputError: If ``safe_merge`` finds any.
        """
        weight = self._parameter
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.spectral_settings:
                continue
            merged = weight.data + self.get_delta_weight(name).to(weight.dtype)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise InputError(f"the merged weight of adapter {name!r} is not finite")
            weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take all merged updates out again."""
        weight = self._parameter
        while self.merged_adapters:
            update = self.get_delta_weight(self.merged_adapters[-1])
            weight.data = weight.data - update.to(weight.dtype)
            self.merged_adapters.pop()

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

    def _keep(self, name: str, basis: Basis) -> None:
        device = self._parameter.device
        self.spectral_U[name], self.spectral_S[name], self.spectral_V[name] = (
            x if x.device.type == "meta" else x.to(device) for x in (basis.U, basis.S, basis.V)
        )

    def _basis(self, name: str) -> Basis:
        """The basis of an adapter, checked against the base whenever it was written to."""
        stored = (self.spectral_U[name], self.spectral_S[name], self.spectral_V[name])
        basis = Basis(*(cast("Tensor", x) for x in stored))
        state = tuple(part for x in (basis.U, basis.S, basis.V) for part in (id(x), x._version))
        if self._checked.get(name) == state or self.merged or torch.compiler.is_compiling():
            return basis
        limit = max(FITS[self._weight.dtype], FITS[basis.U.dtype])
        misfit = basis.misfit(self._weight)
        if not misfit < limit:
            raise InputError(
                f"the stored basis of adapter {name!r} is not that of this weight (residual "
                f"{misfit:.1e} of σ₁, expected below {limit:.0e}): load the adapter beside the "
                "base that it was trained on"
            )
        self._checked[name] = state
        return basis


class SpectralLinear(nn.Module, SpectralLayer):
    """A linear layer, or a ``Conv1D`` of transformers, with spectral adapters."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SpectralConfig) -> None:
        super().__init__()
        SpectralLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer and the active updates; an update is two thin products."""
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


class SpectralModel(BaseTuner):
    """A model with spectral adapters: what ``get_peft_model`` makes of such a configuration."""

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
        """Put a layer in the place of a target, or another adapter into it."""
        try:
            if isinstance(target, SpectralLayer):
                target.update_layer(adapter_name, peft_config)
                return
            layer = self._new_layer(peft_config, adapter_name, target)
        except InputError as error:
            raise InputError(f"{current_key}: {error}") from None
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter trains when it is chosen
        self._replace_module(parent, target_name, layer, target)

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


def export_lora(model: Any, path: str | os.PathLike[str], adapter_name: str = "default") -> Path:
    """Write an adapter as a plain LoRA that stock PEFT, and whatever serves LoRA, loads.

    Exact, without an SVD: the factors of ΔW are thin already, of rank 2r (additive) or r
    (rotational), with a scale of 1.  Modules that were trained in full go along.

    Args:
        model: A model wrapped by PEFT.
        path: The folder to be; it must not exist.
        adapter_name: Which adapter.

    Returns:
        The folder.

    Raises:
        InputError: If the model has no such adapter of this kind.
        OutputError: If the folder exists or cannot be written.
    """
    from safetensors.torch import save_file

    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, SpectralConfig):
        raise InputError(f"expected a model with a spectral adapter {adapter_name!r}, got none")
    tensors = _lora_tensors(model, adapter_name)
    r = 2 * config.r if config.variant == "additive" else config.r
    lora = peft.LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        r=r,
        lora_alpha=r,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        modules_to_save=config.modules_to_save,
        fan_in_fan_out=_stored_transposed(model),
    )
    with new_folder(Path(path)) as folder:
        lora.save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return Path(path)


def _lora_tensors(model: Any, adapter_name: str) -> dict[str, Tensor]:
    """The state of an adapter with LoRA factors in the place of its own tensors."""
    state = peft.get_peft_model_state_dict(model, adapter_name=adapter_name)
    kept = {name: x for name, x in state.items() if ".spectral_" not in name}
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, SpectralLayer) and adapter_name in layer.spectral_settings:
                X, Y = layer.factors(adapter_name)
                kept[f"{name}.lora_A.weight"] = Y.mT.contiguous().cpu()
                kept[f"{name}.lora_B.weight"] = X.contiguous().cpu()
    return {name: x.detach().contiguous().cpu() for name, x in kept.items()}


def _stored_transposed(model: nn.Module) -> bool:
    """Whether the adapted weights are stored as ``(in, out)``; PEFT has one answer for all."""
    layers = [layer for layer in model.modules() if isinstance(layer, SpectralLayer)]
    kinds = {layer._transposed for layer in layers}
    if len(kinds) > 1:
        raise InputError("expected layers of one kind, Linear or Conv1D: a LoRA has one layout")
    return kinds.pop()


if PeftType[NAME] not in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name=NAME.lower(), config_cls=SpectralConfig, model_cls=SpectralModel)
