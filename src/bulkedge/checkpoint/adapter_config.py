"""What ``adapter_config.json`` says of a LoRA adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bulkedge._errors import AdapterError, problems

from .lora import CONVERT, FROM_THE_BASE, scale_of
from .patterns import Patterns

CONFIG = "adapter_config.json"
BY_UNSLOTH = re.compile(r"(^|[/\\])(models--)?unsloth(/|--)", re.IGNORECASE)

MERGE = (
    "PEFT does not convert it: audit the merged checkpoint, of "
    "peft_model.merge_and_unload().save_pretrained(OUT)"
)
CHANGES_THE_BASE = {
    "pissa": ("by random projections", CONVERT),
    "olora": ("in a spelling that PEFT does not know", CONVERT),
    "corda": ("by the inputs of a calibration", CONVERT),
    "lora_ga": ("by gradients of a batch", CONVERT),
    "loftq": ("by a quantisation of its own", MERGE),
}
"""The others that change the base, by how their names begin: the factors are relative to a base
that nobody stores.  By what it was changed, and what to do."""

NOT_A_SUM = {
    "kasa_config": "KaSA, which truncates the base",
    "layer_replication": "layer_replication, which changes the layers",
    "use_qalora": "QALoRA, which pools the inputs",
    "use_bdlora": "BD-LoRA, whose factors are block-diagonal",
    "alora_invocation_tokens": "aLoRA, which acts on some tokens only",
    "arrow_config": "Arrow, which mixes adapters by input",
}
"""Variants of which W0 + s·B·A is not the tuned weight, by the field that asks for them."""

Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Flag = Annotated[bool, Field(strict=True)]  # PEFT takes the text "false" for true


class AdapterConfig(BaseModel):
    """The fields of ``adapter_config.json`` that say what the update is; others are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    peft_type: str
    r: Annotated[int, Field(ge=1, le=2**20, strict=True)] = 8
    lora_alpha: Number = 8
    use_rslora: Flag = False
    use_dora: Flag = False
    fan_in_fan_out: Flag = False
    rank_pattern: dict[str, Number] | None = None
    alpha_pattern: dict[str, Number] | None = None
    init_lora_weights: Any = True
    target_parameters: list[str] | None = None
    lora_B_layout: Any = None
    unsloth_fused_expert_lora: Any = None
    auto_mapping: Any = None
    ensure_weight_tying: Flag = False
    peft_version: str | None = None
    base_model_name_or_path: Any = None
    revision: Any = None

    @cached_property
    def owned(self) -> dict[str, list[str]]:
        """What ``target_parameters`` names, by the path of the module, empty for any."""
        found: dict[str, list[str]] = {}
        for target in self.target_parameters or ():
            owner, _, parameter = target.rpartition(".")
            found.setdefault(owner, []).append(parameter)
        return found

    @property
    def initial(self) -> str | None:
        """The initialisation whose product the base determines; None for every other."""
        init = self.init_lora_weights
        if not isinstance(init, str):
            return None
        name = "olora" if init.lower() == "olora" else init  # as PEFT compares them
        return name if name in FROM_THE_BASE else None

    @cached_property
    def ranks(self) -> Patterns:
        """The ranks of modules that differ from ``r``."""
        return Patterns(self.rank_pattern or {}, f"{CONFIG}: rank_pattern")

    @cached_property
    def alphas(self) -> Patterns:
        """The alphas of modules that differ from ``lora_alpha``."""
        return Patterns(self.alpha_pattern or {}, f"{CONFIG}: alpha_pattern")

    def layouts(self, parameter: str) -> set[str]:
        """The stated layouts of B of experts: none, one, or several."""
        detail = self.unsloth_fused_expert_lora
        entries = detail.get("parameters") if isinstance(detail, dict) else None
        entry = entries.get(parameter) if isinstance(entries, dict) else None
        own = entry.get("lora_B_layout") if isinstance(entry, dict) else None
        found = (layout for layout in (self.lora_B_layout, own) if layout is not None)
        return {said if isinstance(said, str) else type(said).__name__ for said in found}

    @property
    def by_unsloth(self) -> bool:
        """Whether Unsloth wrote it, or probably trained it."""
        mapping = self.auto_mapping if isinstance(self.auto_mapping, dict) else {}
        base = self.base_model_name_or_path
        fixed = mapping.get("unsloth_fixed") or self.unsloth_fused_expert_lora is not None
        return bool(fixed) or (isinstance(base, str) and bool(BY_UNSLOTH.search(base)))

    def scale(self, module: str, rank: int) -> float:
        """The number in front of ``B A``, by PEFT's rules."""
        alpha = self.alphas.value(module, self.lora_alpha)
        return scale_of(alpha, rank, rslora=self.use_rslora)

    def conflicts(self, module: str) -> list[str]:
        """Where two patterns contradict each other about a module."""
        found = (patterns.conflict(module) for patterns in (self.ranks, self.alphas))
        return [conflict for conflict in found if conflict]


def checked_config(
    content: Mapping[str, Any], source: Path | str, *, in_a_folder: bool = False
) -> AdapterConfig:
    """A configuration, once it is known to say how an unchanged base is updated.

    Args:
        content: Its fields.
        source: Where they come from, for a message.
        in_a_folder: Whether PEFT reads it beside the weights, and repeats the initialisation.

    Returns:
        The configuration.

    Raises:
        AdapterError: If a field is wrong, or the update is not ``s·B·A`` of that base.
    """
    if isinstance(kind := content.get("peft_type"), str) and kind != "LORA":
        raise AdapterError(
            f"{source}: a {kind!r:.40} adapter; it is not handled: merge it into the model and "
            "audit the merged checkpoint"
        )
    try:
        config = AdapterConfig.model_validate(content)
    except ValidationError as error:
        raise AdapterError(f"{source}: {problems(error)}; save it again with PEFT") from None
    init = str(config.init_lora_weights).lower()
    for begins, (how, remedy) in CHANGES_THE_BASE.items():
        if init.startswith(begins) and not (in_a_folder and config.initial):
            raise AdapterError(
                f"{source}: initialised by {init!r:.40}, which changes the base weights too"
                f"{'' if config.initial else f', {how}'}; {remedy}"
            )
    for field, variant in NOT_A_SUM.items():
        if content.get(field):
            raise AdapterError(
                f"{source}: {field} is set: {variant}; its update is not a matrix added to the base"
            )
    return config
