"""Models of the Hugging Face hub that lie in its cache, by ``org/name`` or ``org/name@revision``.

Nothing is fetched here: ``bulkedge … --download`` does that, in ``cli/_hub.py``, and nothing else.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from bulkedge._errors import CheckpointError, install

HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[\w-][\w.-]{0,95}?)(@(?P<revision>[\w-][\w./-]{0,199}))?"
)
"""A repository's owner and name, and a branch, a tag or a commit; no path has an ``@`` there."""

WANTED = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")
"""The files of a repository that are read: never code, and nothing that would be unpickled."""


def hub_id(path: str | Path) -> tuple[str, str | None] | None:
    """The repository and the revision that a path names, if no file or folder does.

    Args:
        path: What the caller gave.

    Returns:
        ``(org/name, revision or None)``; None of a path that exists, or that cannot be an id.

    Example:
        >>> hub_id("org/name@v1.0"), hub_id("./model")
        (('org/name', 'v1.0'), None)
    """
    text = os.fspath(path)
    match = HUB_ID.fullmatch(text)
    if match is None or ".." in text or "--" in match["repo"] or os.path.lexists(text):
        return None
    if text.endswith((".safetensors", ".json", ".gguf")):
        return None
    return match["repo"], match["revision"]


def located(path: str | Path) -> str | Path:
    """A path as it is, or the folder of the hub's cache that an id stands for.

    Args:
        path: A file, a folder, or ``org/name[@revision]``.

    Returns:
        ``path`` unchanged where it exists or can be no id.

    Raises:
        CheckpointError: If it can only be an id, and its model is not in the cache, or not whole.
    """
    if (named := hub_id(path)) is None:
        return path
    if (folder := cached(*named)) is None:
        raise CheckpointError(
            f"{path}: no such file or folder, and no such model in the hub's cache; nothing is "
            "fetched: check the path, or add --download to fetch it from the hub"
        )
    return folder


def cached(repo: str, revision: str | None) -> Path | None:
    """The folder of a model in the hub's cache.

    Args:
        repo: ``org/name``.
        revision: A branch, a tag or a commit; None for ``main``.

    Returns:
        The folder; None if the model is not there.

    Raises:
        CheckpointError: If files are missing in it, or the hub's library is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        raise CheckpointError(
            f"{repo}: no such file or folder; nothing is fetched, check the path; to read models "
            f"of the hub by their id: {install('hub')}"
        ) from None
    try:
        found = Path(
            snapshot_download(
                repo, revision=revision, local_files_only=True, allow_patterns=list(WANTED)
            )
        )
    except ValueError:  # no name that the hub could have
        return None
    except LocalEntryNotFoundError as error:
        if (partial := getattr(error, "snapshot_path", None)) is None:
            return None
        raise CheckpointError(_incomplete(repo, partial)) from None
    if not any(found.rglob("*.safetensors")):  # a tokenizer alone, say
        raise CheckpointError(_incomplete(repo, found))
    return found


def _incomplete(repo: str, folder: str | Path) -> str:
    """The message for a model of which the cache lacks files."""
    return (
        f"{repo}: only a part of it is in the hub's cache ({folder}); add --download to fetch "
        "the rest"
    )
