"""Adapters of MLX-LM: ``adapters.safetensors`` beside an ``adapter_config.json`` of its own.

Of each layer lie there ``x.lora_a``, ``(in, r)``, and ``x.lora_b``, ``(r, out)``; its output gets
``scale · (x lora_a) lora_b`` added, with ``lora_parameters.scale`` as it stands, not α/r.  With
``x.m`` it is DoRA.  Of an embedding ``lora_a`` is ``(vocab, r)``.  ``fine_tune_type`` ``full``
stores the trained weights themselves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bulkedge._errors import AdapterError

from .adapter import Adapter, Unhandled
from .adapter_config import CONFIG, AdapterConfig
from .elements import read_tensor
from .format import WEIGHTS, AdapterFormat, Place
from .header import FLOATING, TensorInfo, read_header
from .peft import DORA
from .read import confined, read_json, weights_beside
from .update import Correctable, Rows

if TYPE_CHECKING:  # listing names needs no torch
    from torch import Tensor

FILE = "adapters.safetensors"
PARTS = (".lora_a", ".lora_b", ".m")
FIXED = "MLX-LM: not written; repair a PEFT adapter, or the fused model"
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
"""Layers that look rows up."""


@dataclass(frozen=True)
class MlxLora:
    """The stored factors of one update.

    Attributes:
        A: Shape ``(in, r)``; of an embedding ``(vocab, r)``.
        B: Shape ``(r, out)``; of an embedding ``(r, dim)``.
        scale: The number in front.
        embedding: Whether the weight is ``(vocab, dim)`` and the update ``s·A·B``.
        magnitude: The norms of the tuned rows: DoRA.
        rows: The output rows that are meant; None for all.
    """

    A: TensorInfo
    B: TensorInfo
    scale: float
    embedding: bool = False
    magnitude: TensorInfo | None = None
    rows: Rows | None = None
    kind = "lora"
    fan_in_fan_out = False

    @property
    def note(self) -> str | None:
        """That it is DoRA, if it is."""
        return None if self.magnitude is None else DORA

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """The stored tensors."""
        return (self.A, self.B) + ((self.magnitude,) if self.magnitude else ())

    @property
    def rank(self) -> int:
        """The rank r of the factors."""
        return self.A.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix that they update."""
        rows, columns = self.B.shape[1], self.A.shape[0]
        if self.embedding:
            return columns, rows
        return (rows if self.rows is None else self.rows[1] - self.rows[0]), columns

    def fits(self, stored: tuple[int, ...]) -> bool:
        """Whether a base tensor of the shape ``stored`` can be what they update."""
        return stored == self.shape or (not self.embedding and stored == self.shape[::-1])

    def of(self, *, expert: int | None = None, rows: Rows | None = None) -> MlxLora:
        """The factors of a range of output rows."""
        return replace(self, rows=self.rows if rows is None else rows)

    def read(self) -> tuple[Tensor, Tensor, float]:
        """``(B, A, s)`` with ``s·B·A`` the update of the matrix as ``(out, in)``."""
        A, B = read_tensor(self.A).double(), read_tensor(self.B).double()
        if self.embedding:
            return A, B, self.scale
        left = B.mT if self.rows is None else B.mT[slice(*self.rows)]
        return left, A.mT, self.scale

    def read_magnitude(self) -> Tensor | None:
        """The norms of the tuned rows in float64; None without."""
        if self.magnitude is None:
            return None
        norms = read_tensor(self.magnitude).double().flatten()
        return norms if self.rows is None else norms[slice(*self.rows)]

    def correctable(self) -> Correctable | str:
        """Why not."""
        return FIXED


def is_mlx(place: Place) -> bool:
    """Whether an adapter lies there as MLX-LM saves one."""
    folder = _folder(place)
    if not os.path.lexists(folder / CONFIG) or os.path.lexists(folder / WEIGHTS):
        return False
    return os.path.lexists(folder / FILE)


def _folder(place: Place) -> Path:
    """The folder, for the folder itself or the weights in it."""
    path = Path(place.path)
    return path.parent if path.name == FILE else path


