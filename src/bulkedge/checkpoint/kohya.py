"""LoRA of image models: one file, no configuration, in the keys of kohya's scripts or of diffusers.

kohya flattens a layer's path, ``lora_unet_down_blocks_0_…_to_q.lora_down.weight``, and stores alpha
as a tensor; the scale is alpha/r, and one without alpha, or with zero.  Which underscore was a dot
is not guessed: the base's names are flattened the same way, and two that coincide are an error.

diffusers keeps the path behind the component's name, ``unet.….to_q.lora_A.weight``, in several
spellings of several years; alpha stands in the file's metadata, in a tensor, or nowhere: then it
is r.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from bulkedge._errors import AdapterError, CheckpointError, problems

from .adapter import Adapter, Unhandled
from .adapter_config import AdapterConfig, checked_config
from .elements import read_elements
from .format import AdapterFormat
from .header import FLOATING, TensorInfo, parse_json, read_header
from .lora import LoraFactors
from .peft import MAGNITUDE, plain_factors
from .read import Checkpoint

Shape = tuple[int, ...]

FLAT = r"(?P<component>lora_(?:unet|te[123]?|transformer)_)[^.]+"
KOHYA = re.compile(rf"(?P<module>{FLAT})\.(?P<part>.+)")
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
PARTS = {
    "lora_down.weight": "lora_A",
    "lora_up.weight": "lora_B",
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora.down.weight": "lora_A",
    "lora.up.weight": "lora_B",
    "lora_linear_layer.down.weight": "lora_A",
    "lora_linear_layer.up.weight": "lora_B",
    "lora_magnitude_vector": MAGNITUDE,
    "lora_magnitude_vector.weight": MAGNITUDE,
    "alpha": "alpha",
}
PROJECTION = re.compile(
    r"(?P<attention>.+?)(?:\.processor)?\.to_(?P<which>q|k|v|out)_lora\.(?P<part>down|up)\.weight"
)
"""The keys of attention layers before 2024: ``….to_q_lora.down.weight`` of ``….to_q``."""

IN_TEXT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
IN_UNET = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
OTHER = {
    "hada_": "LoHa, a product of two updates entry by entry",
    "lokr_": "LoKr, a Kronecker product",
    "lora_mid": "a Tucker decomposition, with a kernel between the factors",
    "dora_scale": "DoRA as kohya's scripts and LyCORIS store it, each along another side",
    "oft_": "OFT, a rotation",
    "diff": "a full difference",
}
"""What other methods store, by the beginning of the part's name."""

METADATA = "lora_adapter_metadata"
MAX_DEPTH = 64
"""The most components of a base name that are compared: every suffix of them is looked up."""


def is_lora_file(checkpoint: Checkpoint) -> bool:
    """Whether a file holds a LoRA without a configuration, in keys that are known here."""
    names = checkpoint.tensors
    kohya = any(KOHYA.fullmatch(name) for name in names)
    return kohya or any(
        PROJECTION.fullmatch(name)
        or (name.split(".")[0] in COMPONENTS and _split(name)[1] in ("lora_A", "lora_B"))
        for name in names
    )


def open_lora_file(checkpoint: Checkpoint) -> Adapter:
    """Sort the tensors of such a file into updates and what is not handled.

    Args:
        checkpoint: The opened file.

    Returns:
        The adapter; of its tensors only the alphas have been read.

    Raises:
        AdapterError: If two tensors are the same part of one layer, or the metadata is damaged.
    """
    modules, unhandled = _by_layer(checkpoint)
    # another method's tensors beside two factors change what the factors mean
    tainted = {match["module"] for row in unhandled if (match := KOHYA.fullmatch(row.name))}
    configs = _configs(checkpoint)
    factors: dict[str, LoraFactors] = {}
    for module, parts in modules.items():
        found = "another tensor of this layer is not handled"
        if module not in tainted:
            found = _factors(module, parts, configs)
        if isinstance(found, str):
            unhandled += [Unhandled(info, module, found) for info in parts.values()]
        else:
            factors[module if re.fullmatch(FLAT, module) else f"{module}.weight"] = found
    return Adapter(
        checkpoint.path,
        checkpoint.files,
        factors,
        unhandled=tuple(unhandled),
        flattened=True,
        beside=checkpoint.beside,
    )


LORA_FILE = AdapterFormat(
    claims=lambda place: not place.configured and is_lora_file(place.checkpoint),
    open=lambda place: open_lora_file(place.checkpoint),
)
"""The format of one file without a configuration, which claims every file with its prefixes."""


