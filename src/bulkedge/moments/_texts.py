"""Moments of a transformers model on texts from a file."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bulkedge._errors import InputError, MissingExtraError

Progress = Callable[[int, int], None]
"""Called as ``progress(texts so far, texts in all)``."""

LONGEST = 512
"""Largest number of tokens of a text that are read, unless the model says less."""
BATCH = 4096
"""Number of tokens of a batch, padding included."""


def read_texts(path: Path, column: str = "text") -> list[str]:
    """The texts of a file.

    Args:
        path: ``.jsonl`` (one object a line), ``.parquet``, or any other name: one text a line.
        column: The field of the objects, or the column.

    Returns:
        The texts that are not empty.

    Raises:
        InputError: If the file cannot be read, has no such column, or no text in it.
        MissingExtraError: If Parquet is to be read without pyarrow.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "texts.jsonl"
        >>> _ = file.write_text('{"text": "to be"}')
        >>> read_texts(file)
        ['to be']
    """
    try:
        found = _column(path, column) if path.suffix == ".parquet" else list(_lines(path, column))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give a file of texts"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: expected text in UTF-8; convert it first") from None
    kept = [text for text in found if text is not None]
    for text in kept:
        if not isinstance(text, str):
            raise InputError(f"{path}: expected text in {column!r}, got {text!r:.40}")
    texts = [text.strip() for text in kept if text.strip()]
    if not texts:
        raise InputError(f"{path}: no text in it; give one text a line, or name the --column")
    return texts


def _lines(path: Path, column: str) -> Iterator[Any]:
    """One text a line, or one of the fields of an object a line."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if path.suffix not in (".jsonl", ".ndjson"):
                yield line
                continue
            if not line.strip():
                continue
            try:
                yield json.loads(line)[column]
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{path}: line {number}: expected an object with a field {column!r}; name "
                    "another with --column"
                ) from None


def _column(path: Path, column: str) -> list[Any]:
    """A column of a Parquet file."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise MissingExtraError(
            "expected pyarrow for Parquet, found none; pip install 'bulkedge[parquet]'"
        ) from None
    try:
        return parquet.read_table(path, columns=[column])[column].to_pylist()
    except (KeyError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        why = str(error).splitlines()[0]
        raise InputError(f"{path}: column {column!r} cannot be read ({why:.100})") from None


def batches(lengths: Sequence[int], tokens: int = BATCH) -> list[list[int]]:
    """Texts of like length together, so that little is padding.

    Args:
        lengths: Number of tokens of each text.
        tokens: Of a batch, padding included; a longer text is a batch of its own.

    Returns:
        Positions of the texts.

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
    return found


def run_texts(
    network: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Run a transformers model on texts, for its hooks alone.

    Args:
        network: The model, on its device.
        tokenizer: Its tokenizer.
        texts: What to run it on.
        max_tokens: Where to stop; texts are taken in their order.
        progress: Called after each batch.
    """
    positions = getattr(network.config, "max_position_embeddings", None)
    limit = min(LONGEST, getattr(tokenizer, "model_max_length", LONGEST), positions or LONGEST)
    tokens = [tokenizer(text, truncation=True, max_length=limit)["input_ids"] for text in texts]
    tokens = _first_tokens(tokens, max_tokens)
    done = 0
    with torch.no_grad():
        for batch in batches([len(ids) for ids in tokens]):
            network(**_padded([tokens[i] for i in batch], tokenizer, network.device))
            done += len(batch)
            if progress is not None:
                progress(done, len(tokens))


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
    batch: list[list[int]], tokenizer: Any, device: torch.device
) -> dict[str, torch.Tensor]:
    """Token ids of one length, and the mask of what is text."""
    longest, pad = max(map(len, batch)), tokenizer.pad_token_id or 0
    ids = [row + [pad] * (longest - len(row)) for row in batch]
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
        The model, with its output layer where it is a causal one, and the tokenizer.

    Raises:
        MissingExtraError: Without transformers.
        InputError: If they cannot be loaded.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise MissingExtraError(
            "expected transformers to run a model, found none; pip install 'bulkedge[hf]'"
        ) from None
    if not model.is_dir():
        raise InputError(f"{model}: expected the folder of a model and its tokenizer")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model, local_files_only=True, trust_remote_code=False
        )
        config = transformers.AutoConfig.from_pretrained(
            model, local_files_only=True, trust_remote_code=False
        )
        named = (getattr(config, "architectures", None) or [""])[0]
        causal = named.endswith("ForCausalLM")
        kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        network = kind.from_pretrained(
            model,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
        )
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"{model}: cannot be loaded by transformers ({why:.200})") from None
    return network.eval(), tokenizer
