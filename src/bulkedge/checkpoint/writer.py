"""Which program wrote a checkpoint or an adapter, by settings, metadata and names.

It is for people to read, and nothing depends on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .header import parse_json

VERSION = re.compile(r"[\w.+-]{1,40}", re.ASCII)
NAME = re.compile(r"[\w. -]{1,40}", re.ASCII)
SPELLINGS = {
    "LyCORIS's": ("lycoris_",),
    "kohya's": ("lora_unet_", "lora_te", "lora_transformer_"),
    "PEFT's": ("base_model.model.",),
    "ComfyUI's": ("diffusion_model.", "model.diffusion_model."),
    "diffusers'": ("unet.", "transformer.", "text_encoder"),
}
"""Whose names of layers begin like this."""


def by(program: str, version: Any = None) -> str:
    """A program and its version, where it is one.

    Args:
        program: Its name.
        version: What stands where the version should be.

    Returns:
        The words.

    Example:
        >>> by("PEFT", "0.21.2"), by("PEFT", ["0.21.2"])
        ('by PEFT 0.21.2', 'by PEFT')
    """
    known = isinstance(version, str) and VERSION.fullmatch(version)
    return f"by {program} {version}" if known else f"by {program}"


def of_file(metadata: Mapping[str, str], names: Iterable[str]) -> str:
    """What a file of factors without a configuration says.

    Args:
        metadata: The strings of its header.
        names: Those of its tensors.

    Returns:
        The program that names itself, else whose names the layers have; empty if neither is known.

    Example:
        >>> of_file({"ss_network_module": "networks.lora"}, [])
        "by kohya's scripts"
        >>> of_file({}, ["diffusion_model.a.lora_A.weight"])
        "in ComfyUI's names"
    """
    if module := metadata.get("ss_network_module"):
        return by("LyCORIS" if "lycoris" in module else "kohya's scripts")
    try:
        software = parse_json(metadata.get("software", "{}").encode())  # as ai-toolkit writes it
    except ValueError:
        software = {}
    name = software.get("name") if isinstance(software, dict) else None
    if isinstance(name, str) and NAME.fullmatch(name):
        return by(name, software.get("version"))
    names = tuple(names)
    whose = (who for who, starts in SPELLINGS.items() if any(n.startswith(starts) for n in names))
    return f"in {found} names" if (found := next(whose, None)) else ""
