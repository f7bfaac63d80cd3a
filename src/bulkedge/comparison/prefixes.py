"""Whether the tensors of a full fine-tune have names that a program can load.

A fine-tune may have the prefix of another class than its base throughout.  If only some of its
tensors have it, or if training left a wrapper in the names, they still belong to those of the base.
But a program that loads the model goes by the exact name.  It leaves them out, with at most a
warning, and computes with something else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bulkedge._errors import count
from bulkedge._globs import WRAPPERS
from bulkedge.checkpoint.model import OUTPUT_MODULES
from bulkedge.checkpoint.names import WRAPPINGS

from .comparison import Comparison

NAMED, MAX_NAME = 3, 200
"""So many tensors a sentence names, and so much of each."""
HEADS = frozenset((*OUTPUT_MODULES, "classifier", "score", "qa_outputs", "proj_out", "v_head"))
"""Modules that stand beside a model and keep their names when it is wrapped in another."""

IN_TRAINING = frozenset((*WRAPPERS, "module", "base_model"))
"""What training leaves around a model, and no class of transformers has in its names."""

Parts = tuple[str, ...]
Rename = tuple[Parts, Parts]


@dataclass(frozen=True)
class _Layer:
    """A tensor in a list of layers.

    Attributes:
        name: The tuned tensor, as its file calls it.
        list: The base's name of the list, ``("model", "layers")``.
        renamed: The tuned name of the list, and wrappings inside the layer that the base lacks.
    """

    name: str
    list: Parts
    renamed: Rename


def odd_names(comparisons: Iterable[Comparison]) -> list[str]:
    """What to say of the names of a full fine-tune.

    Args:
        comparisons: Its pairs with the base, vectors included.

    Returns:
        A sentence, or none.
    """
    pairs = list(comparisons)
    return mixed_prefixes(pairs) or wrapped_names(pairs)


def wrapped_names(comparisons: Iterable[Comparison]) -> list[str]:
    """What to say where names have a wrapper of training that the base's have not.

    Args:
        comparisons: The pairs of a full fine-tune and its base.

    Returns:
        A sentence, or none.
    """
    pairs = {
        pair.tuned.info.name: pair.base.info.name
        for pair in comparisons
        if pair.tuned is not None and pair.base.alias is None
    }
    found = {
        name: more for name, base in pairs.items() if (more := _wrappers(name) - _wrappers(base))
    }
    if not found:
        return []
    wrappers = ", ".join(sorted({word for more in found.values() for word in more}))
    return [
        f"{len(found)} of {count(len(pairs), 'tensor')} of the fine-tune have a wrapper of "
        f"training in their names ({wrappers}) that the base has not, such as "
        f"{next(iter(found)):.{MAX_NAME}}. They are judged, but a program that loads the model "
        "starts anew what it does not know by name: save the model without its wrapper."
    ]


def _wrappers(name: str) -> Counter[str]:
    """The wrappers of training in a name; counted, as a model may have a module of such a name."""
    return Counter(part for part in name.split(".") if part in IN_TRAINING)


def mixed_prefixes(comparisons: Iterable[Comparison]) -> list[str]:
    """What to say where tensors of one fine-tune are renamed in different ways.

    Within one list of layers all have to be renamed alike, and a tensor outside of lists like a
    list of layers that lies beside it.  Lists may differ, as those of images and of text do.

    Args:
        comparisons: The pairs of a full fine-tune and its base.

    Returns:
        A sentence, or none.
    """
    pairs = dict.fromkeys(
        (pair.tuned.info.name, pair.base.codec.name)
        for pair in comparisons
        if pair.tuned is not None and pair.base.alias is None
    )
    layers = [layer for pair in pairs if (layer := _layer_of(*pair)) is not None]
    votes: dict[Parts, Counter[Rename]] = {}
    for layer in layers:
        votes.setdefault(layer.list, Counter())[layer.renamed] += 1
    usual = {list_: _most(list_, found) for list_, found in votes.items()}
    odd = [layer.name for layer in layers if layer.renamed != usual[layer.list]]
    odd += _outside(pairs, usual)
    if not odd:
        return []
    rest = len(odd) - NAMED
    listed = ", ".join(f"{name:.{MAX_NAME}}" for name in odd[:NAMED])
    listed += f" and {rest} more" * (rest > 0)
    return [
        f"{count(len(odd), 'tensor')} of the fine-tune {'has' if len(odd) == 1 else 'have'} "
        f"another prefix than the others: {listed}. "
        f"{'It is' if len(odd) == 1 else 'They are'} judged, but a program that loads the model "
        "may leave out what it does not know by name: give all tensors one prefix."
    ]


def _most(list_: Parts, found: Counter[Rename]) -> Rename:
    """How most tensors are renamed; of two as frequent ones the base's own name is usual."""
    return max(found, key=lambda renamed: (found[renamed], renamed == (list_, ())))


def _layer_of(tuned: str, base: str) -> _Layer | None:
    """A tensor in a list of layers; None of one that is in no list on both sides."""
    theirs, ours = _split(tuned), _split(base)
    if theirs is None or ours is None:
        return None
    # counted, as a model may have modules of these names itself
    more = Counter(_wrappings(theirs[1])) - Counter(_wrappings(ours[1]))
    return _Layer(tuned, ours[0], (theirs[0], tuple(sorted(more.elements()))))


def _split(name: str) -> tuple[Parts, Parts] | None:
    """A name before and after its first number; None without one."""
    parts = tuple(name.split("."))
    for i, part in enumerate(parts):
        if part.isdecimal():
            return parts[:i], parts[i + 1 :]
    return None


def _wrappings(parts: Parts) -> list[str]:
    return [part for part in parts if part in WRAPPINGS or part in WRAPPERS]


def _outside(pairs: Iterable[tuple[str, str]], usual: dict[Parts, Rename]) -> Iterator[str]:
    """The tensors outside of lists that are renamed unlike every list that lies beside them."""
    beside: dict[Parts, set[Parts]] = {}
    for ours, (theirs, _) in usual.items():
        old, new = _different(theirs, ours)
        beside.setdefault(old, set()).add(new)
    for tuned, base in pairs:
        if _split(tuned) is not None or _split(base) is not None:
            continue
        theirs, ours = (tuple(name.split(".")[:-1]) for name in (tuned, base))
        old, new = _different(theirs, ours)
        head = not (old or new) and not HEADS.isdisjoint(ours[:1])
        if not head and new not in beside.get(old, {new}):
            yield tuned


def _different(theirs: Parts, ours: Parts) -> tuple[Parts, Parts]:
    """What the base's name and the tuned one begin with, before what they have in common."""
    same = 0
    while same < min(len(ours), len(theirs)) and ours[-1 - same] == theirs[-1 - same]:
        same += 1
    return ours[: len(ours) - same], theirs[: len(theirs) - same]
