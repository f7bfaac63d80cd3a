"""What a model's configuration says of layers that its checkpoint does not store.

An output layer that shares the input embedding is stored once, under either name; a classifier has
no output layer over the vocabulary at all.  Both are facts of the configuration, ``config.json``,
and of the class that it names: the program that loads the checkpoint goes by them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

Config = Mapping[str, Any]

OUTPUTS = (
    "lm_head.weight",
    "embed_out.weight",
    "proj_out.weight",
    "predictions.decoder.weight",
    "lm_head.decoder.weight",
    "vocab_projector.weight",
)
SHARED = "shared.weight"
INPUTS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    SHARED,
)
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "decoder")
"""Keys under which a configuration holds that of its text model."""

WITH_OUTPUT = (
    "CausalLM",
    "LMHead",
    "ConditionalGeneration",
    "MaskedLM",
    "Seq2SeqLM",
    "PreTraining",
)
"""Parts of the names of classes that have an output layer over the vocabulary."""

WITHOUT_OUTPUT = re.compile(
    r"For(Sequence|Token)Classification$|ForQuestionAnswering$|ForMultipleChoice$|Model$"
)
"""The names of classes that have no such layer."""

OUTPUT_MODULES = ("lm_head", "cls", "embed_out", "vocab_transform", "vocab_projector")
WITHOUT_POOLER = re.compile(r"For(TokenClassification|QuestionAnswering|MaskedLM)$")
"""The names of classes whose heads read the hidden states: they have no pooler."""

WITHOUT_POOLER_AS_CLASSIFIER = ("roberta", "xlm-roberta", "camembert")


def ties(config: Config) -> bool | None:
    """Whether the output layer is the input embedding.

    Args:
        config: The content of ``config.json``.

    Returns:
        What it says, that of the text model where the whole says nothing; None for neither.
    """
    for part in (config, *(config.get(name) for name in TEXT_CONFIGS)):
        if isinstance(part, Mapping) and isinstance(tied := part.get("tie_word_embeddings"), bool):
            return tied
    return None


def has_output(config: Config) -> bool | None:
    """Whether a model has an output layer over its vocabulary.

    Args:
        config: The content of ``config.json``.

    Returns:
        What follows from its class; None of a class that is not known.
    """
    classes = _classes(config)
    if any(part in name for name in classes for part in WITH_OUTPUT):
        return True
    return False if classes and all(map(WITHOUT_OUTPUT.search, classes)) else None


def shares(config: Config) -> bool:
    """Whether an output layer that is not stored is the input embedding."""
    tied = ties(config)
    return has_output(config) is True if tied is None else tied


def lacks(config: Config, name: str) -> bool:
    """Whether a model certainly has no layer of this name: an output layer, or a pooler.

    Args:
        config: The content of its ``config.json``.
        name: Of a tensor.

    Returns:
        Whether its class is known to have none.
    """
    parts = name.split(".")
    if parts[0] in OUTPUT_MODULES:
        return has_output(config) is False
    classes = _classes(config)
    if "pooler" not in parts[:2] or not classes:
        return False
    of_kind = config.get("model_type") in WITHOUT_POOLER_AS_CLASSIFIER
    return all(
        WITHOUT_POOLER.search(name) or (of_kind and name.endswith("ForSequenceClassification"))
        for name in classes
    )


def is_output(name: str) -> bool:
    """Whether a tensor is the output layer over the vocabulary, by its name."""
    return _ends(name, OUTPUTS)


def is_input(name: str) -> bool:
    """Whether a tensor is the input embedding, by its name."""
    return _ends(name, INPUTS)


def sharing(name: str, stored: Iterable[str], config: Config) -> list[str]:
    """The stored tensors that may stand for an embedding or output layer that is not stored.

    Args:
        name: The layer's weight.
        stored: The names of the checkpoint.
        config: Its configuration.

    Returns:
        The embeddings for an output layer, or for one of several embeddings; the output layer for
        an embedding, where it is what is stored of the two.  Empty where nothing is shared.
    """
    if not (is_input(name) or is_output(name)):
        return []
    stored = list(stored)
    inputs = [other for other in stored if is_input(other)]
    shared = [other for other in inputs if _ends(other, (SHARED,))]
    if not is_output(name) and inputs:
        return shared  # encoder and decoder share it, whatever holds for the output layer
    if not shares(config):
        return []
    return shared or inputs or [other for other in stored if is_output(other)]


def _classes(config: Config) -> list[str]:
    found = config.get("architectures")
    return [str(name) for name in found] if isinstance(found, list) else []


def _ends(name: str, ends: tuple[str, ...]) -> bool:
    return f".{name}".endswith(tuple(f".{end}" for end in ends))
