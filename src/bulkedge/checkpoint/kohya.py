"""LoRA in one file without a configuration: by kohya's scripts, diffusers, ComfyUI, ai-toolkit.

Such a file is known by its tensors: two factors for a layer, in one of a few spellings, and no
weight of that layer.  What stands before a layer's path is left to the names of the base.

kohya flattens a layer's path, ``lora_unet_down_blocks_0_…_to_q.lora_down.weight``, and stores alpha
as a tensor; the scale is alpha/r, and one without alpha, or with zero.  Which underscore was a dot
is not guessed: the base's names are flattened the same way, and two that coincide are an error.
LyCORIS writes ``lycoris_`` for ``lora_unet_``; others write nothing.  Its LoHa and LoKr
are read as PEFT's, its full differences as they are.

diffusers keeps the path behind the component's name, ``unet.….to_q.lora_A.weight``, in several
spellings of several years; ComfyUI, ai-toolkit and SimpleTuner keep it behind ``diffusion_model.``,
``transformer.``, PEFT's ``base_model.model.``, or nothing.  Alpha stands in the file's metadata, in
a tensor, or nowhere: then it is r, as in the programs that load such files.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from bulkedge._errors import AdapterError, CheckpointError, problems

from . import writer
from .adapter import Adapter, Unhandled
from .adapter_config import AdapterConfig, checked_config
from .elements import read_elements
from .format import PREFIX, WEIGHTS, AdapterFormat
from .header import FLOATING, TensorInfo, parse_json, read_header
from .lora import LoraFactors, scale_of
from .peft import MAGNITUDE, plain_factors
from .peft_other import LOHA, LOKR, METHODS, ClosedForm, form_of
from .read import Checkpoint
from .update import StoredUpdate

Shape = tuple[int, ...]

FLAT = r"(?P<component>lora_(?:unet|te[123]?|transformer)_)[^.]+"
KOHYA = re.compile(rf"(?P<module>{FLAT})\.(?P<part>.+)")
PARTS = {
    "lora_A.default.weight": "lora_A",
    "lora_B.default.weight": "lora_B",
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
PARTS |= {part: part for part in (*LOHA, *LOKR, "diff")}
PROJECTION = re.compile(
    r"(?P<attention>.+?)(?:\.processor)?\.to_(?P<which>q|k|v|out)_lora\.(?P<part>down|up)\.weight"
)
"""The keys of attention layers before 2024: ``….to_q_lora.down.weight`` of ``….to_q``."""

IN_TEXT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
IN_UNET = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
OTHER = {
    "hada_": "LoHa with a Tucker decomposition",
    "lokr_": "LoKr with a Tucker decomposition",
    "lora_mid": "a Tucker decomposition, with a kernel between the factors",
    "dora_scale": "DoRA as kohya's scripts and LyCORIS store it, each along another side",
    "oft_": "OFT, a rotation",
    "diff": "a full difference",
}
"""What other methods store, by the beginning of the part's name."""

OTHER_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>((hada|lokr|oft)_\w+|lora_mid|dora_scale|diff(_b)?)(\.weight)?)"
)
NO_ALPHA = (
    "no alpha is stored: s = 1, as in programs that load such files; a lost "
    "adapter_config.json of PEFT might say otherwise"
)
FACTORS = ("lora_A", "lora_B", *LOHA, *LOKR, "diff")
"""The parts of an update that a file is known by."""
DOUBT = "no alpha beside it, as LyCORIS stores one: its scale is in doubt; save it again"
MAX_PREFIX_WORDS = 3
"""How many words may stand before a flattened path: ``lycoris_``, ``lora_prior_unet_``."""

METADATA = "lora_adapter_metadata"
MAX_DEPTH = 64
"""The most components of a base name that are compared: every suffix of them is looked up."""


def is_lora_file(checkpoint: Checkpoint) -> bool:
    """Whether a file holds a LoRA without a configuration, in known keys."""
    names = checkpoint.tensors
    if any(KOHYA.fullmatch(name) for name in names):
        return True
    # PEFT's own file without its configuration is a copy that lost half; and a model that was
    # saved with the factors still beside its weights is no adapter
    if any(file.name == WEIGHTS for file in checkpoint.files):
        return False
    found = [_split(name) for name in names]
    modules = {module for module, part in found if part in FACTORS}
    if not modules.issuperset(module for module, _ in found):  # a model may call a weight so
        modules -= {module for module, part in found if part == "diff"}
    weights = (f"{m}.{leaf}" for m in modules for leaf in ("weight", "base_layer.weight"))
    stored = {name.removeprefix(PREFIX) for name in names}
    return bool(modules) and stored.isdisjoint(weights)


