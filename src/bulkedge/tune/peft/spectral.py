"""Spectral adapters: trained on the leading triplets of each weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from bulkedge._errors import InputError
from bulkedge._fields import check_values, number, one_of
from bulkedge.tune._matrix import is_distributed, product_dtype
from bulkedge.tune._spectral import Basis, Rotation, additive, rotational

from .config import FactoredConfig, register
from .layer import FactoredLayer
from .model import FactoredModel

TOLERANCE = 0.01
"""The largest relative residual of a stored basis.  Rounding a weight to bfloat16 causes 2e-3; the
weight of another model has some tenths."""


@dataclass
class SpectralConfig(FactoredConfig):
    """Configuration of a spectral adapter.

    Attributes:
        r: How many leading triplets of each weight are trained; at least 2 for the rotational
            variant.
        variant: ``"additive"`` trains r(m + n) numbers a layer and may move values and spaces;
            ``"rotational"`` trains r(r − 1) and keeps both.
        rotation: For the rotational variant: ``"cayley"`` or ``"exp"``.
        target_modules: As in ``LoraConfig``.
        exclude_modules: As in ``LoraConfig``.
        layers_to_transform: As in ``LoraConfig``.
        layers_pattern: As in ``LoraConfig``.
        modules_to_save: As in ``LoraConfig``.
        spectral_dropout: Dropout on the input of the update.
        bias: Only ``"none"``.

    References:
        Zhang and Pilanci, arXiv:2405.13952; corrected as in docs/errata-intruders.md.
    """

    method: ClassVar[str] = "spectral"

    variant: str = field(default="additive")
    rotation: str = field(default="cayley")
    spectral_dropout: float = field(default=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values(
            self,
            variant=(self.variant, one_of("additive", "rotational")),
            rotation=(self.rotation, one_of("cayley", "exp")),
            spectral_dropout=(self.spectral_dropout, number("in [0, 1)", lambda x: 0 <= x < 1)),
        )
        if self.variant == "rotational" and self.r == 1:
            raise InputError(
                "expected r ≥ 2 for the rotational variant, got 1: one direction cannot be rotated "
                "within its own span, and nothing would be trained"
            )

    @property
    def columns(self) -> int:
        """2r of the additive variant, r of the rotational one."""
        return 2 * self.r if self.variant == "additive" else self.r

    @property
    def dropout(self) -> float:
        """``spectral_dropout``."""
        return self.spectral_dropout


class SpectralLayer(FactoredLayer):
    """A linear layer, or a ``Conv1D`` of transformers, with spectral adapters.

    Trained parameters and basis are kept in float32, or in float64 if the base is in float64,
    however the adapter was made or loaded.

    Args:
        base_layer: The layer.
        adapter_name: The first adapter.
        config: Its configuration.

    Raises:
        InputError: If the rank exceeds a side of the weight.
    """

    method = SpectralConfig.method
    adapter_layer_names = ("spectral_left", "spectral_right")
    buffer_names = ("spectral_U", "spectral_S", "spectral_V")
    settings: dict[str, SpectralConfig]  # pyright: ignore[reportIncompatibleVariableOverride]
    spectral_left: nn.ParameterDict
    spectral_right: nn.ParameterDict
    spectral_U: BufferDict
    spectral_S: BufferDict
    spectral_V: BufferDict

    def _allocate(self, adapter_name: str, config: SpectralConfig) -> None:
        """Add parameters and a basis of zeros."""
        (m, n), r, dtype = self._weight.shape, config.r, product_dtype(self._weight.dtype)
        sizes = [(m, r), (n, r)] if config.variant == "additive" else [(r * (r - 1) // 2,)] * 2
        sides = (self.spectral_left, self.spectral_right)
        for side, size in zip(sides, sizes, strict=True):
            side[adapter_name] = nn.Parameter(torch.zeros(size, dtype=dtype))
        zeros = (torch.zeros(size, dtype=dtype) for size in ((m, r), (r,), (n, r)))
        self._store_basis(adapter_name, Basis(*zeros))

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """The update of an adapter as thin factors, in float32 or float64.

        Returns:
            X, Y with ``ΔW = X Yᵀ`` of shape ``(out, in)``.

        Raises:
            InputError: If the stored basis does not belong to this base.
        """
        if adapter_name in self._unsettled and not torch.compiler.is_compiling():
            self._settle(adapter_name)
        config, basis = self.settings[adapter_name], self._basis(adapter_name)
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

    def _basis(self, name: str) -> Basis:
        held = (self.spectral_U[name], self.spectral_S[name], self.spectral_V[name])
        return Basis(*(cast("Tensor", x) for x in held))

    def _store_basis(self, name: str, basis: Basis) -> None:
        self.spectral_U[name], self.spectral_S[name] = basis.U, basis.S
        self.spectral_V[name] = basis.V

    def _settle(self, name: str) -> None:
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
            self._store_basis(name, Basis.of(W0, self.settings[name].r))
        elif not (residual := basis.relative_residual(W0)) < TOLERANCE:
            raise InputError(
                f"{self.layer_name or type(self).__name__}: the stored basis of adapter "
                f"{name!r} is not that of this weight (off by {residual:.2g} of its singular "
                f"values, expected below {TOLERANCE}): load the adapter beside the base that it "
                "was trained on"
            )
        super()._settle(name)


class SpectralModel(FactoredModel):
    """A model with spectral adapters, as ``get_peft_model`` makes it of a ``SpectralConfig``."""

    tuner_layer_cls = SpectralLayer


register(SpectralConfig, SpectralModel)
