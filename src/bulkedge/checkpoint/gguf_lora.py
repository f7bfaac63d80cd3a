"""LoRA adapters in GGUF, as llama.cpp's ``convert_lora_to_gguf.py`` writes them.

Beside the setting ``adapter.lora.alpha`` lie ``blk.0.attn_q.weight.lora_a``, ``(r, in)``, and
``….lora_b``, ``(out, r)``, of each layer; the scale is α/r, and one without α.  Rows of B are in
the order of llama.cpp where those of the weight are.  Of ``token_embd``, A is ``(vocab, r)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bulkedge._errors import AdapterError

from .adapter import Adapter, Unhandled
from .codec.gguf import GgufWeight, gguf_weight
from .format import AdapterFormat, Place
from .gguf import ENDING, GgufTensor, read_gguf
from .gguf_names import heads_of
from .header import TensorInfo
from .lora import scale_of
from .read import model_names_of
from .update import Correctable, Rows

if TYPE_CHECKING:  # listing names needs no torch
    from torch import Tensor

A_END, B_END = ".lora_a", ".lora_b"
EMBEDDING = "token_embd.weight"
FIXED = "GGUF: not written; repair the adapter that it was converted from"


@dataclass(frozen=True)
class GgufLora:
    """The stored factors of one update.

    Attributes:
        A: Shape ``(r, in)``; of an embedding ``(vocab, r)``.
        B: Shape ``(out, r)``.
        scale: The number in front of ``B A``.
        embedding: Whether the weight is ``(vocab, dim)`` and the update ``s·A·Bᵀ``.
        rows: The output rows that are meant; None for all.
    """

    A: GgufWeight
    B: GgufWeight
    scale: float
    embedding: bool = False
    rows: Rows | None = None
    kind = "lora"
    note = None
    fan_in_fan_out = False

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """The stored tensors."""
        return self.A.info, self.B.info

    @property
    def rank(self) -> int:
        """The rank r of the factors."""
        return self.B.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix that they update."""
        if self.embedding:
            return self.A.shape[0], self.B.shape[0]
        rows = self.B.shape[0] if self.rows is None else self.rows[1] - self.rows[0]
        return rows, self.A.shape[1]

    def fits(self, stored: tuple[int, ...]) -> bool:
        """Whether a base tensor of the shape ``stored`` can be what they update."""
        return stored == self.shape or (not self.embedding and stored == self.shape[::-1])

    def of(self, *, expert: int | None = None, rows: Rows | None = None) -> GgufLora:
        """The factors of a range of output rows."""
        return replace(self, rows=self.rows if rows is None else rows)

    def read(self) -> tuple[Tensor, Tensor, float]:
        """``(B, A, s)`` with ``s·B·A`` the update of the matrix as ``(out, in)``."""
        A, B = self.A.read(None, None).double(), self.B.read(None, None).double()
        if self.embedding:
            A, B = B.mT, A
        return (B if self.rows is None else B[slice(*self.rows)]), A, self.scale

    def read_magnitude(self) -> None:
        """None: GGUF holds no DoRA."""

    def correctable(self) -> Correctable | str:
        """Why not."""
        return FIXED


def is_gguf_adapter(place: Place) -> bool:
    """Whether a GGUF file lies there that says it is an adapter."""
    path = Path(place.path)
    is_file = path.suffix == ENDING and path.is_file()
    return is_file and read_gguf(path)[0].get("general.type") == "adapter"


def open_gguf_adapter(place: Place) -> Adapter:
    """Read the header of such a file.

    Args:
        place: The file.

    Returns:
        The adapter; no tensor has been read.

    Raises:
        AdapterError: If it is no LoRA, or its alpha is no number.
    """
    file = Path(place.path)
    settings, tensors = read_gguf(file)
    if (kind := settings.get("adapter.type")) != "lora":
        raise AdapterError(f"{file}: an adapter of type {kind!r:.60}; only lora is handled")
    alpha = settings.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not abs(alpha) < 1e30:
        raise AdapterError(f"{file}: adapter.lora.alpha is {alpha!r:.60}; convert it again")
    stems = list(dict.fromkeys(_stem(name) for name in tensors))
    names = model_names_of(file, settings, stems)
    factors: dict[str, GgufLora] = {}
    unhandled: list[Unhandled] = []
    for stem in stems:
        parts = {n: tensors[n] for n in (stem, stem + A_END, stem + B_END) if n in tensors}
        codecs = [gguf_weight(t, file, n, _heads(n, stem, settings)) for n, t in parts.items()]
        found = _factors(stem, parts, dict(zip(parts, codecs, strict=True)), alpha)
        if isinstance(found, str):
            vectors = all(len(t.shape) == 1 for t in parts.values())
            unhandled += [Unhandled(c.info, names[stem], found, vectors) for c in codecs]
        else:
            factors[names[stem]] = found
    stored = tuple(gguf_weight(t, file, n, 0).info for n, t in tensors.items())
    return Adapter(
        file, (file,), factors, unhandled=tuple(unhandled), origin="in GGUF", stored=stored
    )


GGUF_LORA = AdapterFormat(claims=is_gguf_adapter, open=open_gguf_adapter)
"""The format of a GGUF file whose ``general.type`` is ``adapter``."""


def _stem(name: str) -> str:
    """The weight that a tensor is a factor of the update of."""
    return name.removesuffix(A_END).removesuffix(B_END)


def _heads(name: str, stem: str, settings: Mapping[str, Any]) -> int:
    """Heads whose rows are in llama.cpp's order: only B has rows of the weight."""
    return heads_of(stem, settings) if name.endswith(B_END) else 0


def _factors(
    stem: str, parts: Mapping[str, GgufTensor], codecs: Mapping[str, GgufWeight], alpha: float
) -> GgufLora | str:
    """The factors of a weight, or why they cannot be used."""
    A, B = codecs.get(stem + A_END), codecs.get(stem + B_END)
    if A is None or B is None or len(parts) != 2:
        return "no pair of factors lora_a and lora_b: not a known part of a LoRA"
    if len(A.shape) != 2 or len(B.shape) != 2:
        return f"factors of shapes {A.shape} and {B.shape}: not those of one matrix"
    if reason := A.unreadable or B.unreadable:
        return reason
    embedding = stem == EMBEDDING and A.shape[1] == B.shape[1]
    rank = B.shape[1]
    if not embedding and A.shape[0] != rank:
        return f"factors that do not fit together: A {A.shape}, B {B.shape}"
    return GgufLora(A, B, scale_of(alpha, rank) if alpha else 1.0, embedding)
