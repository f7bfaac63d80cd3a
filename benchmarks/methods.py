"""The kinds of LoRA that benchmarks and the study of forgetting train."""

from __future__ import annotations

from typing import Any


def lora_options(kind: str, rank: int) -> dict[str, Any]:
    """What a kind sets besides its rank: lora, orthonormal, rslora, pissa."""
    if kind == "orthonormal":
        return {"lora_alpha": 0.5 * rank}  # every spike has strength 0.5
    if kind == "pissa":
        return {"lora_alpha": rank, "init_lora_weights": "pissa"}
    return {"lora_alpha": 2.0 * rank} | ({"use_rslora": True} if kind == "rslora" else {})