def _by_layer(
    checkpoint: Checkpoint,
) -> tuple[dict[str, dict[str, TensorInfo]], list[Unhandled]]:
    """The parts of each layer's update by their names, and the tensors that are no such part."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    unhandled: list[Unhandled] = []
    for name, info in checkpoint.tensors.items():
        module, part = _split(name)
        if part == "bias":
            unhandled.append(Unhandled(info, f"{module}.bias", "1-D tensor: not a matrix", True))
        elif part is None:
            unhandled.append(Unhandled(info, name, _why_unknown(name)))
        elif part in modules.setdefault(module, {}):
            raise AdapterError(
                f"{info.file}: tensors {name!r} and {modules[module][part].name!r} are the same "
                "part of one layer; keep one"
            )
        else:
            modules[module][part] = info
    return modules, unhandled


def unflatten(
    names: Iterable[str], base: Mapping[str, Shape], fits: Callable[[str, Shape], bool]
) -> dict[str, str]:
    """The base tensors that flattened names belong to.

    Args:
        names: Such as ``lora_unet_mid_block_…``.
        base: Shapes of the base tensors, by name.
        fits: Whether the update of a name can belong to a tensor of a shape.

    Returns:
        Base names by flattened names; those of a component that the base is not are left out.

    Raises:
        CheckpointError: If two base tensors have the same flattened name.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        if match := re.fullmatch(FLAT, name):
            component = match["component"]
            groups.setdefault(component, {})[name.removeprefix(component)] = name
    found: dict[str, str] = {}
    for wanted in groups.values():
        found |= _unflatten_group(wanted, base, fits)
    return found


def _unflatten_group(
    wanted: Mapping[str, str], base: Mapping[str, Shape], fits: Callable[[str, Shape], bool]
) -> dict[str, str]:
    """The same for one component, of which all names stand behind the same prefix in the base."""
    candidates: dict[str, list[tuple[str, str]]] = {}
    votes: Counter[str] = Counter()
    for name, shape in base.items():
        *path, leaf = name.split(".", MAX_DEPTH)
        for i in range(len(path) if leaf == "weight" else 0):
            flat = "_".join(path[i:])
            if flat in wanted:
                prefix = ".".join(path[:i])
                candidates.setdefault(prefix, []).append((flat, name))
                votes[prefix] += fits(wanted[flat], shape)
    best = votes.most_common(2)
    if not best or best[0][1] == 0:
        return {}
    if len(best) == 2 and best[0][1] == best[1][1]:
        raise CheckpointError(
            f"flattened names such as {next(iter(wanted.values()))!r} fit the base behind "
            f"{best[0][0]!r} and behind {best[1][0]!r}; give the one component that was tuned"
        )
    found: dict[str, str] = {}
    for flat, name in candidates[best[0][0]]:
        other = found.setdefault(wanted[flat], name)
        if other != name:
            raise CheckpointError(
                f"{wanted[flat]!r} may belong to {other!r} or to {name!r} of the base, which are "
                "the same with underscores for dots; leave it out with --exclude"
            )
    return found


def _split(name: str) -> tuple[str, str | None]:
    """The layer's path and the part's name; None for no known part."""
    if match := KOHYA.fullmatch(name):
        return match["module"], PARTS.get(match["part"])
    if match := PROJECTION.fullmatch(name):
        in_text = name.startswith("text_encoder")
        layer = (IN_TEXT if in_text else IN_UNET)[match["which"]]
        return f"{match['attention']}.{layer}", PARTS[f"lora_{match['part']}.weight"]
    for end, part in PARTS.items():
        if name.endswith(f".{end}"):
            return name.removesuffix(f".{end}").removesuffix(".processor"), part
    if name.endswith(".lora_B.bias"):
        return name.removesuffix(".lora_B.bias"), "bias"
    return name, None


def _why_unknown(name: str) -> str:
    """Why a tensor of such a file is not handled."""
    part = name.partition(".")[2]
    for hint, method in OTHER.items():
        if part.startswith(hint):
            return f"{method}: not handled, merge it into the model"
    return "no part of a LoRA that is known here"


def _factors(
    module: str, parts: Mapping[str, TensorInfo], configs: Mapping[str, AdapterConfig]
) -> LoraFactors | str:
    """The factors of a layer with their scale, or why they cannot be handled."""
    component, _, path = module.partition(".")
    stored = {name: info for name, info in parts.items() if name != "alpha"}
    alpha = parts.get("alpha")
    if component in configs and alpha is None:
        return plain_factors(path, stored, configs[component])
    A = stored.get("lora_A")
    rank = A.shape[0] if A is not None and A.shape and A.shape[0] else 1
    value = rank
    if alpha is not None:
        if alpha.size != 1 or alpha.dtype not in (*FLOATING, "I64", "I32"):
            return f"alpha of shape {alpha.shape} in {alpha.dtype}: expected one number"
        value = float(read_elements(alpha, 0, 1)) or rank
    try:
        config = AdapterConfig(
            peft_type="LORA", r=rank, lora_alpha=value, use_dora=MAGNITUDE in stored
        )
    except ValidationError as error:
        return f"alpha and rank: {problems(error)}"
    found = plain_factors(path, stored, config)
    return found if isinstance(found, str) else replace(found, alpha=alpha)


def _configs(checkpoint: Checkpoint) -> dict[str, AdapterConfig]:
    """What the metadata of a file by diffusers says of each component."""
    file = checkpoint.files[0]
    _, metadata = read_header(file)
    source = f"{file}: metadata {METADATA!r}"
    try:
        content = parse_json(metadata.get(METADATA, "{}").encode())
    except ValueError as error:
        raise AdapterError(f"{source}: {error}; save it again with diffusers") from None
    if not isinstance(content, dict):
        raise AdapterError(f"{source}: expected an object; save it again with diffusers")
    fields: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        component, _, field = key.partition(".")
        fields.setdefault(component, {"peft_type": "LORA"})[field] = value
    return {name: checked_config(settings, source) for name, settings in fields.items()}
