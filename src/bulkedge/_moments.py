"""The moments of a model's inputs on texts, with or without a fine-tune."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bulkedge._errors import InputError
from bulkedge.auditing.engine._device import check_device
from bulkedge.checkpoint import Adapter, Checkpoint, NameRule, infer_rule, read_tensor
from bulkedge.comparison import load, make_plan
from bulkedge.moments import Collector, Moments
from bulkedge.moments._partial import Partial, digest_of
from bulkedge.moments._read import checked_texts
from bulkedge.moments._stream import EXACT_WIDTH
from bulkedge.moments._texts import Progress, load_network, run_tokens, tokens_of
from bulkedge.records import make_recipe


def collect_moments(
    model: str | os.PathLike[str],
    texts: Sequence[str],
    *,
    tuned: str | os.PathLike[str] | None = None,
    max_tokens: int | None = None,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    rank: int | None = None,
    exact_width: int = EXACT_WIDTH,
    device: str = "cpu",
    partial: str | os.PathLike[str] | None = None,
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
        include: Globs over the paths of layers.
        exclude: Globs over those that are left out.
        rank: See :class:`Moments`.
        exact_width: Likewise.
        device: Where to compute: ``cpu``, ``cuda`` or ``cuda:N``.
        partial: A file for the sums so far, written at most once a minute and when the run is
            interrupted.  If it is there, of the same texts, model and settings, the run goes on
            from it, to the same moments.  Remove it once they are saved.
        progress: Called after each batch as ``progress(texts so far, texts in all)``.

    Returns:
        The moments of all layers that have run.

    Raises:
        MissingExtraError: Without transformers.
        InputError: If the model cannot be loaded or run, a tuned weight has no place in it, there
            is no text, or the partial file is of another run.
        RecipeError: If a glob matches no layer, or the device is no name of one.
    """
    kept = list(checked_texts(texts, "texts"))
    if not kept:
        raise InputError("expected texts, got none that is not empty")
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"expected max_tokens ≥ 1, got {max_tokens}")
    check_device(make_recipe({"device": device}).device)
    network, tokenizer = load_network(Path(model))
    settings = {"include": include, "exclude": exclude, "rank": rank, "exact_width": exact_width}
    # before the fine-tune: moments are recognised by the base's weights
    moments = Moments(network, **settings)
    moments.tuned = tuned is not None
    if tuned is not None:
        _put_on(network, os.fspath(model), os.fspath(tuned))
    tokens = tokens_of(network, tokenizer, kept, max_tokens)
    digest = digest_of(network.state_dict(), tokens, settings)
    network.to(device)
    with moments, _kept(partial, digest, moments.collector) as file:
        for done in run_tokens(network, tokenizer, tokens, file.batches):
            file.keep()
            if progress is not None:
                progress(done, len(tokens))
    return moments


@contextmanager
def _kept(
    path: str | os.PathLike[str] | None, digest: str, collector: Collector
) -> Iterator[Partial]:
    """The partial file of a run; what was counted is in it if the run is interrupted."""
    file = Partial(None if path is None else Path(path), digest, collector)
    try:
        yield file
    except BaseException:
        file.keep(now=True)
        raise


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
