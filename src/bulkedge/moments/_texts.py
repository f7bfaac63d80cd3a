"""A transformers model on texts."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bulkedge._errors import BulkedgeError, InputError, MissingExtraError, count, install

from ._losses import Loss

Progress = Callable[[int, int], None]
"""Called as ``progress(texts so far, texts in all)``."""

LONGEST = 512
"""Largest number of tokens of a text that are read, unless the model says less."""
BATCH = 4096
"""Number of tokens of a batch, padding included."""
HEADS = (
    ("ForCausalLM", "AutoModelForCausalLM"),
    ("LMHeadModel", "AutoModelForCausalLM"),  # GPT-2
    ("ForMaskedLM", "AutoModelForMaskedLM"),
)
"""Models that are loaded with their output layer, by how the name of their class ends."""
ADAPTER = "adapter_config.json"
POOLER = "pooler"
"""A layer on top of encoders whose output no other layer reads; often not stored."""
NAMED = 3  # so many missing tensors are named


def batches(lengths: Sequence[int], tokens: int = BATCH) -> list[list[int]]:
    """Texts of like length together, so that little is padding.

    Args:
        lengths: Number of tokens of each text.
        tokens: Of a batch, padding included; a longer text is a batch of its own.

    Returns:
        Positions of the texts; never as many as the longest has tokens, so that the shape of an
        input shows which of its dimensions is the batch.

    Example:
        >>> batches([5, 1, 4, 1], tokens=8)
        [[1, 3], [2], [0]]
    """
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if found and (len(found[-1]) + 1) * lengths[i] <= tokens:
            found[-1].append(i)
        else:
            found.append([i])
    squares = (len(batch) > 1 and len(batch) == lengths[batch[-1]] for batch in found)
    return [
        part
        for batch, square in zip(found, squares, strict=True)
        for part in ((batch[:1], batch[1:]) if square else (batch,))
    ]


def tokens_of(
    network: Any, tokenizer: Any, texts: Sequence[str], max_tokens: int | None
) -> list[list[int]]:
    """The token ids of texts, each cut at the length that a model takes.

    Args:
        network: The model.
        tokenizer: Its tokenizer.
        texts: The texts.
        max_tokens: Where to stop; texts are taken in their order.

    Returns:
        The ids of each text that has any.

    Raises:
        InputError: If the tokenizer fails, or is not that of the model.
    """
    positions = getattr(network.config, "max_position_embeddings", None)
    limit = min(LONGEST, getattr(tokenizer, "model_max_length", LONGEST), positions or LONGEST)
    found: list[list[int]] = []
    for text in texts:
        try:
            found.append(list(tokenizer(text, truncation=True, max_length=limit)["input_ids"]))
        except Exception as error:  # a tokenizer is anyone's code and files
            raise InputError(
                f"the tokenizer fails at {text!r:.40} ({type(error).__name__}: {error}); give the "
                "folder one that fits the model"
            ) from None
    found = _first_tokens([ids for ids in found if ids], max_tokens)
    if not found:
        raise InputError("the tokenizer gives no tokens for any of the texts; correct its files")
    largest, known = max(map(max, found)), network.get_input_embeddings().num_embeddings
    if largest >= known:
        raise InputError(
            f"the tokenizer gives token {largest}, the model has {known}: it fits another model"
        )
    return found


def run_tokens(
    network: Any,
    tokenizer: Any,
    tokens: Sequence[Sequence[int]],
    first: int = 0,
    loss: Loss | None = None,
) -> Iterator[int]:
    """Run a transformers model on texts, for its hooks alone.

    Args:
        network: The model, on its device.
        tokenizer: Its tokenizer, which knows the token of padding.
        tokens: The ids of each text.
        first: Number of batches that were run before.
        loss: What to take gradients of, in one backward pass for each batch; None for none.

    Yields:
        The number of texts so far, after each batch.
    """
    order = batches([len(ids) for ids in tokens], BATCH)
    done = sum(map(len, order[:first]))
    for number, batch in enumerate(order[first:], start=first):
        inputs = _padded([tokens[i] for i in batch], tokenizer, network.device)
        with torch.set_grad_enabled(loss is not None), _errors_explained():
            if loss is None:
                network(**inputs)
            else:  # each batch draws the same, whether or not the run was stopped before it
                generator = torch.Generator(network.device).manual_seed(number)
                loss(network, inputs, generator).backward()
        done += len(batch)
        yield done


@contextmanager
def _errors_explained() -> Iterator[None]:
    """Whatever a model's own code raises, with what to do."""
    try:
        yield
    except BulkedgeError:
        raise
    except Exception as error:
        why = str(error).splitlines()[0] if str(error) else ""
        raise InputError(
            f"the model cannot be run on texts ({type(error).__name__}: {why:.200}); measure it in "
            "your own loop, with Moments(model)"
        ) from error


