"""PEFT's methods whose update is a closed form of the stored numbers alone.

LoHa: ``s (W1a W1b) ∘ (W2a W2b)`` (arXiv:2108.06098).  LoKr: ``s W1 ⊗ W2``, either of which may be
a product (arXiv:2309.14859).  Both have the scale α/r.  AdaLoRA: ``s B diag(E) A`` with
s = α/(r + 1e-5) (arXiv:2303.10512).  VeRA: ``diag(λb) B diag(λd) A`` with B and A that all layers
share, where they are stored (arXiv:2310.11454), for layers as wide as A.

Those that are made of the base's weight are in ``peft_of_base``; VB-LoRA and others are refused by
name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bulkedge._errors import AdapterError

from .adapter import Adapter, Unhandled
from .adapter_config import CONFIG, AdapterConfig
from .elements import read_tensor
from .format import PART_OF_A_METHOD, AdapterFormat, Place, plain_name
from .header import FLOATING, TensorInfo
from .lora import scale_of
from .patterns import Patterns
from .update import Correctable, Rows, StoredUpdate

if TYPE_CHECKING:  # listing names needs no torch
    from torch import Tensor

METHODS = {"LOHA": "LoHa", "LOKR": "LoKr", "ADALORA": "AdaLoRA", "VERA": "VeRA"}
"""The methods that are read, as PEFT and as people spell them."""

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
ADALORA = ("lora_A", "lora_B", "lora_E")
VERA = ("vera_lambda_b", "vera_lambda_d")
PARTS = {"LOHA": LOHA, "LOKR": LOKR, "ADALORA": ADALORA, "VERA": VERA}
SHARED = ("base_model.vera_A", "base_model.vera_B")
RANK_SHIFT = 1e-5
"""What PEFT adds to the rank that AdaLoRA's α is divided by."""

FIXED = "an update of another form than a LoRA's: merge it into the model, and repair that"


@dataclass(frozen=True)
class ClosedForm:
    """An update that follows from stored tensors.

    Attributes:
        method: As PEFT spells it.
        parts: The stored tensors by the names of their parts.
        shape: Of the matrix that is updated.
        scale: The number in front.
        rank: The rank that it was trained with; None where that is not the update's.
        part_rows: The output rows that are meant; None for all.
    """

    method: str
    parts: Mapping[str, TensorInfo] = field(hash=False)
    shape: tuple[int, int]
    scale: float
    rank: int | None = None
    part_rows: Rows | None = None
    note = None
    embedding = False
    fan_in_fan_out = False

    @property
    def kind(self) -> str:
        """The method in lower case."""
        return self.method.lower()

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """The stored tensors of this layer alone."""
        return tuple(info for name, info in self.parts.items() if name not in SHARED)

    def fits(self, stored: tuple[int, ...]) -> bool:
        """Whether a base tensor of the shape ``stored`` can be what it updates."""
        if len(stored) in (4, 5):  # the kernel of a convolution is the matrix (out, in·kh·kw)
            return (stored[0], math.prod(stored[1:])) == self.shape
        return stored in (self.shape, self.shape[::-1])

    def of(self, *, expert: int | None = None, rows: Rows | None = None) -> ClosedForm:
        """The update of a range of output rows."""
        if rows is None:
            return self
        return replace(self, part_rows=rows, shape=(rows[1] - rows[0], self.shape[1]))

    def read(self) -> tuple[Tensor, Tensor, float]:
        """``(B, A, s)`` with ``s·B·A`` the update; A is the identity where its rank is full."""
        tensors = {name: read_tensor(info).double() for name, info in self.parts.items()}
        left, right = FORMS[self.method](tensors, self.shape)
        return (left if self.part_rows is None else left[slice(*self.part_rows)]), right, self.scale

    def read_magnitude(self) -> None:
        """None: nothing is scaled besides."""

    def correctable(self) -> Correctable | str:
        """Why not."""
        return FIXED


def _whole(update: Tensor) -> tuple[Tensor, Tensor]:
    """An update of full rank as factors."""
    import torch

    return update, torch.eye(update.shape[1], dtype=update.dtype)