def open_lora_file(checkpoint: Checkpoint) -> Adapter:
    """Sort the tensors of such a file into updates and unhandled ones.

    Args:
        checkpoint: The opened file.

    Returns:
        The adapter; of its tensors only the alphas have been read.

    Raises:
        AdapterError: If two tensors are the same part of one layer, or the metadata is damaged.
    """
    modules, unhandled, tainted = _by_layer(checkpoint)
    configs = _configs(checkpoint)
    flat = _flat({*modules, *tainted})
    factors: dict[str, StoredUpdate] = {}
    for module, parts in modules.items():
        found = "another tensor of this layer is not handled"
        if module not in tainted:
            found = _factors(module, parts, configs)
        if isinstance(found, str):
            unhandled += [Unhandled(info, module, found) for info in parts.values()]
        else:
            factors[module if module in flat else f"{module}.weight"] = found
    return Adapter(
        checkpoint.path,
        checkpoint.files,
        factors,
        unhandled=tuple(unhandled),
        flattened=True,
        beside=checkpoint.beside,
        method=_method(factors.values()),
        origin=writer.of_file(read_header(checkpoint.files[0])[1], checkpoint.tensors),
    )


def _method(updates: Iterable[StoredUpdate]) -> str:
    """What to call a file: LoRA, or the one other method that all of it is of."""
    found = {
        METHODS.get(u.method, u.kind) if isinstance(u, ClosedForm) else "LoRA" for u in updates
    }
    return found.pop() if len(found) == 1 else "LoRA"


LORA_FILE = AdapterFormat(
    claims=lambda place: not place.configured and is_lora_file(place.checkpoint),
    open=lambda place: open_lora_file(place.checkpoint),
)
"""The format of one file without a configuration, which claims all factors without weights."""


def _by_layer(
    checkpoint: Checkpoint,
) -> tuple[dict[str, dict[str, TensorInfo]], list[Unhandled], set[str]]:
    """The parts of each layer's update by their names, what is no such part, and its layers."""
    # another method's tensors beside two factors change what the factors mean
    modules: dict[str, dict[str, TensorInfo]] = {}
    unhandled: list[Unhandled] = []
    tainted: set[str] = set()
    for name, info in checkpoint.tensors.items():
        module, part = _split(name)
        if part == "bias" or (part == "diff" and len(info.shape) < 2):
            unhandled.append(Unhandled(info, f"{module}.bias", "1-D tensor: not a matrix", True))
        elif part is None:
            tainted.add(module)
            unhandled.append(Unhandled(info, module, _why_unknown(name.removeprefix(PREFIX))))
        elif part in modules.setdefault(module, {}):
            raise AdapterError(
                f"{info.file}: tensors {name!r} and {modules[module][part].name!r} are the same "
                "part of one layer; keep one"
            )
        else:
            modules[module][part] = info
    return modules, unhandled, tainted


def _flat(modules: set[str]) -> set[str]:
    """The layers whose paths have underscores for dots: kohya's, or all where none has a dot."""
    without = {module for module in modules if "." not in module}
    known = {module for module in without if re.fullmatch(FLAT, module)}
    return without if modules - known <= without else known


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
    others: list[str] = []
    for name in names:
        if match := re.fullmatch(FLAT, name):
            component = match["component"]
            groups.setdefault(component, {})[name.removeprefix(component)] = name
        elif "." not in name:
            others.append(name)
    found = _behind_any_prefix(others, base, fits)
    for wanted in groups.values():
        found |= _unflatten_group(wanted, base, fits)
    return found


