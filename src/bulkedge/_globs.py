"""Names of tensors as people mean them: without wrappers, and chosen by globs.

One meaning, and one error, wherever globs are taken.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from ._errors import RecipeError

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
    remedy: str = "see `bulkedge inspect`",
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
            example = max(names, key=len, default="")
            raise RecipeError(
                f"{glob!r} matches no {what}, whose names look like {example!r}; {remedy}"
            )