def open_mlx(place: Place) -> Adapter:
    """Read the configuration and the header of an adapter of MLX-LM.

    Args:
        place: The folder, or the weights in it.

    Returns:
        The adapter; no tensor has been read.

    Raises:
        AdapterError: If its scale is not known.
    """
    folder = _folder(place)
    source = confined(folder / CONFIG, folder)
    settings = read_json(source)
    file = confined(folder / FILE, folder)
    stored = read_header(file)[0]
    beside = weights_beside(folder, [folder / FILE])
    base = settings.get("model")
    config = AdapterConfig(peft_type="LORA", base_model_name_or_path=base)
    files = (folder / FILE, folder / CONFIG)
    if settings.get("fine_tune_type") == "full":
        return Adapter(
            folder,
            files,
            {},
            config,
            dict(stored),
            beside=beside,
            method="full",
            origin="by MLX-LM",
        )
    scale = _scale(settings, source)
    factors, tensors, unhandled = _sorted(stored, scale, settings)
    return Adapter(
        folder,
        files,
        factors,
        config,
        tensors,
        tuple(unhandled),
        beside=beside,
        origin="by MLX-LM",
    )


MLX = AdapterFormat(claims=is_mlx, open=open_mlx)
"""The format of MLX-LM, whose weights have a name that PEFT's do not have."""


def _scale(settings: Mapping[str, Any], source: Path) -> float:
    """The number in front of the factors."""
    given = settings.get("lora_parameters")
    scale = given.get("scale") if isinstance(given, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) < 1e30:
        raise AdapterError(
            f"{source}: lora_parameters.scale is {scale!r:.60}, expected a number; take the "
            "configuration that was saved with these factors"
        )
    return float(scale)


def _sorted(
    stored: Mapping[str, TensorInfo], scale: float, settings: Mapping[str, Any]
) -> tuple[dict[str, MlxLora], dict[str, TensorInfo], list[Unhandled]]:
    """Updates, full tensors, and what is neither."""
    layers: dict[str, dict[str, TensorInfo]] = {}
    tensors: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        end = next((end for end in PARTS if name.endswith(end)), None)
        if end is None:
            tensors[name] = info
        else:
            layers.setdefault(name.removesuffix(end), {})[end] = info
    factors: dict[str, MlxLora] = {}
    unhandled: list[Unhandled] = []
    dora = settings.get("fine_tune_type") == "dora"
    for layer, parts in layers.items():
        name = f"{layer.removesuffix('.linear')}.weight"
        found = _factors(layer, parts, scale, dora=dora)
        if isinstance(found, str):
            unhandled += [Unhandled(info, name, found) for info in parts.values()]
        else:
            factors[name] = found
    return factors, tensors, unhandled


def _factors(
    layer: str, parts: Mapping[str, TensorInfo], scale: float, *, dora: bool
) -> MlxLora | str:
    """The factors of a layer, or why they cannot be used."""
    if not {".lora_a", ".lora_b"} <= set(parts):
        return f"expected one pair of factors lora_a and lora_b, found {', '.join(sorted(parts))}"
    A, B, magnitude = parts[".lora_a"], parts[".lora_b"], parts.get(".m")
    if len(A.shape) != 2 or len(B.shape) != 2:
        return f"factors {A.shape} and {B.shape}: experts of MLX-LM are not handled yet"
    if A.shape[1] != B.shape[0] or A.empty or B.empty:
        return f"factors that do not fit together: lora_a {A.shape}, lora_b {B.shape}"
    if strange := {info.dtype for info in parts.values()} - set(FLOATING):
        return f"{', '.join(sorted(strange))} tensor: not a floating-point weight"
    if dora != (magnitude is not None):
        return f"{CONFIG} and the file disagree on a magnitude: DoRA or not is in doubt"
    embedding = layer.rpartition(".")[2] in EMBEDDINGS
    if magnitude is not None and (embedding or magnitude.size != B.shape[1]):
        return f"a magnitude of shape {magnitude.shape} for {B.shape[1]} outputs"
    return MlxLora(A, B, scale, embedding, magnitude)
