"""The ranks that a trained adapter has used, as settings of PEFT's ``LoraConfig``."""

from __future__ import annotations

from collections import Counter
from typing import Any

from bulkedge._errors import InputError
from bulkedge.checkpoint.lora import alpha_of
from bulkedge.records import Matrix, Record

from .patterns import exclusive, plain, targets_of


def rank_config(record: Record) -> dict[str, Any]:
    """The rank in use of each layer as arguments of ``peft.LoraConfig``, to train it again with.

    That rank carries 99 % of the energy of the layer's trained update (``in_use`` of a record).
    Each α keeps the number in front of B·A as it was.  Whether the task needs the rest, or more
    than the adapter was given, only training shows: where all of the rank is in use, it may have
    been too small.

    Args:
        record: An audit of a LoRA.

    Returns:
        ``r``, ``lora_alpha``, ``use_rslora``, ``target_modules``, ``rank_pattern`` and
        ``alpha_pattern``, plain values.

    Raises:
        InputError: If no layer of the record has a low-rank update of a module.

    Example:
        >>> import tempfile, torch, bulkedge
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> base = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
        >>> B, A = torch.eye(40, 4), torch.eye(4, 60) * torch.tensor([[9.0], [8.0], [0.1], [0.1]])
        >>> save_file({"up.weight": base}, folder / "base.safetensors")
        >>> (folder / "lora").mkdir()
        >>> save_file({"base_model.model.up.lora_A.weight": A,
        ...            "base_model.model.up.lora_B.weight": B},
        ...           folder / "lora/adapter_model.safetensors")
        >>> settings = '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up"]}'
        >>> _ = (folder / "lora/adapter_config.json").write_text(settings)
        >>> found = rank_config(bulkedge.audit(folder / "base.safetensors", folder / "lora"))
        >>> found["r"], found["lora_alpha"], found["target_modules"]
        (2, 4, ['up'])
    """
    layers = _layers(record)
    if not layers:
        raise InputError(
            "expected layers with a low-rank update, whose rank in use is known, got none; audit a "
            "LoRA adapter"
        )
    names = (_module(name) for row in record.matrices for name in (row.name, row.tuned_name))
    known = {*layers, *filter(None, names)}
    keys = {module: exclusive(module, known) for module in layers}
    (rank, alpha), _ = Counter(layers.values()).most_common(1)[0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "target_modules": targets_of(keys),
        "rank_pattern": {keys[m]: own for m, (own, _) in layers.items() if own != rank},
        "alpha_pattern": {keys[m]: own for m, (_, own) in layers.items() if own != alpha},
    }


def without_rank(record: Record) -> list[str]:
    """The audited matrices that the settings say nothing of.

    Args:
        record: The audit.

    Returns:
        Their names: updates that are zero, or no plain product of factors, and bare parameters.
    """
    return [row.name for row in record.matrices if not row.in_use or _module_of(row) is None]


def _layers(record: Record) -> dict[str, tuple[int, float]]:
    """Rank in use and α of each layer; of several matrices the most."""
    found: dict[str, tuple[int, float]] = {}
    for row in record.matrices:
        module = _module_of(row)
        if not row.in_use or module is None or row.scale is None:
            continue
        rank = max(row.in_use, found.get(module, (0, 0.0))[0])
        found[module] = (rank, plain(alpha_of(row.scale, rank)))
    return found


def _module_of(row: Matrix) -> str | None:
    """The path of a layer: as the adapter has it, unless its names have lost their dots."""
    as_tuned = _module(row.tuned_name)
    return as_tuned if as_tuned is not None and "." in as_tuned else _module(row.name)


def _module(name: str) -> str | None:
    """The path of the layer that a weight, or a part of it, belongs to; None of a parameter."""
    whole = name.partition("[")[0]
    return whole.removesuffix(".weight") if whole.endswith(".weight") else None
