"""Which model a folder holds, as far as names say: by the hub's cache, its card, its configuration.

A name is a hint, never a proof: the same model lies in folders of any name.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from bulkedge._errors import CheckpointError

from .header import open_regular
from .read import Checkpoint, confined

CARD, CARD_BYTES = "README.md", 2**14
"""The card of a model, and how much of it is read for its title."""
IN_CACHE = re.compile(r"(?:^|[\\/])models--(?P<id>[^\\/]+)")
"""The folder of a model in the hub's cache."""
TITLE = re.compile(r"^# +(.+)$", re.MULTILINE)
FRONT_MATTER = re.compile(r"\A---\n.*?^---$", re.MULTILINE | re.DOTALL)
GENERIC = re.compile(
    r"(\.*|[0-9a-f]{7,64}|(my|the|pretrained|base|source|original|initial|foundation|backbone|hf|"
    r"local|final|best|last|latest|main|merged|llm|net|lm|full|model|models|checkpoint|ckpt|"
    r"weights|snapshot|download|downloads|downloaded|output|outputs|out|export|tmp|folder|dir|"
    r"path|files?|[-_ ]|\d)*)",
    re.IGNORECASE,
)
"""Names that say nothing: ``base``, ``model``, ``checkpoint-500``, a commit."""
WEIGHTS = re.compile(
    r"((pytorch_|diffusion_pytorch_|adapter_)?model|consolidated)([-.]\d.*)?", re.IGNORECASE
)
"""Names of files of weights, which leave it to the folder to name the model."""
ENDINGS = re.compile(r"(\.index\.json|\.safetensors|\.gguf)+$")


def known_names(checkpoint: Checkpoint) -> list[str]:
    """What a model is called besides its path.

    Args:
        checkpoint: The model.

    Returns:
        Its id where it lies in the hub's cache behind a link, what its configuration calls
        ``_name_or_path``, and the title of its card.  The second may be of the model that it was
        trained from.
    """
    path = checkpoint.path
    folder = path if path.is_dir() else path.parent
    found = [hub_name(str(folder.resolve())), checkpoint.config.get("_name_or_path")]
    if checkpoint.kind != "file":
        found.append(_title(folder))
    names = (name.strip() for name in found if isinstance(name, str))
    return [name for name in dict.fromkeys(names) if name]


def hub_name(path: str) -> str | None:
    """The id of the model whose folder in the hub's cache a path leads into; None of another.

    Args:
        path: Of a file or a folder.

    Returns:
        Such as ``org/name``.

    Example:
        >>> hub_name("~/.cache/huggingface/hub/models--org--name/snapshots/0123456789ab")
        'org/name'
    """
    found = IN_CACHE.search(path)
    return found["id"].replace("--", "/", 1) if found else None


def own_name(path: str) -> str | None:
    """What a path calls the model in it; None where it is a name that says nothing.

    Args:
        path: Of a file or a folder, or an id of the hub.

    Returns:
        The last part of the name.

    Example:
        >>> own_name("models/bert-base-uncased/model.safetensors"), own_name("release/base")
        ('bert-base-uncased', None)
    """
    if (cached := hub_name(path)) is not None:
        return cached.rpartition("/")[2]
    *above, last = re.split(r"[\\/]", path.rstrip("\\/"))
    name = ENDINGS.sub("", last)
    if name != last and WEIGHTS.fullmatch(name) and above:
        name = above[-1]
    return None if GENERIC.fullmatch(name) else name


def _title(folder: Path) -> str | None:
    """The title of a model's card; None without one."""
    with suppress(OSError, CheckpointError):
        with open_regular(confined(folder / CARD, folder))[0] as file:
            text = file.read(CARD_BYTES).decode(errors="replace")
        found = TITLE.search(FRONT_MATTER.sub("", text))
        return found[1] if found else None
    return None
