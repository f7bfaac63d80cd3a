"""Second moments as data: kept in a file, merged, and looked up by the name of a weight."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bulkedge._errors import CheckpointError, InputError, OutputError
from bulkedge.checkpoint import read_header
from bulkedge.checkpoint.elements import read_tensor

from ._collect import Collector

FORMAT = "bulkedge moments 1"
SAMPLE = 64
"""Number of entries of each weight that are kept to tell one model from another."""
ALIKE = 0.9
"""Cosine of two samples from which on they are of one model, fine-tuned or not."""


@dataclass(frozen=True)
class Layer:
    """What is known of the inputs of one layer.

    Attributes:
        moment: ``E[x xᵀ]``, shape ``(n, n)``; of an embedding the share of each index, ``(n,)``.
        count: Number of inputs.
        sample: Some entries of the layer's weight, to recognise the model by.
    """

    moment: Tensor
    count: int
    sample: Tensor


class Moments:
    """Second moments ``E[x xᵀ]`` of the inputs of a model's layers.

    Used as a context manager around calls of the model; or read from a file.

    Args:
        model: Any module; see :class:`Collector`.
        modules: Globs over the paths of its layers.

    Raises:
        InputError: If the model has no layer with inputs.

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
        self, model: nn.Module | None = None, *, modules: str | Sequence[str] = "*"
    ) -> None:
        self._collector = None if model is None else Collector(model, modules=modules)
        weights = {} if self._collector is None else self._collector.weights
        self._samples = {name: sample(weight) for name, weight in weights.items()}
        self._known: dict[str, Layer] = {}
        self._means: dict[int, tuple[Tensor, int, Tensor]] = {}  # of each sum, until it grows

    @property
    def layers(self) -> Mapping[str, Layer]:
        """What is known of each layer that has run, by its path."""
        if self._collector is None:
            return self._known
        return {
            name: Layer(self._mean(total, count), count, self._samples[name])
            for name, (total, count) in self._collector.sums.items()
        }

    def _mean(self, total: Tensor, count: int) -> Tensor:
        """A sum over its count, computed once; layers that share the sum share it."""
        known = self._means.get(id(total))
        if known is None or known[0] is not total or known[1] != count:
            known = self._means[id(total)] = total, count, total / count
        return known[2]

    def __getitem__(self, name: str) -> Layer:
        try:
            return self.layers[name]
        except KeyError:
            raise InputError(
                f"{name}: no inputs of this layer were seen; run it, or leave the layer out"
            ) from None

    def __enter__(self) -> Moments:
        if self._collector is None:
            raise InputError("expected moments of a model to collect, got some from a file")
        self._collector.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._collector is not None:
            self._collector.__exit__(*error)

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
        for table in tables:
            if odd := sorted(set(table) ^ set(first)):
                raise InputError(f"{odd[0]}: only some of the moments to be merged have this layer")
        for name in first:
            parts = [table[name] for table in (first, *tables)]
            if not all(alike(parts[0].sample, part.sample) for part in parts):
                raise InputError(f"{name}: the moments to be merged are of different models")
            found._known[name] = _mean(parts, factors)
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; sums in float32, each once.

        Args:
            path: The file; one that exists is replaced once the new one is whole.

        Raises:
            InputError: If no layer has run.
            OutputError: If it cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        layers = self.layers
        if not layers:
            raise InputError("expected layers that have run, got none; call the model first")
        names: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        table = {}
        for name, layer in layers.items():
            key = names.setdefault(id(layer.moment), f"moment.{len(names)}")
            tensors[key] = layer.moment.float().cpu().contiguous()
            tensors[f"sample.{name}"] = layer.sample.cpu()
            table[name] = {"moment": key, "count": layer.count}
        target = Path(path)
        building = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, building, {"format": FORMAT, "layers": json.dumps(table)})
            os.replace(building, target)
        except (OSError, ValueError, SafetensorError) as error:
            with suppress(OSError, ValueError):
                building.unlink(missing_ok=True)
            raise OutputError(f"{path}: cannot be written ({error})") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Read a file that :meth:`save` has written.

        Args:
            path: The file.

        Returns:
            The moments.

        Raises:
            CheckpointError: If it is none, or damaged.
        """
        file = Path(path)
        tensors, metadata = read_header(file)
        if metadata.get("format") != FORMAT:
            raise CheckpointError(
                f"{file}: no moments of this version; make some with `bulkedge moments`"
            )
        found, moments = cls(), {}
        try:
            table = json.loads(metadata["layers"])
            for name, row in table.items():
                key, count = str(row["moment"]), int(row["count"])
                if key not in moments:
                    moments[key] = read_tensor(tensors[key]).double()
                    _check(file, name, moments[key], count)
                own = read_tensor(tensors[f"sample.{name}"])
                found._known[name] = Layer(moments[key], count, own)
        except (
            KeyError, ValueError, TypeError, AttributeError, RecursionError, OverflowError,
        ) as error:  # fmt: skip
            raise CheckpointError(
                f"{path}: damaged moments ({type(error).__name__}: {error}); collect them again"
            ) from None
        return found


def _check(file: Path, name: str, moment: Tensor, count: int) -> None:
    """Raise unless a tensor can be a second moment."""
    square = moment.ndim == 1 or (moment.ndim == 2 and moment.shape[0] == moment.shape[1])
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    if square and moment.ndim == 2:
        square = torch.allclose(moment, moment.mT, rtol=1e-3, atol=1e-6 * float(moment.abs().max()))
    if not square or count < 1 or not bool(moment.isfinite().all()) or bool((diagonal < 0).any()):
        raise CheckpointError(
            f"{file}: layer {name!r}: not a second moment of {count} inputs; collect them again"
        )


def _mean(parts: Sequence[Layer], weights: Sequence[float]) -> Layer:
    """The moments of one layer together, each input with the weight of its texts."""
    counts = [w * part.count for w, part in zip(weights, parts, strict=True)]
    moment = torch.zeros_like(parts[0].moment, device="cpu", dtype=torch.float64)
    for count, part in zip(counts, parts, strict=True):
        moment += count / sum(counts) * part.moment.cpu()
    return Layer(moment, sum(part.count for part in parts), parts[0].sample)


def sample(weight: Tensor) -> Tensor:
    """Some entries of a weight, spread over it, to recognise it by.

    Args:
        weight: As the model, or its file, stores it.

    Returns:
        At most 64 entries, float32.
    """
    flat = weight.detach().reshape(-1)
    step = max(1, len(flat) // SAMPLE)
    return flat[::step][:SAMPLE].float().cpu().clone(memory_format=torch.contiguous_format)


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two samples are of one weight, before or after some training."""
    if one.shape != other.shape or torch.equal(one, other):
        return one.shape == other.shape
    return float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0)) > ALIKE
