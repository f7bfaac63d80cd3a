"""Whether the configuration of a full fine-tune builds the model that its tensors belong to.

A program builds a model by ``config.json`` and then looks for its tensors.  With another number of
layers it leaves some out, and with other heads or another activation it computes something else.
Only fields that both configurations have are compared: a default is often left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bulkedge.checkpoint import Checkpoint
from bulkedge.checkpoint.model import TEXT_CONFIGS

STRUCTURE = (
    ("model_type",),
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    ("encoder_layers", "num_encoder_layers"),
    ("decoder_layers", "num_decoder_layers"),
    ("hidden_size", "n_embd", "n_embed", "d_model", "dim"),
    ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    ("encoder_attention_heads",),
    ("decoder_attention_heads",),
    ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    ("multi_query",),
    ("head_dim", "d_kv", "kv_channels"),
    ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "ffn_hidden_size", "hidden_dim"),
    ("encoder_ffn_dim",),
    ("decoder_ffn_dim",),
    ("hidden_act", "activation_function", "hidden_activation", "activation", "feed_forward_proj"),
    ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon",
     "norm_eps"),
    ("num_local_experts", "num_experts", "n_routed_experts"),
    ("num_experts_per_tok",),
)  # fmt: skip
"""Fields that decide what a model computes with its tensors, by all their names."""

SECTION, PARTS = "_config", (*TEXT_CONFIGS, "encoder")
"""The end of a field that holds the configuration of a part of a model; names without that end."""
NO_PARTS = ("quantization_config", "compression_config", "generation_config")
"""Fields of such a name that hold something else."""
ALIKE = {"swish": "silu"}
"""Two names of one activation."""
MAX_TEXT = 60
"""So many letters of a value a sentence has."""


def differing_configs(base: Checkpoint, tuned: Checkpoint) -> list[str]:
    """What to say where the configurations of a base and of its fine-tune contradict each other.

    The output layer that ``tie_word_embeddings`` decides about is compared itself, in the pairing.

    Args:
        base: The base.
        tuned: The fine-tune.

    Returns:
        A sentence, or none.
    """
    if "gguf" in (base.kind, tuned.kind) or not base.config:
        return []
    if not tuned.config:
        if tuned.kind == "file":
            return []
        return [
            f"{tuned.path} has no config.json, the base has one: a program cannot load the "
            "fine-tune, or builds another model for it. Save the model again, with its config."
        ]
    found = [f"{name} {_told(theirs)} ({_told(ours)} in that of the base)"
             for name, ours, theirs in _differences(base.config, tuned.config)]  # fmt: skip
    if not found:
        return []
    return [
        f"config.json of the fine-tune says {', '.join(found)}: a program builds another model for "
        "the tensors than the one that they are judged as. Save the model again, or correct the "
        "file."
    ]


Difference = tuple[str, Any, Any]


def _differences(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> Iterator[Difference]:
    """The fields that differ, with both values; of parts with the part before the name."""
    ours, theirs = _text_of(base), _text_of(tuned)
    if (ours is None) != (theirs is None):  # the text model of a larger one, on its own
        base, tuned = ours or base, theirs or tuned
    yield from _fields(base, tuned, "")
    for name in base.keys() & tuned.keys():
        if not (name.endswith(SECTION) or name in PARTS) or name in NO_PARTS:
            continue
        before, after = base[name], tuned[name]
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _fields(before, after, f"{name}.")


def _text_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The configuration of the text model in a larger one; None where there is none."""
    found = (config.get(name) for name in TEXT_CONFIGS)
    return next((part for part in found if isinstance(part, Mapping) and part), None)


def _fields(base: Mapping[str, Any], tuned: Mapping[str, Any], part: str) -> Iterator[Difference]:
    """The fields of one part that differ."""
    for names in STRUCTURE:
        ours = [(name, base[name]) for name in names if _is_value(base.get(name))]
        theirs = [(name, tuned[name]) for name in names if _is_value(tuned.get(name))]
        if ours and theirs and _plain(ours[0][1]) != _plain(theirs[0][1]):
            yield part + theirs[0][0], ours[0][1], theirs[0][1]


def _is_value(value: object) -> bool:
    """Whether a field says something: a number, a word, true or false."""
    return isinstance(value, (bool, int, float, str))


def _plain(value: Any) -> Any:
    """A value by which two spellings of it are equal."""
    return ALIKE.get(value.lower(), value.lower()) if isinstance(value, str) else value


def _told(value: Any) -> str:
    return f"{value!s:.{MAX_TEXT}}"
