"""Names of tensors as people mean them: without wrappers, and chosen by globs.

One meaning, and one error, wherever globs are taken.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import SequenceMatcher
from fnmatch import fnmatchcase

from ._errors import RecipeError

MOST_COMPARED = 2000
"""How many names are compared with a glob that matches none; a message is not worth more."""
LONGEST_COMPARED = 200
"""How many letters of a name are compared."""

# what torch.compile, activation checkpointing, FSDP and Lightning put between a module and its
# parameters; a component of the name, at any place
WRAPPERS = frozenset(
    (
        "_orig_mod",
        "_checkpoint_wrapped_module",
        "_fsdp_wrapped_module",
        "_fpw_module",
        "_forward_module",
    )
)


def unwrapped(name: str) -> str:
    """A name without the wrappers of training libraries.

    Args:
        name: Such as ``layers.0._orig_mod.q_proj.weight``.

    Returns:
        ``layers.0.q_proj.weight``.
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def matches(names: Iterable[str], globs: Collection[str]) -> bool:
    """Whether one of the globs matches one of the names, or that of the module of a weight.

    Args:
        names: Names of tensors.
        globs: Patterns of ``*``, ``?`` and ``[…]``.

    Returns:
        Whether one does.

    Example:
        >>> matches(["pooler.dense.weight"], ["pooler.dense"])
        True
    """
    plain = {word for name in names for word in (name, unwrapped(name))}
    both = (word for name in plain for word in {name, name.removesuffix(".weight")})
    return any(fnmatchcase(word, glob) for word in both for glob in globs)


def as_globs(globs: str | Iterable[str]) -> list[str]:
    """One glob, or several, as a list; RecipeError for anything else."""
    found = [globs] if isinstance(globs, str) or not isinstance(globs, Iterable) else list(globs)
    if not all(isinstance(glob, str) for glob in found):
        raise RecipeError(f"expected a glob such as 'layers.*', or several, got {globs!r}")
    return found


def check_globs(
    globs: Iterable[str],
    names: Collection[str],
    what: str = "tensor of either side",
    remedy: str = "`bulkedge inspect BASE` and `bulkedge inspect TUNED` list the names",
) -> None:
    """Raise where a glob matches nothing: misspelt, it must not turn a gate green.

    Args:
        globs: The globs.
        names: What they may match.
        what: What has these names.
        remedy: Where to find them.

    Raises:
        RecipeError: If one matches none.
    """
    for glob in globs:
        if not matches(names, (glob,)):
            near = _nearest(glob, names)
            if matches(names, (inside := f"*.{glob}",)):
                near = f": a glob matches the whole name: try {inside!r}"
            raise RecipeError(f"{glob!r} matches no {what}{near}; {remedy}")


def _nearest(glob: str, names: Collection[str]) -> str:
    """The name that is most like a glob, for a message."""
    plain = sorted({unwrapped(name) for name in names})[:MOST_COMPARED]
    like = {name: _likeness(glob, name.removesuffix(".weight")) for name in plain}
    best = max(like, key=lambda name: like[name], default=None)
    return "" if best is None else f"; the nearest name is {best!r}"


def _likeness(glob: str, name: str) -> float:
    """From 0 to 1: how much of a glob's own letters a name has, in their order."""
    letters = "".join(sign for sign in glob if sign not in "*?[]")
    matcher = SequenceMatcher(None, letters[:LONGEST_COMPARED], name[:LONGEST_COMPARED], False)
    shared = sum(block.size for block in matcher.get_matching_blocks() if block.size > 1)
    return shared / (len(letters) + 0.01 * len(name) + 1)
