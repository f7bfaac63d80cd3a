"""Second moments as data: kept in a file, merged, and looked up by the name of a weight."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bulkedge._errors import InputError

from ._collect import Collector
from ._file import read_moments, write_layers
from ._inputs import acting
from ._layer import Layer, alike, sample
from ._sketch import ROWS, Moment, Sketch, mean, output_power, sketch
from ._stream import EXACT_WIDTH, RANK, from_products, is_stream


class Moments:
    """Second moments ``E[x xᵀ]`` of the inputs of a model's layers.

    Used as a context manager around calls of the model; or read from a file.

    Args:
        model: Any module; see :class:`Collector`.
        include: Globs over the paths of its layers.
        exclude: Globs over those that are left out.
        rank: Number of eigenvectors that are kept of a wider input: see :meth:`sketched`.  If None,
            inputs up to ``exact_width`` are kept as matrices, and 1024 eigenvectors of wider ones.
        exact_width: The largest width that is summed up as a matrix while the model runs.  Of a
            wider input there are only sums of thin products, which the sketch is made of.
        curvatures: Whether to collect ``G = E[g gᵀ]`` of each linear layer, too, g the gradients by
            its outputs in the backward pass that follows a call. The caller chooses the loss: a sum
            over texts, not a mean, so that each text has the same weight.  Layers of more than
            ``exact_width`` outputs have none.

    Attributes:
        tuned: Whether they are of a fine-tune's inputs, as ``collect_moments`` says; None if
            that is not known.

    Raises:
        InputError: If the model has no layer with inputs, or the rank is below 1.
        RecipeError: If a glob matches no layer.

    References:
        Jin et al., "Dataless knowledge fusion by merging weights of language models",
        arXiv:2212.09849, use the same moments.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with Moments(model) as moments, torch.no_grad():
        ...     _ = model(torch.eye(3))
        >>> moments["0"].moment.diagonal().sum().item()
        1.0
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        rank: int | None = None,
        exact_width: int = EXACT_WIDTH,
        curvatures: bool = False,
    ) -> None:
        self._rank = rank
        self.tuned: bool | None = None
        self._collector: Collector | None = None
        if model is not None:
            self._collector = Collector(
                model, include=include, exclude=exclude, rank=rank, exact_width=exact_width,
                curvatures=curvatures,
            )  # fmt: skip
        weights = {} if self._collector is None else self._collector.weights
        self._samples = {name: sample(weight) for name, weight in weights.items()}
        self._tuned_samples: dict[str, Tensor] = {}
        self._known: dict[str, Layer] = {}
        self._outputs: dict[str, tuple[int, float]] = {}  # of each layer at its count
        self._means: dict[int, tuple[Tensor, int, Moment]] = {}  # of each sum, until it grows

    @property
    def collector(self) -> Collector:
        """What sums them up; InputError of moments from a file."""
        if self._collector is None:
            raise InputError("expected moments of a model to collect, got some from a file")
        return self._collector

    @property
    def layers(self) -> Mapping[str, Layer]:
        """What is known of each layer that has run, by its path."""
        if (collector := self._collector) is None:
            return self._known
        collector.settle()
        return {
            name: Layer(
                self._mean(total, count), count, self._samples[name], self._output(collector, name),
                *self._curvature(collector, name), self._tuned_samples.get(name),
            )
            for name, (total, count) in collector.sums.items()
        }  # fmt: skip

    def _curvature(self, collector: Collector, name: str) -> tuple[Moment | None, int]:
        """The curvature of a layer, and of how many gradients it is."""
        known = collector.curvatures.sums.get(name)
        if known is None:
            return None, 0
        return _moment(known.total / known.count, self._rank), known.count

    def _output(self, collector: Collector, name: str) -> float:
        """The output of a layer, computed once at each count."""
        total, count = collector.sums[name]
        if self._outputs.get(name, (0, 0.0))[0] != count:
            weight = acting(collector.layers[name], collector.weights[name])
            # a sum need not become a mean, in memory, for this; of a stream there is none
            power = collector.powers.sums[name] if is_stream(total) else output_power(weight, total)
            self._outputs[name] = count, power / count
        return self._outputs[name][1]

    def _mean(self, total: Tensor, count: int) -> Moment:
        """The moment of a sum, computed once; layers that share the sum share it."""
        known = self._means.get(id(total))
        if known is None or known[0] is not total or known[1] != count:
            known = self._means[id(total)] = total, count, _moment(total / count, self._rank)
        return known[2]

    def mark_tuned(self) -> None:
        """Say that the model is a fine-tune now, so that its moments are not used for another.

        Some entries of each weight are kept, with what an active adapter adds.  Call it while the
        model has the weights of the fine-tune: before the inputs are collected, or after.

        Raises:
            InputError: If these moments were read from a file, or merged.

        Example:
            >>> model = nn.Linear(2, 2)
            >>> with Moments(model) as moments, torch.no_grad():
            ...     _ = model(torch.eye(2))
            >>> moments.mark_tuned()
            >>> moments.tuned
            True
        """
        self._tuned_samples = self.collector.samples_in_use()
        self.tuned = True

    def __getitem__(self, name: str) -> Layer:
        try:
            return self.layers[name]
        except KeyError:
            raise InputError(
                f"{name}: no inputs of this layer were seen; run it, or leave the layer out"
            ) from None

    def __enter__(self) -> Moments:
        self.collector.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._collector is not None:
            self._collector.__exit__(*error)
            if error[0] is not None:
                return
            for name in self._collector.sums:
                self._output(self._collector, name)  # before the weights change

    def merge(self, *others: Moments, weights: Sequence[float] | None = None) -> Moments:
        """The moments of several texts together.

        Args:
            others: Moments of the same model.
            weights: Of these and of each of the others; 1 for all if None: each input counts once.

        Returns:
            ``Σ wᵢ Σ x xᵀ`` over ``Σ wᵢ countᵢ`` of each layer.

        Raises:
            InputError: If they are of different layers or models, or a weight is not positive.

        Example:
            >>> model = nn.Linear(2, 2)
            >>> with Moments(model) as a, torch.no_grad():
            ...     _ = model(torch.eye(2))
            >>> a.merge(a)["" ].count
            4
        """
        together = [self, *others]
        factors = [1.0] * len(together) if weights is None else list(weights)
        if len(factors) != len(together) or not all(0 < w < float("inf") for w in factors):
            raise InputError(
                f"expected {len(together)} positive weights, one for each, got {weights!r:.60}"
            )
        found, (first, *tables) = Moments(), [each.layers for each in together]
        found.tuned = self.tuned if len({each.tuned for each in together}) == 1 else None
        for table in tables:
            if odd := sorted(set(table) ^ set(first)):
                raise InputError(f"{odd[0]}: only some of the moments to be merged have this layer")
        for name in first:
            parts = [table[name] for table in (first, *tables)]
            if not all(alike(parts[0].sample, part.sample) for part in parts):
                raise InputError(f"{name}: the moments to be merged are of different models")
            try:
                found._known[name] = _mean(parts, factors)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
        return found

    def sketched(self, rank: int) -> Moments:
        """The same with a sketch of every moment that is wider than a rank.

        Args:
            rank: Number of eigenvectors that are kept of each.

        Returns:
            New moments; matrices of up to ``rank`` columns, diagonals and sketches as they are.

        Raises:
            InputError: If the rank is below 1.

        Example:
            >>> model = nn.Linear(3, 2)
            >>> with Moments(model) as moments, torch.no_grad():
            ...     _ = model(torch.eye(3))
            >>> len(moments.sketched(rank=1)[""].moment.values)
            1
        """
        found, done = Moments(), {}
        found.tuned = self.tuned
        for name, layer in self.layers.items():
            key = id(layer.moment)
            if key not in done:
                done[key] = _thin(layer.moment, rank)
            G = layer.curvature
            G = None if G is None else _thin(G, rank)
            found._known[name] = replace(layer, moment=done[key], curvature=G)
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; moments in float32, each once.

        Args:
            path: The file; one that exists is replaced once the new one is whole.

        Raises:
            InputError: If no layer has run.
            OutputError: If it cannot be written.
        """
        layers = self._to_be_stored()
        if not layers:
            raise InputError("expected layers that have run, got none; call the model first")
        write_layers(Path(path), layers, self.tuned)

    def _to_be_stored(self) -> Mapping[str, Layer]:
        """The layers with means in float32, so that no second copy in float64 is made of a sum."""
        if (collector := self._collector) is None:
            return self._known
        collector.settle()
        means: dict[int, Moment] = {}
        found: dict[str, Layer] = {}
        for name, (total, count) in collector.sums.items():
            if id(total) not in means:
                whole = self._rank is None and not is_stream(total)
                means[id(total)] = _float(total, count) if whole else self._mean(total, count)
            output = self._output(collector, name)
            G = self._curvature(collector, name)
            own = self._tuned_samples.get(name)
            found[name] = Layer(means[id(total)], count, self._samples[name], output, *G, own)
        return found

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Read a file that :meth:`save` has written.

        Args:
            path: The file.

        Returns:
            The moments.

        Raises:
            CheckpointError: If it is not such a file, or damaged.
        """
        found = cls()
        found._known, found.tuned = read_moments(Path(path))
        return found


