"""The moments of a model's inputs on texts, with or without a fine-tune."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bulkedge._errors import InputError
from bulkedge.checkpoint import Adapter, Checkpoint, NameRule, infer_rule, read_tensor
from bulkedge.comparison import load, make_plan
from bulkedge.moments import Moments
from bulkedge.moments._texts import Progress, load_network, run_texts
from bulkedge.records import make_recipe


def collect_moments(
    model: str | os.PathLike[str],
    texts: Sequence[str],
    *,
    tuned: str | os.PathLike[str] | None = None,
    max_tokens: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Moments:
    """Sum up the inputs of a model's layers while it reads texts.

    Cost: one pass of the model over the texts, and as much again for the sums.

    Args:
        model: The folder of a transformers model and its tokenizer.
        texts: What it reads; a few hundred of the kind that is to be kept will do.
        tuned: A fine-tune whose inputs are wanted in place of the model's: an adapter or a
            checkpoint, as :func:`bulkedge.audit` takes it.
        max_tokens: Where to stop.
        device: Where to compute.
        progress: Called after each batch as ``progress(texts so far, texts in all)``.

    Returns:
        The moments of all layers that have run.

    Raises:
        MissingExtraError: Without transformers.
        InputError: If the model cannot be loaded, or a tuned weight has no place in it.
    """
    network, tokenizer = load_network(Path(model))
    moments = Moments(network)  # before the fine-tune: moments are recognised by the base's weights
    if tuned is not None:
        _put_on(network, os.fspath(model), os.fspath(tuned))
    network.to(device)
    with moments:
        run_texts(network, tokenizer, texts, max_tokens=max_tokens, progress=progress)
    return moments


@torch.no_grad()
def _put_on(network: Any, base: str, tuned: str) -> None:
    """Give a model the weights of a fine-tune."""
    plan = make_plan(base, tuned, make_recipe({"partial": True}))
    weights = dict(network.named_parameters(remove_duplicate=False))
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    names = [comparison.base.info.name for comparison in plan.comparisons]
    stored = {c.base.info.name: c.base.info.shape for c in plan.comparisons}
    rule = infer_rule(names, shapes, lambda name, shape: stored[name] == shape)
    for comparison in plan.comparisons:
        place = rule.find(comparison.base.info.name)
        if comparison.base.alias is not None:
            continue  # an output layer that shares the embedding's tensor: no input passes it
        if place is None:
            raise InputError(
                f"{tuned}: {comparison.base.info.name!r} has no place in the model that "
                f"transformers has loaded from {base}; is it an output layer? merge it first"
            )
        pair = load(comparison, torch.device("cpu"))
        weight, matrix = weights[place], comparison.base
        if matrix.expert is not None:
            weight = weight[matrix.expert]
        value = pair.tuned_map().to_dense()
        value = value.mT if matrix.transposed else value
        if matrix.rows is not None:
            weight = weight[slice(*matrix.rows)]
        weight.copy_(value.reshape(weight.shape))
    _put_vectors_on(weights, rule, plan.tuned)


def _put_vectors_on(
    weights: Mapping[str, torch.Tensor], rule: NameRule, tuned: Checkpoint | Adapter
) -> None:
    """The same for biases and norms, which no audit compares."""
    vectors = dict(tuned.tensors)
    if isinstance(tuned, Adapter):
        vectors |= {row.name: row.info for row in tuned.unhandled if row.set_aside}
    for name, info in vectors.items():
        place = rule.find(name)
        if len(info.shape) == 1 and place is not None and weights[place].shape == info.shape:
            weights[place].copy_(read_tensor(info))
