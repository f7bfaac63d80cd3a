"""A folder in which the commands of the pages lead somewhere: BASE, TUNED and what goes with them.

Everything is small, so that a command takes a second; the pages that name real models run on those.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from glob import glob
from pathlib import Path
from typing import Any

from helpers import save_adapter, weights

WIDTH, INNER, LAYERS = 24, 32, 2
WORDS = [f"w{i}" for i in range(20)]
LINES = [" ".join(WORDS[i : i + 6]) for i in range(14)]
EVALUATE = """
import json, pathlib, sys
config = json.loads((pathlib.Path(sys.argv[1]) / "adapter_config.json").read_text())
print(json.dumps({"task": config["lora_alpha"], "kept": 1 / (1 + config["lora_alpha"])}))
"""


def fill(folder: Path) -> Path:
    """Write a model with its tokenizer, adapters, texts and an evaluation.

    Args:
        folder: Where.

    Returns:
        The folder.
    """
    import tokenizers
    import transformers

    config = transformers.BertConfig(
        vocab_size=22, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder / "BASE")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")  # noqa: S106
    plain = tokenizers.Tokenizer(words)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(
        folder / "BASE"
    )
    for seed, name in enumerate(("TUNED", "run/checkpoint-1", "run/checkpoint-2")):
        save_adapter(folder / name, _factors(seed))
    for name in ("keep", "task", "texts"):
        (folder / f"{name}.txt").write_text("\n".join(LINES))
    (folder / "task.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in LINES))
    for name in ("evaluate", "my_eval"):
        (folder / f"{name}.py").write_text(EVALUATE)
    return folder


def _factors(seed: int) -> dict[str, Any]:
    """The tensors of an adapter on some layers of each kind."""
    shapes = {"pooler.dense": (WIDTH, WIDTH)}
    for i in range(LAYERS):
        shapes[f"encoder.layer.{i}.attention.self.query"] = (WIDTH, WIDTH)
        shapes[f"encoder.layer.{i}.intermediate.dense"] = (INNER, WIDTH)
    return {
        f"base_model.model.{name}.lora_{x}.weight": weights(*shape, seed=seed + 10 * i)
        for i, (name, (m, n)) in enumerate(shapes.items())
        for x, shape in {"A": (2, n), "B": (m, 2)}.items()
    }


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a block, without comments.

    Args:
        code: Lines for a shell.

    Yields:
        The words of each.
    """
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def run_all(
    code: str,
    run: Callable[..., Any],
    skip: Callable[[list[str]], bool],
    script: Callable[[str], Any] | None = None,
) -> int:
    """Run the commands of a block one after the other; patterns stand for files, as in a shell.

    Args:
        code: Lines for a shell.
        run: ``run`` of :mod:`commands`.
        skip: Whether a command is not to be run.
        script: Runs a script of the repository that a page runs by the Python of its environment.

    Returns:
        How many were run.
    """
    done = 0
    for words in commands(code):
        if skip(words):
            continue
        program, *arguments = words
        done += 1
        if program == ".venv/bin/python" and script is not None:
            script(*arguments)
            continue
        assert program == "bulkedge", f"{words}: only the command itself is run here"
        found = [name for word in arguments for name in (sorted(glob(word)) or [word])]
        ended = run(*found)
        assert ended.returncode in (0, 1), (words, ended.stderr)
    return done
