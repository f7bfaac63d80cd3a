"""Which weight of a checkpoint each layer's moments belong to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from bulkedge._errors import CheckpointError, InputError
from bulkedge.checkpoint import NameRule, TensorInfo, infer_rule, read_tensor

from ._layer import alike, sample


def match_weights(
    widths: Mapping[str, int],
    tensors: Mapping[str, TensorInfo],
    sample_of: Callable[[str], Tensor],
    samples_in: Callable[[TensorInfo], Sequence[Tensor]] = lambda info: [sample(read_tensor(info))],
) -> dict[str, str]:
    """Find the weights of layers in a checkpoint.

    One rule of prefixes holds for all layers, as between a fine-tune and its base.  What it leaves
    open, in a part of a model or in one of two encoders, is decided by the entries of each weight
    that are kept with its moments: a weight is read where several may be meant.

    Args:
        widths: n of each layer, by its path; the path of a model that is one layer is empty.
        tensors: The weights, by name.
        sample_of: The kept entries of a layer's weight, by its path.
        samples_in: The same entries of a weight of the checkpoint, as it may have been run.

    Returns:
        ``{name of a weight: path of its layer}``; layers that are not in the checkpoint left out.

    Raises:
        InputError: If two layers are of one weight, one of two equal weights, or none of any.

    Example:
        >>> match_weights({}, {}, dict().__getitem__)
        Traceback (most recent call last):
            ...
        bulkedge._errors.InputError: no layer of the moments is in the checkpoint: there is none
    """
    rule = _rule(widths, tensors)
    owners: dict[str, list[str]] = {}
    for path, width in widths.items():
        name = None if rule is None else rule.find(_weight(path))
        if name is None:
            name = _by_entries(path, width, tensors, sample_of(path), samples_in)
        if name is not None:
            owners.setdefault(name, []).append(path)
    if not owners:
        first = next(iter(widths), None)
        there = "there is none" if first is None else f"the first is {first!r}; measure this model"
        raise InputError(f"no layer of the moments is in the checkpoint: {there}")
    for name, paths in owners.items():
        if len(paths) > 1:
            raise InputError(
                f"{' and '.join(map(repr, paths))} share one weight, {name!r}; collect one "
                "of them, with include= or --include"
            )
    return {name: paths[0] for name, paths in owners.items()}


def _weight(path: str) -> str:
    return f"{path}.weight" if path else "weight"


def _rule(widths: Mapping[str, int], tensors: Mapping[str, TensorInfo]) -> NameRule | None:
    """The rule of prefixes; None where the names fit in several ways."""
    layers = {_weight(path): width for path, width in widths.items()}
    shapes = {name: info.shape for name, info in tensors.items()}
    try:
        return infer_rule(layers, shapes, lambda name, shape: layers[name] in shape)
    except CheckpointError:
        return None


def _by_entries(
    path: str,
    width: int,
    tensors: Mapping[str, TensorInfo],
    own: Tensor,
    samples_in: Callable[[TensorInfo], Sequence[Tensor]],
) -> str | None:
    """The weight that ends like a path, or the other way round, and has the same entries."""
    end = f".{_weight(path)}" if path else ""
    fitting = [
        name
        for name, info in tensors.items()
        if len(info.shape) > 1 and width in info.shape
        and (f".{name}".endswith(end) or f".{_weight(path)}".endswith(f".{name}"))
    ]  # fmt: skip
    if not bool((own != own[:1]).any()):
        return None  # a weight of equal entries has no information
    found = [name for name in fitting if any(alike(own, x) for x in samples_in(tensors[name]))]
    if len(found) > 1:
        raise InputError(
            f"layer {path!r} may be any of {', '.join(map(repr, found[:3]))}: their weights are "
            "alike; measure the whole model"
        )
    return found[0] if found else None