def _loha(t: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return _whole((t[LOHA[0]] @ t[LOHA[1]]) * (t[LOHA[2]] @ t[LOHA[3]]))


def _lokr(t: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    import torch

    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    second = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    return _whole(torch.kron(first.contiguous(), second.flatten(1).contiguous()))


def _full(t: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return _whole(t["diff"].flatten(1))


def _adalora(t: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return t["lora_B"], t["lora_A"] * t["lora_E"]


def _vera(t: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    rank, rows = len(t["vera_lambda_d"]), len(t["vera_lambda_b"])
    A, B = t[SHARED[0]][:rank, : shape[1]], t[SHARED[1]][:rows, :rank]
    return t["vera_lambda_b"][:, None] * B, t["vera_lambda_d"][:, None] * A


FORMS = {"LOHA": _loha, "LOKR": _lokr, "ADALORA": _adalora, "VERA": _vera, "FULL": _full}


def open_other(place: Place) -> Adapter:
    """Read the configuration and the header of such an adapter.

    Args:
        place: The adapter folder, or the weights in it.

    Returns:
        The adapter; no tensor has been read.

    Raises:
        AdapterError: If its configuration is damaged.
    """
    settings, method = place.settings, str(place.settings["peft_type"])
    source = place.folder / CONFIG
    shared = {name: place.tensors[name] for name in SHARED if name in place.tensors}
    rank, alpha = settings.get("r", 8), settings.get("alpha", settings.get("lora_alpha", 8))
    if method == "ADALORA":
        rank = settings.get("init_r", 12)
    if type(rank) is not int or not 1 <= rank < 2**20 or not _is_number(alpha):
        raise AdapterError(f"{source}: r {rank!r:.40}, alpha {alpha!r:.40}: expected numbers")
    ranks, alphas = (
        Patterns(_numbers(settings.get(name)), f"{source}: {name}")
        for name in ("rank_pattern", "alpha_pattern")
    )

    def update(layer: str, parts: Mapping[str, TensorInfo]) -> ClosedForm | str:
        if method == "VERA":
            parts = {**parts, **shared}
        found = form_of(method, parts)
        if isinstance(found, str):
            return found
        shape, own = found
        scale = 1.0
        if method in ("LOHA", "LOKR"):
            scale = scale_of(alphas.value(layer, alpha), int(ranks.value(layer, rank)) or 1)
        elif method == "ADALORA":
            scale = (alpha if alpha > 0 else rank) / (rank + RANK_SHIFT)
        return ClosedForm(method, parts, shape, float(scale), own)

    return open_layers(place, METHODS[method], PARTS[method], update)


def open_layers(
    place: Place,
    method: str,
    wanted: tuple[str, ...],
    update: Callable[[str, Mapping[str, TensorInfo]], StoredUpdate | str],
) -> Adapter:
    """Read an adapter of PEFT with one update per layer.

    Args:
        place: The adapter folder, or the weights in it.
        method: As people spell it.
        wanted: The names of the parts of a layer.
        update: Makes an update of a layer's name and its parts, or says why they are not used.

    Returns:
        The adapter.
    """
    layers, tensors, unhandled = by_layer(place.tensors, wanted)
    factors: dict[str, StoredUpdate] = {}
    for layer, parts in layers.items():
        found = update(layer, parts)
        if isinstance(found, str):
            unhandled += [Unhandled(i, f"{layer}.weight", found) for i in parts.values()]
        else:
            factors[f"{layer}.weight"] = found
    base = place.settings.get("base_model_name_or_path")
    return place.adapter(
        factors=factors,
        config=AdapterConfig(peft_type="LORA", base_model_name_or_path=base),
        tensors=tensors,
        unhandled=tuple(unhandled),
        method=method,
    )


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number that a scale can be made of."""
    return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < 1e30


def _numbers(value: Any) -> dict[str, float]:
    """The numbers of a pattern; AdaLoRA's holds lists, which the shapes already show."""
    return {k: v for k, v in value.items() if _is_number(v)} if isinstance(value, dict) else {}


PEFT_OTHER = AdapterFormat(
    claims=lambda place: place.configured and place.settings.get("peft_type") in tuple(METHODS),
    open=open_other,
)
"""The format of PEFT's methods that are named here."""


def by_layer(
    stored: Mapping[str, TensorInfo], wanted: tuple[str, ...]
) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo], list[Unhandled]]:
    """The parts of each layer by name, full tensors, and what is neither.

    Args:
        stored: The tensors of an adapter.
        wanted: The names of the parts.

    Returns:
        Parts by layer, tensors by name, and the rest.
    """
    layers: dict[str, dict[str, TensorInfo]] = {}
    tensors: dict[str, TensorInfo] = {}
    unhandled: list[Unhandled] = []
    for key, info in stored.items():
        if key in SHARED:
            unhandled.append(Unhandled(info, key, "a projection that all layers share", True))
            continue
        name = plain_name(key)
        layer, _, part = name.removesuffix(".weight").removesuffix(".default").rpartition(".")
        if part in wanted:
            layers.setdefault(layer.replace(".base_layer", ""), {})[part] = info
        elif PART_OF_A_METHOD.search(name):
            reason = "a part that is not handled, such as of a Tucker decomposition"
            unhandled.append(Unhandled(info, f"{layer}.weight", reason))
        else:
            tensors[name.replace(".base_layer", "")] = info
    return layers, tensors, unhandled


def form_of(
    method: str, parts: Mapping[str, TensorInfo]
) -> tuple[tuple[int, int], int | None] | str:
    """Shape and rank of an update, or why it cannot be used.

    Args:
        method: As PEFT spells it.
        parts: Its stored tensors by the names of their parts.

    Returns:
        Shape of the matrix and rank, None of an update without one; or the reason.
    """
    if strange := {info.dtype for info in parts.values()} - set(FLOATING):
        return f"{', '.join(sorted(strange))} tensor: not a floating-point weight"
    if any(0 in info.shape for info in parts.values()):
        return "an empty factor: a damaged save"
    shapes = {name: info.shape for name, info in parts.items()}
    called = METHODS.get(method, method)
    unfit = f"{called}: its parts do not fit together, or are not those of a matrix"
    return SHAPES[method](shapes) or unfit


Shapes = Mapping[str, tuple[int, ...]]


def _product(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> tuple[int, int] | None:
    """The shape of a product of two matrices; None if they are not matrices, or do not fit."""
    if a is None or b is None or len(a) != 2 or len(b) != 2 or a[1] != b[0]:
        return None
    return a[0], b[1]


def _loha_shape(s: Shapes) -> tuple[tuple[int, int], None] | None:
    first, second = (_product(s.get(LOHA[i]), s.get(LOHA[i + 1])) for i in (0, 2))
    return (first, None) if first is not None and first == second else None


def _lokr_shape(s: Shapes) -> tuple[tuple[int, int], None] | None:
    both = []
    for name in ("lokr_w1", "lokr_w2"):
        whole = s.get(name)
        if (whole is None) == (f"{name}_a" not in s and f"{name}_b" not in s):
            return None
        both.append(_product(s.get(f"{name}_a"), s.get(f"{name}_b")) if whole is None else whole)
    first, second = both
    if first is None or second is None or len(first) != 2 or len(second) not in (2, 4, 5):
        return None
    (a, b), (c, d) = first, (second[0], math.prod(second[1:]))
    return ((a * c, b * d), None) if math.prod((a, b, c, d)) < 2**40 else None


def _adalora_shape(s: Shapes) -> tuple[tuple[int, int], int] | None:
    shape = _product(s.get("lora_B"), s.get("lora_A"))
    return None if shape is None or s.get("lora_E") != (s["lora_A"][0], 1) else (
        shape, s["lora_A"][0]
    )  # fmt: skip


def _vera_shape(s: Shapes) -> tuple[tuple[int, int], int] | None:
    b, d, A, B = (s.get(name) for name in (*VERA, *SHARED))
    if b is None or d is None or A is None or B is None or len(b) != 1 or len(d) != 1:
        return None
    if len(A) != 2 or len(B) != 2 or d[0] > A[0] or d[0] > B[1] or b[0] > B[0]:
        return None
    return (b[0], A[1]), d[0]


def _full_shape(s: Shapes) -> tuple[tuple[int, int], None] | None:
    shape = s["diff"]
    return ((shape[0], math.prod(shape[1:])), None) if len(shape) in (2, 4, 5) else None


SHAPES = {
    "LOHA": _loha_shape,
    "LOKR": _lokr_shape,
    "ADALORA": _adalora_shape,
    "VERA": _vera_shape,
    "FULL": _full_shape,
}