def _float(total: Tensor, count: int) -> Tensor:
    """A mean in float32, on the processor."""
    found = torch.empty(total.shape, dtype=torch.float32)
    for into, rows in zip(found.split(ROWS), total.split(ROWS), strict=True):
        into.copy_(rows / count)
    return found


def _moment(total: Tensor, rank: int | None) -> Moment:
    """The moment of what was summed up, over its count."""
    if is_stream(total):
        return from_products(total, rank or RANK)
    return total if rank is None else _thin(total, rank)


def _thin(moment: Moment, rank: int) -> Moment:
    """A sketch of a matrix that is wider than the rank."""
    if isinstance(moment, Sketch) or moment.ndim == 1 or len(moment) <= rank:
        return moment
    return sketch(moment, rank)


def _mean(parts: Sequence[Layer], weights: Sequence[float]) -> Layer:
    """The moments of one layer together, each input with the weight of its texts."""
    counts = [w * part.count for w, part in zip(weights, parts, strict=True)]
    shares = [count / sum(counts) for count in counts]
    return Layer(
        mean([part.moment for part in parts], shares),
        sum(part.count for part in parts),
        parts[0].sample,
        sum(share * part.output for share, part in zip(shares, parts, strict=True)),
        *_mean_curvature(parts, weights),
        _common_sample(parts),
    )


def _common_sample(parts: Sequence[Layer]) -> Tensor | None:
    """The entries of the fine-tune's weight, if all moments are of one."""
    first, *others = (part.tuned_sample for part in parts)
    if first is None or any(x is None or not torch.equal(first, x) for x in others):
        return None
    return first


def _mean_curvature(parts: Sequence[Layer], weights: Sequence[float]) -> tuple[Moment | None, int]:
    """The same of their curvatures, each gradient with the weight of its texts."""
    known = [part.curvature for part in parts if part.curvature is not None]
    if not known:
        return None, 0
    if len(known) < len(parts):
        raise InputError("only some of the moments to be merged have curvatures; collect them all")
    counts = [w * part.gradients for w, part in zip(weights, parts, strict=True)]
    return mean(known, [count / sum(counts) for count in counts]), sum(x.gradients for x in parts)
