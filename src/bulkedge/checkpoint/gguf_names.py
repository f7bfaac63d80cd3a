"""What the tensors of a GGUF file are called in the model that it was converted from.

The table is that of the library ``gguf``, which lists for each of its names those of many models;
which of them is meant follows from the architecture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

BLOCKS = {
    "bert": "encoder.layer.",
    "nomic-bert": "encoder.layer.",
    "jina-bert-v2": "encoder.layer.",
    "gpt2": "transformer.h.",
    "gptj": "transformer.h.",
    "falcon": "transformer.h.",
    "bloom": "transformer.h.",
    "starcoder": "transformer.h.",
    "gptneox": "gpt_neox.layers.",
}
"""What stands before the number of a block, by architecture."""

USUAL = "model.layers."
"""The same for all other architectures."""

ENDS = {
    "model.layers.": {
        "token_embd": "model.embed_tokens",
        "output": "lm_head",
        "output_norm": "model.norm",
    },
    "encoder.layer.": {
        "token_embd": "embeddings.word_embeddings",
        "token_types": "embeddings.token_type_embeddings",
        "position_embd": "embeddings.position_embeddings",
    },
    "transformer.h.": {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output": "lm_head",
    },
    "gpt_neox.layers.": {"token_embd": "gpt_neox.embed_in", "output": "embed_out"},
}
"""Names outside the blocks, by what stands before the number of one."""

WORD_EMBEDDINGS = ("falcon", "bloom")
"""Architectures that call their embedding so."""

USUAL_PARTS = (".self_attn.", ".mlp.")
"""Parts of the names of layers in most decoders, where the table has several."""

PERMUTED = (
    "llama", "granite", "granitemoe", "deci", "arcee", "smollm3", "mistral3", "nanbeige", "minicpm",
    "baichuan", "xverse", "internlm2",
)  # fmt: skip
"""Architectures whose q and k the converter writes in another order of rows."""

BLOCK = re.compile(r"blk\.(?P<number>\d{1,6})\.(?P<part>[\w.]+)")


def model_names(architecture: str, names: list[str]) -> dict[str, str]:
    """The names that tensors have in the model.

    Args:
        architecture: As the file says it.
        names: The tensors' names in the file, such as ``blk.0.attn_q.weight``.

    Returns:
        The model's names by the file's; those that the table lacks stay as they are.

    Raises:
        ImportError: Without the library.
    """
    table, root = _table(architecture), BLOCKS.get(architecture, USUAL)
    return {name: _one(name, table, root, architecture) for name in names}


def _one(name: str, table: Mapping[str, list[str]], root: str, architecture: str) -> str:
    """The model's name of one tensor."""
    stem, dot, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return name
    block = BLOCK.fullmatch(stem)
    if block is None:
        if stem == "token_embd" and architecture in WORD_EMBEDDINGS:
            return f"transformer.word_embeddings{dot}{leaf}"
        return f"{ENDS[root].get(stem, stem)}{dot}{leaf}"
    wanted = table.get(f"blk.0.{block['part']}", [])
    inside = [n.removeprefix(f"{root}0.") for n in wanted if n.startswith(f"{root}0.")]
    usual = [n for n in inside if root == USUAL and f".{n}".startswith(USUAL_PARTS)]
    found = next(iter(usual or inside), None)
    return name if found is None else f"{root}{block['number']}.{found}{dot}{leaf}"


def _table(architecture: str) -> Mapping[str, list[str]]:
    """All names of the first block that models have, by the file's."""
    from gguf import MODEL_ARCH_NAMES  # pyright: ignore[reportMissingImports]
    from gguf.tensor_mapping import (  # pyright: ignore[reportMissingImports]
        get_tensor_name_map,
    )

    known = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        return {}
    found: dict[str, list[str]] = {}
    for theirs, (_, ours) in get_tensor_name_map(known[architecture], 1).mapping.items():
        found.setdefault(ours, []).append(theirs)
    return found


def heads_of(name: str, settings: Mapping[str, Any]) -> int:
    """How many heads' rows of a tensor are in llama.cpp's order.

    Args:
        name: The tensor's name in the file.
        settings: Of the file.

    Returns:
        The number; 0 of a tensor whose rows are in the model's order, −1 where the file does not
        say how many.
    """
    architecture = settings.get("general.architecture")
    block = BLOCK.fullmatch(name)
    if architecture not in PERMUTED or block is None:
        return 0
    part = block["part"].partition(".")[0]
    if part not in ("attn_q", "attn_k"):
        return 0
    heads = settings.get(f"{architecture}.attention.head_count")
    if part == "attn_k":
        heads = settings.get(f"{architecture}.attention.head_count_kv", heads)
    if isinstance(heads, list):
        heads = heads[int(block["number"])] if int(block["number"]) < len(heads) else None
    return heads if type(heads) is int and 0 < heads < 2**16 else -1


def gguf_config(settings: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What a ``config.json`` would say of layers that are not stored, and of the model's width.

    Args:
        settings: Of the file.
        tensors: Its tensors, by their names in the model.

    Returns:
        A configuration: an output layer that a decoder does not store is its embedding.
    """
    architecture = settings.get("general.architecture")
    config: dict[str, Any] = {"model_type": str(architecture)}
    if type(width := settings.get(f"{architecture}.embedding_length")) is int:
        config["hidden_size"] = width
    if BLOCKS.get(str(architecture)) == "encoder.layer.":
        return config | {"architectures": ["Model"]}
    outputs = {f"{names.get('output')}.weight" for names in ENDS.values()}
    return config | {"tie_word_embeddings": outputs.isdisjoint(tensors)}