def _behind_any_prefix(
    names: list[str], base: Mapping[str, Shape], fits: Callable[[str, Shape], bool]
) -> dict[str, str]:
    """The same for names behind one prefix of some words, whichever explains most of them."""
    best: dict[str, str] = {}
    problem: CheckpointError | None = None
    for words in range(MAX_PREFIX_WORDS + 1 if names else 0):
        groups: dict[str, dict[str, str]] = {"": {}}
        for name in names:
            *prefix, rest = name.split("_", words)
            if len(prefix) == words:
                groups.setdefault("_".join(prefix), {})[rest] = name
        try:
            found = _unflatten_group(max(groups.values(), key=len), base, fits)
        except CheckpointError as error:
            problem = problem or error
            continue
        best = max(best, found, key=len)
        if len(best) == len(names):
            break
    if problem is not None and not best:
        raise problem
    return best


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
    name = name.removeprefix(PREFIX)
    if (match := KOHYA.fullmatch(name)) and match["part"] != "diff_b":
        return match["module"], PARTS.get(match["part"])
    if match := PROJECTION.fullmatch(name):
        in_text = name.startswith("text_encoder")
        layer = (IN_TEXT if in_text else IN_UNET)[match["which"]]
        return f"{match['attention']}.{layer}", PARTS[f"lora_{match['part']}.weight"]
    for end, part in PARTS.items():
        if name.endswith(f".{end}"):
            return name.removesuffix(f".{end}").removesuffix(".processor"), part
    for end in (".lora_B.bias", ".diff_b"):
        if name.endswith(end):
            return name.removesuffix(end), "bias"
    match = OTHER_PART.fullmatch(name)
    return (match["module"] if match else name), None


def _why_unknown(name: str) -> str:
    """Why a tensor of such a file is not handled."""
    match = KOHYA.fullmatch(name) or OTHER_PART.fullmatch(name)
    part = match["part"] if match else ""
    for hint, method in OTHER.items():
        if part.startswith(hint):
            return f"{method}: not handled, merge it into the model"
    return "not a known part of a LoRA"


def _factors(
    module: str, parts: Mapping[str, TensorInfo], configs: Mapping[str, AdapterConfig]
) -> LoraFactors | ClosedForm | str:
    """The factors of a layer with their scale, or why they cannot be handled."""
    component, _, path = module.partition(".")
    stored = {name: info for name, info in parts.items() if name != "alpha"}
    alpha = parts.get("alpha")
    if not {"lora_A", "lora_B", MAGNITUDE}.issuperset(stored):
        return _closed_form(stored, alpha)
    if alpha is None and component in configs:
        return plain_factors(path, stored, configs[component])
    if alpha is None and "" in configs:
        return plain_factors(module, stored, configs[""])
    A = stored.get("lora_A")
    rank = A.shape[0] if A is not None and A.shape and A.shape[0] else 1
    value = rank if alpha is None else _alpha(alpha, rank)
    if isinstance(value, str):
        return value
    try:
        config = AdapterConfig(
            peft_type="LORA", r=rank, lora_alpha=value, use_dora=MAGNITUDE in stored
        )
    except ValidationError as error:
        return f"alpha and rank: {problems(error)}"
    found = plain_factors(path, stored, config)
    if isinstance(found, str):
        return found
    by_peft = alpha is None and any(info.name.startswith(PREFIX) for info in stored.values())
    return replace(found.noted(*([NO_ALPHA] if by_peft else [])), alpha=alpha)


def _alpha(alpha: TensorInfo, rank: int) -> float | str:
    """The number that a tensor holds, r instead of zero; or why it is not a number."""
    if alpha.size != 1 or alpha.dtype not in (*FLOATING, "I64", "I32"):
        return f"alpha of shape {alpha.shape} in {alpha.dtype}: expected one number"
    return float(read_elements(alpha, 0, 1)) or rank


def _closed_form(parts: Mapping[str, TensorInfo], alpha: TensorInfo | None) -> ClosedForm | str:
    """The update of a layer that LyCORIS stores as a product of another kind, or as it is."""
    method = "FULL" if set(parts) == {"diff"} else "LOHA" if LOHA[0] in parts else "LOKR"
    found = form_of(method, parts)
    if isinstance(found, str):
        return found
    # a product that is not decomposed has no rank, and LyCORIS no scale for it
    inner = [parts[name].shape[0] for name in (LOHA[1], LOKR[2], LOKR[5]) if name in parts]
    if not inner:
        return ClosedForm(method, parts, found[0], 1.0)
    if alpha is None:
        return DOUBT
    value = _alpha(alpha, inner[0])
    if isinstance(value, str) or not math.isfinite(value):
        return f"alpha and rank: {value}"
    return ClosedForm(method, parts, found[0], scale_of(value, inner[0]))


def _configs(checkpoint: Checkpoint) -> dict[str, AdapterConfig]:
    """What the metadata of a file by diffusers says of each component, or of all: under ""."""
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
        component, _, field = key.rpartition(".")
        fields.setdefault(component, {"peft_type": "LORA"})[field] = value
    return {name: checked_config(settings, source) for name, settings in fields.items()}
