r"""A budget as settings of PEFT's ``LoraConfig``.

PEFT looks a layer's α up by ``re.match(rf"(.*\.)?({key})$", path)``: a key is a regular expression
that ends the path, and the first key that does counts.  So the path of a layer is a key that the
same layer matches in a model that puts a prefix in front (``bert.encoder…``).  Where it also ends
the path of another layer, look-behinds leave that one out: the order of keys, which PEFT changes
when it saves, does not matter then.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from bulkedge._errors import InputError
from bulkedge.records.budget import Allowance, BudgetRecord, MatrixBudget

SIGNIFICANT = 6
"""Digits of an α: enough for any purpose, and legible."""


def lora_config(record: BudgetRecord) -> dict[str, Any]:
    """A budget as arguments of ``peft.LoraConfig``: ``LoraConfig(**lora_config(record))``.

    A layer whose base looks untrained, such as a pooler, is left out, unless all of them do, or the
    budget was made with ``target`` or ``like``.

    Args:
        record: A budget with rank and α, or of an adapter.

    Returns:
        ``r``, ``lora_alpha``, ``use_rslora``, ``target_modules``, ``rank_pattern`` and
        ``alpha_pattern``, plain values.

    Raises:
        InputError: If the record has neither rank and α nor an adapter, a level that changes no α,
            or no layer has a limit.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> from bulkedge import budget
        >>> file = Path(tempfile.mkdtemp()) / "base.safetensors"
        >>> draw = torch.Generator().manual_seed(0)
        >>> layers = {"up.weight": torch.randn(60, 40, generator=draw),
        ...           "down.weight": 3 * torch.randn(40, 60, generator=draw)}
        >>> save_file(layers, file)
        >>> settings = lora_config(budget(file, rank=4, alpha=8))
        >>> sorted(settings["target_modules"]), settings["alpha_pattern"]["down"] > 8
        (['down', 'up'], True)
    """
    rank, alpha = record.settings.rank, record.settings.alpha
    if rank is None or alpha is None:
        got = "neither" if record.like is None else "an adapter that names no positive α of its own"
        raise InputError(f"expected rank and alpha, or like=, for settings of PEFT; got {got}")
    if record.like is None and record.settings.level != 1:
        raise InputError(
            f"expected level 1 for settings of a planned rank and alpha, got "
            f"{record.settings.level:g}: their α are relative, and no level changes them; lower "
            "alpha, or scale the trained adapter with Rescale(level=…)"
        )
    aside = {row.name for row in record.untrained}
    layers = _layers(row for row in record.matrices if row.name not in aside)
    if not layers:
        raise InputError("expected layers with a limit for settings of PEFT, got none; see notes")
    known = [*layers, *_other_modules(record, layers)]
    keys = {module: exclusive(module, known) for module in layers}
    ranks = {keys[module]: found.rank for module, found in layers.items() if found.rank != rank}
    return {
        "r": rank,
        "lora_alpha": plain(alpha),
        "use_rslora": record.settings.rslora,
        "target_modules": targets_of(keys),
        "rank_pattern": ranks,
        "alpha_pattern": {keys[module]: plain(found.alpha) for module, found in layers.items()},
    }


def without_pattern(record: BudgetRecord) -> list[str]:
    """The matrices with a limit for which PEFT takes no α: bare parameters, such as experts.

    Args:
        record: The budget.

    Returns:
        Their names.
    """
    return [row.name for row in record.matrices if row.allowed and row.module is None]


def exclusive(module: str, known: Collection[str]) -> str:
    r"""The key that the path of one layer matches, with any prefix, and that of no other one.

    Args:
        module: The path.
        known: The paths of all layers.

    Returns:
        A regular expression; the path itself, escaped, where no other one ends with it.

    Example:
        >>> exclusive("fc", ["fc", "decoder.fc"])
        '(?<!^decoder\\.)(?<!\\.decoder\\.)fc'
    """
    longer = [other.removesuffix(module) for other in known if other.endswith(f".{module}")]
    behind = (f"(?<!{start}{re.escape(front)})" for front in longer for start in (r"^", r"\."))
    return "".join(behind) + re.escape(module)


def _layers(rows: Iterable[MatrixBudget]) -> dict[str, Allowance]:
    """What each layer is allowed: the least of its matrices, if it has several."""
    found: dict[str, Allowance] = {}
    for row in rows:
        if row.module is None or row.allowed is None:
            continue
        other = found.get(row.module)
        if other is None or row.allowed.alpha < other.alpha:
            found[row.module] = row.allowed
    return found


def _other_modules(record: BudgetRecord, layers: Mapping[str, Allowance]) -> list[str]:
    """The layers of the base that are not adapted, as far as they have weights."""
    names = [*(row.name for row in record.skipped), *(row.name for row in record.matrices)]
    modules = (name.partition("[")[0].removesuffix(".weight") for name in names)
    return [module for module in Counter(modules) if module not in layers]


def targets_of(keys: Mapping[str, str]) -> list[str] | str:
    """What ``target_modules`` is to be: the paths, or one expression where they say too much."""
    if all(key == re.escape(module) for module, key in keys.items()):
        return list(keys)
    return rf"(.*\.)?({'|'.join(keys.values())})"


def plain(value: float) -> float:
    """A number of six digits, rounded down; a whole one as an integer, as PEFT writes it."""
    if value == int(value):
        return int(value)
    step = 10.0 ** (int(f"{value:e}".partition("e")[2]) - SIGNIFICANT + 1)
    return float(f"{(value // step) * step:.{SIGNIFICANT}g}")
