"""PEFT's methods whose tuned weight is made of the base's: their tensors and settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from .adapter import Adapter
from .format import AdapterFormat, Place
from .header import FLOATING, TensorInfo
from .of_base import OfBase, replaced_rows
from .peft_other import open_layers

METHODS = {
    "IA3": "IA3",
    "OFT": "OFT",
    "BOFT": "BOFT",
    "HRA": "HRA",
    "FOURIERFT": "FourierFT",
    "TRAINABLE_TOKENS": "TrainableTokens",
}
"""The methods that are read, as PEFT and as people spell them."""

MAX_TERMS = 100
"""A series of more terms is not summed: PEFT takes five."""
MAX_BLOCK = 2**14
"""The largest block of a rotation: as wide as a layer."""

Settings = dict[str, Any]
Sides = tuple[int, int]
Found = tuple[Sides, Settings] | str
"""The sides of the weight that are known, and the settings of the update; or why it is not used."""


def open_of_base(place: Place) -> Adapter:
    """Read the configuration and the header of such an adapter.

    Args:
        place: The adapter folder, or the weights in it.

    Returns:
        The adapter; no tensor has been read.

    Raises:
        AdapterError: If its configuration is damaged.
    """
    settings, method = place.settings, str(place.settings["peft_type"])
    return open_layers(
        place, METHODS[method], PARTS[method], lambda _, parts: _update(method, parts, settings)
    )


PEFT_OF_BASE = AdapterFormat(
    claims=lambda place: place.configured and place.settings.get("peft_type") in tuple(METHODS),
    open=open_of_base,
)
"""The format of PEFT's methods that are named here."""


def _update(
    method: str, parts: Mapping[str, TensorInfo], settings: Mapping[str, Any]
) -> OfBase | str:
    """The update of a layer, or why it cannot be used."""
    if method == "TRAINABLE_TOKENS":
        return replaced_rows(next(iter(parts.values())), settings.get("token_indices"))
    if strange := {info.dtype for info in parts.values()} - set(FLOATING):
        return f"{', '.join(sorted(strange))} tensor: not a floating-point weight"
    shapes = {name: info.shape for name, info in parts.items()}
    if set(shapes) != set(PARTS[method]) or any(0 in shape for shape in shapes.values()):
        return f"{METHODS[method]}: expected {', '.join(PARTS[method])}, found {shapes}"
    found = READERS[method](shapes, settings)
    if isinstance(found, str):
        return f"{METHODS[method]}: {found}"
    sides, own = found
    return OfBase(method, parts, sides, own, settings.get("fan_in_fan_out") is True)


def _ia3(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> Found:
    shape = shapes["ia3_l"]
    if len(shape) != 2 or 1 not in shape:
        return f"scales of shape {shape}, expected (out, 1) or (1, in) of a linear layer"
    return ((shape[0], 0) if shape[1] == 1 else (0, shape[1])), {}


def _oft(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> Found:
    shape, share = shapes["oft_R"], settings.get("block_share") is True
    block = (1 + math.isqrt(1 + 8 * shape[-1])) // 2
    if len(shape) != 2 or block * (block - 1) // 2 != shape[1] or block > MAX_BLOCK:
        return f"rotations of shape {shape}, expected (blocks, b(b - 1)/2) as PEFT 0.15 and later"
    if share and shape[0] != 1:
        return f"{shape[0]} blocks where block_share says that one is shared"
    terms: Any = settings.get("num_cayley_neumann_terms", 5)
    if settings.get("use_cayley_neumann", True) is not True:
        terms = None
    elif type(terms) is not int or not 0 <= terms <= MAX_TERMS:
        return f"num_cayley_neumann_terms {terms!r:.40}: expected a number up to {MAX_TERMS}"
    coft, eps = settings.get("coft") is True, settings.get("eps", 6e-5)
    if coft and not _is_number(eps):
        return f"eps {eps!r:.40}: expected a number"
    own = {"block": block, "coft": coft, "eps": eps if coft else 0.0, "terms": terms}
    return (0, 0 if share else shape[0] * block), own


def _boft(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> Found:
    blocks, scales = shapes["boft_R"], shapes["boft_s"]
    if len(blocks) != 4 or blocks[2] != blocks[3] or len(scales) != 2 or scales[1] != 1:
        return f"parts of shapes {blocks} and {scales}: not those of a linear layer"
    factors, number, size, _ = blocks
    if factors > 1 and (size % 2 or factors > number or number % 2 ** (factors - 1)):
        return (
            f"{factors} butterfly factors for {number} blocks of {size}: expected blocks of an "
            f"even size, and a multiple of 2 to the power of {factors - 1} of them"
        )
    return (scales[0], blocks[1] * blocks[2]), {}


def _hra(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> Found:
    shape = shapes["hra_u"]
    if len(shape) != 2 or shape[1] > shape[0]:
        return f"reflections of shape {shape}, expected (in, r)"
    return (0, shape[0]), {"orthogonal": settings.get("apply_GS") is True}


def _fourier(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> Found:
    shape, scaling = shapes["fourierft_spectrum"], settings.get("scaling", 150.0)
    seed = settings.get("random_loc_seed", 777)
    if len(shape) != 1 or type(seed) is not int or not 0 <= seed < 2**63 or not _is_number(scaling):
        return (
            f"a spectrum of shape {shape}, random_loc_seed {seed!r:.40}, scaling {scaling!r:.40}: "
            "they do not say which frequencies are meant"
        )
    return (0, 0), {"seed": seed, "scaling": float(scaling)}


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < 1e30


PARTS: Mapping[str, tuple[str, ...]] = {
    "IA3": ("ia3_l",),
    "OFT": ("oft_R",),
    "BOFT": ("boft_R", "boft_s"),
    "HRA": ("hra_u",),
    "FOURIERFT": ("fourierft_spectrum",),
    "TRAINABLE_TOKENS": ("trainable_tokens_delta",),
}
"""The stored tensors of a layer, by method."""

READERS: Mapping[str, Callable[[Mapping[str, tuple[int, ...]], Mapping[str, Any]], Found]] = {
    "IA3": _ia3,
    "OFT": _oft,
    "BOFT": _boft,
    "HRA": _hra,
    "FOURIERFT": _fourier,
}
"""What shapes and configuration say, by method."""
