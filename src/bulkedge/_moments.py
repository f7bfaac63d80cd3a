"""The moments of a model's inputs on texts, with or without a fine-tune."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bulkedge._errors import InputError
from bulkedge._fields import as_path
from bulkedge._precision import exact
from bulkedge.auditing.engine._device import check_device
from bulkedge.checkpoint import Adapter, Resolver, TensorInfo, infer_rule, read_tensor
from bulkedge.checkpoint.header import FLOATING
from bulkedge.checkpoint.model import is_output
from bulkedge.checkpoint.of_base import OfBase
from bulkedge.comparison import Plan, load, make_plan, what_is_not_finite
from bulkedge.comparison.finite import REMEDY
from bulkedge.moments import Collector, Moments
from bulkedge.moments._losses import loss_of
from bulkedge.moments._partial import Partial, digest_of
from bulkedge.moments._read import checked_texts
from bulkedge.moments._stream import EXACT_WIDTH
from bulkedge.moments._texts import Progress, load_network, run_tokens, settings_of, tokens_of
from bulkedge.records import make_recipe
from bulkedge.records.tensors import Skipped

NAMED = 3
"""So many tensors are named in a message."""
LORA_PART = re.compile(r"\.lora_[AB](\.default)?(\.weight|\.bias)?$")
NO_FINE_TUNE = (
    "all that it holds equals the base: there is no fine-tune here; if it is a merged model, load "
    "the base by the class that the adapter was trained with, and merge it again"
)
COMPUTED = ("inv_freq", "masked_bias")
"""How the names of vectors end that no model reads from its files."""


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
    curvatures: bool = False,
    device: str = "cpu",
    partial: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Moments:
    """Sum up the inputs of a model's layers while it reads texts.

    Cost: one pass of the model over the texts, and as much again for the sums; with curvatures
    about three times that.

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
        curvatures: Whether to collect how much each output of a layer matters, too.  This takes one
            backward pass for each batch.  A causal model is differentiated for its next token,
            drawn from its own distribution, and any other for its last hidden states, in random
            directions.
        device: Where to compute: ``cpu``, ``cuda`` or ``cuda:N``.
        partial: A file for the sums so far, written at most once a minute and when the run is
            interrupted.  If it is there, of the same texts, model and settings, the run resumes
            from it, to the same moments.  Remove it once they are saved.
        progress: Called after each batch as ``progress(texts so far, texts in all)``.

    Returns:
        The moments of all layers that have run.

    Raises:
        MissingExtraError: Without transformers.
        InputError: If the model cannot be loaded or run, a weight, bias or norm of the fine-tune
            has no place in it, there is no text, or the partial file is of another run.
        RecipeError: If a glob matches no layer, or the device is no name of one.
    """
    kept = list(checked_texts(texts, "texts"))
    if not kept:
        raise InputError("expected texts, got none that is not empty")
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"expected max_tokens ≥ 1, got {max_tokens}")
    check_device(make_recipe({"device": device}).device)
    model = as_path("model", model)
    tuned = None if tuned is None else as_path("tuned", tuned)
    network, tokenizer = load_network(Path(model))
    settings = {
        "include": include, "exclude": exclude, "rank": rank, "exact_width": exact_width,
        "curvatures": curvatures,
    }  # fmt: skip
    # before the fine-tune: moments are recognised by the base's weights
    moments = Moments(network, **settings)
    moments.tuned = tuned is not None
    _check_finite(network, model)
    if tuned is not None:
        _put_on(network, model, tuned)
        _check_finite(network, tuned)
        moments.mark_tuned()
    tokens = tokens_of(network, tokenizer, kept, max_tokens)
    digest = digest_of(network.state_dict(), tokens, settings | {"model": settings_of(network)})
    network.to(device)
    loss = loss_of(network.requires_grad_(False)) if curvatures else None
    with moments, _kept(partial, digest, moments.collector) as file:
        for done in run_tokens(network, tokenizer, tokens, file.batches, loss):
            moments.collector.settle()
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
def _check_finite(network: Any, path: str) -> None:
    """Raise where a weight holds NaN or Inf, which the inputs of all later layers would, too."""
    for stored, weight in network.named_parameters():
        if (found := what_is_not_finite(weight)) is not None:
            raise InputError(f"{path}: {stored!r} holds {found}: {REMEDY}")


@torch.no_grad()
def _put_on(network: Any, base: str, tuned: str) -> None:
    """Give a model the weights of a fine-tune: all of them, or an error names what has no place."""
    plan = make_plan(base, tuned, make_recipe({"partial": True}))
    if damaged := [row for row in plan.skipped if row.not_finite is not None]:
        path = base if damaged[0].side == "base" else tuned
        holds = damaged[0].not_finite
        raise InputError(f"{path}: {damaged[0].name!r} holds {holds}: {REMEDY}")
    # the output layer may go unjudged: no layer reads what it puts out
    _refuse(
        f"{row.name!r} ({row.reason})" for row in plan.skipped if row.lost and not _of_output(row)
    )
    weights = dict(network.named_parameters(remove_duplicate=False))
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    names = [comparison.base.info.name for comparison in plan.comparisons]
    stored = {c.base.info.name: c.base.info.shape for c in plan.comparisons}
    rule = infer_rule(names, shapes, lambda name, shape: stored[name] == shape)
    changed = False
    for comparison in plan.comparisons:
        name = comparison.base.info.name
        if comparison.base.alias is not None:
            name = f"{comparison.base.alias}.weight"
            if is_output(name):
                continue  # it shares the embedding's tensor in the base, and no layer reads it
        place = rule.find(name)
        if place is None:
            raise InputError(
                f"{tuned}: {name!r} has no place in the model that transformers has loaded from "
                f"{base}; is it an output layer? merge it first"
            )
        pair = load(comparison, torch.device("cpu"))
        weight, matrix = weights[place], comparison.base
        if matrix.expert is not None:
            weight = weight[matrix.expert]
        value = pair.tuned_map().to_dense()
        value = value.mT if matrix.transposed else value
        if matrix.rows is not None:
            weight = weight[slice(*matrix.rows)]
        changed |= _overwrite(weight, value.reshape(weight.shape))
    if not _put_vectors_on(network, plan) and not changed:
        raise InputError(f"{tuned}: {NO_FINE_TUNE}")


def _overwrite(weight: torch.Tensor, value: torch.Tensor) -> bool:
    """Give a weight other values; whether they are others."""
    before = weight.clone()
    weight.copy_(value)
    return not torch.equal(weight, before)


def _of_output(row: Skipped) -> bool:
    """Whether a tensor that is left out belongs to an output layer over the vocabulary."""
    return is_output(row.name) or is_output(LORA_PART.sub(".weight", row.name))


def _refuse(names: Iterable[str]) -> None:
    """Raise if anything of a fine-tune is not put on.

    Args:
        names: What is not, each with a reason.

    Raises:
        InputError: If there is any.
    """
    if lost := list(dict.fromkeys(names)):
        more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
        raise InputError(
            f"of the fine-tune {', '.join(lost[:NAMED])}{more} cannot be put on the model, whose "
            "inputs would be those of another; merge it into a full model, or measure it in a loop "
            "of your own, with Moments(model)"
        )


def _put_vectors_on(network: Any, plan: Plan) -> bool:
    """The same for biases and norms, which no audit compares; whether any has changed."""
    tuned, changed = plan.tuned, False
    weights = {
        **dict(network.named_parameters(remove_duplicate=False)),
        **dict(network.named_buffers(remove_duplicate=False)),
    }
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    vectors = {n: i for n, i in tuned.tensors.items() if _is_vector(i) and not _unread(n, network)}
    known = {c.tuned_name: c.base.info.shape for c in plan.comparisons}
    known |= {name: info.shape for name, info in vectors.items()}
    rule = infer_rule(known, shapes, lambda name, shape: known[name] == shape)
    names = Resolver(rule, shapes, plan.base.config, str(plan.base.path))
    lost = []
    for name, info in vectors.items():
        place = names.find(name, info.shape.__eq__)
        if place is not None and shapes[place] == info.shape:
            changed |= _overwrite(weights[place], read_tensor(info))
        elif place is not None or _within(name, names):
            lost.append(f"{info.name!r} (a vector without a place)")
    if isinstance(tuned, Adapter):
        lost += _add_biases(tuned, weights, names)
        changed |= any(row.set_aside for row in tuned.unhandled)
    for comparison in plan.comparisons:
        update = comparison.factors
        if isinstance(update, OfBase) and (scales := update.scaled_outputs) is not None:
            bias = names.find(f"{comparison.base.codec.name.removesuffix('weight')}bias", _vector)
            if bias is not None:
                weights[bias].mul_(exact(read_tensor(scales)).flatten())
    _refuse(lost)
    return changed


def _add_biases(
    tuned: Adapter, weights: Mapping[str, torch.Tensor], names: Resolver
) -> Iterator[str]:
    """Add the biases of factors (``lora_bias``), which PEFT scales as it does the factors.

    Yields:
        Those that have no place.
    """
    for row in tuned.unhandled:
        if not row.set_aside:
            continue  # refused before
        factors = tuned.factors.get(f"{row.name.removesuffix('.bias')}.weight")
        place = names.find(row.name, row.info.shape.__eq__)
        fits = place is not None and tuple(weights[place].shape) == row.info.shape
        if place is None or not fits or factors is None or factors.scale is None:
            yield f"{row.info.name!r} (a bias of a layer that has none)"
        else:
            weights[place].add_(factors.scale * exact(read_tensor(row.info)))


def _vector(shape: tuple[int, ...]) -> bool:
    """Whether a shape is that of a vector."""
    return len(shape) == 1


def _is_vector(info: TensorInfo) -> bool:
    """Whether a tensor is a bias, a norm or the like."""
    return len(info.shape) == 1 and info.dtype in FLOATING


def _within(name: str, names: Resolver) -> bool:
    """Whether a vector belongs to the layers of a model, not to a head that the model lacks."""
    parts = name.split(".")
    numbered = any(part.isdecimal() for part in parts[:-2])
    return numbered or names.is_inside(names.rule.add + name.removeprefix(names.rule.strip))


def _unread(name: str, network: Any) -> bool:
    """Whether the model's class computes what files of it may hold, or ignores it."""
    ignored = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()
    return name.endswith(COMPUTED) or any(re.search(pattern, name) for pattern in ignored)
