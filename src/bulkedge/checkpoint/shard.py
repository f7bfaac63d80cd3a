"""Which part of a model a file is, by its name."""

from __future__ import annotations

import re

PART = re.compile(r"-(\d{4,9})-of-(\d{4,9})\.safetensors\Z")


def shard_of(name: str) -> tuple[int, int] | None:
    """Which of how many shards a file is.

    Args:
        name: Its name.

    Returns:
        Its number, from 1, and how many there are; None of a file that is a whole model.

    Example:
        >>> shard_of("model-00002-of-00003.safetensors")
        (2, 3)
    """
    found = PART.search(name)
    if found is None:
        return None
    index, total = map(int, found.groups())
    return (index, total) if total > 1 else None