def _first_tokens(tokens: list[list[int]], limit: int | None) -> list[list[int]]:
    """The texts up to a number of tokens, the last one cut."""
    if limit is None:
        return tokens
    kept, left = [], limit
    for ids in tokens:
        if left <= 0:
            break
        kept.append(ids[:left])
        left -= len(kept[-1])
    return kept


def _padded(
    batch: Sequence[Sequence[int]], tokenizer: Any, device: torch.device
) -> dict[str, torch.Tensor]:
    """Token ids of one length, and the mask of what is text."""
    longest, pad = max(map(len, batch)), tokenizer.pad_token_id or 0
    ids = [[*row, *[pad] * (longest - len(row))] for row in batch]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in batch]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def load_network(model: Path) -> tuple[Any, Any]:
    """A transformers model and its tokenizer, from this disk alone, in float32.

    Args:
        model: Their folder.

    Returns:
        The model, with its output layer where it is a causal or masked one, and the tokenizer.

    Raises:
        MissingExtraError: Without transformers.
        InputError: If they cannot be loaded, or weights of the model are not stored.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise MissingExtraError(
            f"expected transformers to run a model, found none; {install('hf')}"
        ) from None
    if not model.is_dir():
        raise InputError(f"{model}: expected the folder of a model and its tokenizer")
    if (model / ADAPTER).is_file():  # transformers may find its base, and run both
        raise InputError(f"{model}: is an adapter; give the base as MODEL and this as --tuned")
    try:
        with _quiet(transformers.utils.logging):
            network, tokenizer, info = _loaded(transformers, model)
    except Exception as error:  # damaged files make it raise nearly anything
        why = str(error).splitlines()[0] if str(error) else ""
        raise InputError(
            f"{model}: cannot be loaded by transformers ({type(error).__name__}: {why:.200})"
        ) from None
    missing = sorted(info["missing_keys"])
    if missing and all(name.partition(".")[0] == POOLER for name in missing):
        network.pooler, missing = None, []
    if missing:
        are = "is" if len(missing) == 1 else "are"
        named = ", ".join(map(repr, missing[:NAMED])) + ("" if len(missing) <= NAMED else ", …")
        raise InputError(
            f"{model}: {count(len(missing), 'tensor')} of {type(network).__name__} {are} not "
            f"stored and would be random: {named}; save the whole model"
        )
    return network.eval(), tokenizer


def settings_of(network: Any) -> dict[str, Any]:
    """What a model computes with besides its weights, as JSON would have it.

    Args:
        network: A model of transformers.

    Returns:
        Its class and its configuration, but for where it lies.
    """
    config = json.loads(json.dumps(network.config.to_dict(), default=str))
    config.pop("_name_or_path", None)
    return {"class": type(network).__name__, "config": config}


def _loaded(transformers: Any, model: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The model, its tokenizer, and what was not found in its files."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        model, local_files_only=True, trust_remote_code=False
    )
    config = transformers.AutoConfig.from_pretrained(
        model, local_files_only=True, trust_remote_code=False
    )
    named = (getattr(config, "architectures", None) or [""])[0]
    kinds = [kind for end, kind in HEADS if named.endswith(end)]
    network, info = getattr(transformers, (*kinds, "AutoModel")[0]).from_pretrained(
        model,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    return network, tokenizer, info


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without the bars and reports of transformers: what matters in them is an error here."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
