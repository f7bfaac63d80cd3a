"""The file of moments: safetensors, each moment once, and a table of the layers in its header."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bulkedge._errors import CheckpointError, OutputError
from bulkedge._precision import exact
from bulkedge.checkpoint import TensorInfo, read_header
from bulkedge.checkpoint.elements import read_tensor
from bulkedge.checkpoint.write import umask

from ._layer import Layer
from ._sketch import ROWS, Moment, Sketch, diagonal, width

FORMAT = "bulkedge moments 2"
EARLIER = "bulkedge moments "
BASE, TUNED = "base", "tuned"
PARTS = ("vectors", "values", "rest")
"""What a sketch is stored as: tensors of these names below that of the moment."""


def write_layers(path: Path, layers: Mapping[str, Layer], tuned: bool | None = None) -> None:
    """Write a file of moments, in float32.

    Args:
        path: The file; one that exists is replaced once the new one is whole.
        layers: What is known of each, by its path; moments that are one object are stored once.
        tuned: Whether they are of a fine-tune's inputs; None if that is not known.

    Raises:
        OutputError: If it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    names: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    table: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        key = names.setdefault(id(layer.moment), f"moment.{len(names)}")
        row = {"count": layer.count, "output": layer.output, "moment": key}
        row |= _put(tensors, key, layer.moment)
        if layer.curvature is not None:
            key = f"curvature.{name}"
            of = {"moment": key, "count": layer.gradients}
            row["curvature"] = of | _put(tensors, key, layer.curvature)
        tensors[f"sample.{name}"] = layer.sample.cpu()
        if layer.tuned_sample is not None:
            tensors[f"tuned.{name}"] = layer.tuned_sample.cpu()
        table[name] = row
    metadata = {"format": FORMAT, "layers": json.dumps(table)}
    if tuned is not None:
        metadata["model"] = TUNED if tuned else BASE
    building = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, building, metadata)
        building.chmod(0o666 & ~umask())
        _order(building)
        os.replace(building, path)
    except (OSError, ValueError, SafetensorError) as error:
        with suppress(OSError, ValueError):
            building.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written ({error})") from None


def _put(tensors: dict[str, Tensor], key: str, moment: Moment) -> dict[str, float]:
    """Add a moment to what is to be stored; returns what the table says of a sketch."""
    if not isinstance(moment, Sketch):
        tensors[key] = _stored(moment)
        return {}
    tensors |= {f"{key}.{part}": _stored(getattr(moment, part)) for part in PARTS}
    return {"loss": moment.loss}


def _order(file: Path) -> None:
    """Put the metadata of a header in order: the library's differs from one file to the next."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            opened.seek(8)
            opened.write(text.ljust(length))


def _stored(tensor: Tensor) -> Tensor:
    return tensor.float().cpu().contiguous()


@dataclass(frozen=True)
class StoredLayer:
    """The moments of one layer on disk: small, since it travels to worker processes.

    Attributes:
        file: The file that holds them.
        name: The path of the layer.
        width: The length of its inputs.
        of_indices: Whether it is an embedding, whose moment is a vector of shares.
        nbytes: Bytes of the moment on disk.
    """

    file: Path
    name: str
    width: int
    of_indices: bool
    nbytes: int

    def read(self) -> Layer:
        """What is known of the layer; of the file no more is read.

        Returns:
            The layer.

        Raises:
            CheckpointError: If the file was changed, or is damaged.
        """
        tensors, metadata = _header(self.file)
        with _damage_named(self.file):
            row = {**json.loads(metadata["layers"])[self.name]}
            row.pop("curvature", None)  # not asked for where a layer is read alone
            return _layers(self.file, tensors, {self.name: row})[self.name]

    def sample(self) -> Tensor:
        """Some entries of the layer's weight, see :func:`sample`.

        Returns:
            At most 64 entries.

        Raises:
            CheckpointError: If the file was changed, or is damaged.
        """
        tensors, _ = _header(self.file)
        with _damage_named(self.file):
            return read_tensor(tensors[f"sample.{self.name}"])


def stored_layers(path: Path) -> dict[str, StoredLayer]:
    """The layers of a file of moments, from its header alone.

    Args:
        path: The file.

    Returns:
        Where the moments of each layer lie, by its path.

    Raises:
        CheckpointError: If it is no such file, of an earlier version, or damaged.
    """
    tensors, metadata = _header(path)
    with _damage_named(path):
        table = json.loads(metadata["layers"])
        return {name: _stored_layer(path, tensors, name, row) for name, row in table.items()}


def _stored_layer(
    path: Path, tensors: Mapping[str, TensorInfo], name: str, row: Mapping[str, Any]
) -> StoredLayer:
    """Where the moment of one row of the table lies."""
    key, is_sketch = str(row["moment"]), "loss" in row
    infos = [tensors[f"{key}.{part}"] for part in PARTS] if is_sketch else [tensors[key]]
    shape = infos[-1].shape
    nbytes = sum(info.nbytes for info in infos)
    return StoredLayer(path, name, shape[0], len(shape) == 1 and not is_sketch, nbytes)


def is_of_tuned(path: Path) -> bool | None:
    """Whether a file of moments is of a fine-tune's inputs.

    Args:
        path: The file.

    Returns:
        None if the file does not say.

    Raises:
        CheckpointError: If it is no such file, or of an earlier version.
    """
    _, metadata = _header(path)
    return _of_tuned(metadata)


def _of_tuned(metadata: Mapping[str, str]) -> bool | None:
    return {TUNED: True, BASE: False}.get(metadata.get("model", ""))


def read_moments(path: Path) -> tuple[dict[str, Layer], bool | None]:
    """Read a file of moments.

    Args:
        path: The file.

    Returns:
        What is known of each layer, by its path; and whether it is of a fine-tune's inputs, None if
        the file does not say.

    Raises:
        CheckpointError: If it is no such file, of an earlier version, or damaged.
    """
    tensors, metadata = _header(path)
    with _damage_named(path):
        return _layers(path, tensors, json.loads(metadata["layers"])), _of_tuned(metadata)


def _header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The header of a file of moments of this version."""
    tensors, metadata = read_header(path)
    written = metadata.get("format", "")
    if written != FORMAT:
        why = "moments of another version" if written.startswith(EARLIER) else "no moments"
        raise CheckpointError(
            f"{path}: {why}; collect them again with `bulkedge moments MODEL TEXTS -o FILE`"
        )
    return tensors, metadata


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Errors of what is not as it was written, as one that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (
        KeyError, ValueError, TypeError, AttributeError, RecursionError, OverflowError, IndexError,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"{path}: damaged moments ({type(error).__name__}: {error}); collect them again"
        ) from None


def _layers(
    path: Path, tensors: Mapping[str, TensorInfo], table: Mapping[str, Any]
) -> dict[str, Layer]:
    """The layers of a table; anything may be in it."""
    found: dict[str, Layer] = {}
    moments: dict[str, Moment] = {}
    for name, row in table.items():
        key, count, output = str(row["moment"]), int(row["count"]), float(row["output"])
        if key not in moments:
            moments[key] = _read(tensors, key, row)
            _check(path, name, moments[key])
        if count < 1 or not 0 <= output < math.inf:
            raise ValueError(f"layer {name!r}: {count} inputs, output {output}")
        sample = read_tensor(tensors[f"sample.{name}"])
        curvature = _curvature(path, name, tensors, row)
        its = tensors.get(f"tuned.{name}")
        tuned = None if its is None else read_tensor(its)
        found[name] = Layer(moments[key], count, sample, output, *curvature, tuned)
    return found


def _curvature(
    path: Path, name: str, tensors: Mapping[str, TensorInfo], row: Mapping[str, Any]
) -> tuple[Moment | None, int]:
    """The curvature of a layer, and of how many gradients it is."""
    if "curvature" not in row:
        return None, 0
    of = row["curvature"]
    found, count = _read(tensors, str(of["moment"]), of), int(of["count"])
    _check(path, name, found)
    if count < 1:
        raise ValueError(f"layer {name!r}: {count} gradients")
    return found, count


def _read(tensors: Mapping[str, TensorInfo], key: str, row: Mapping[str, Any]) -> Moment:
    """A moment in the form that it was stored in, in float64."""
    if "loss" not in row:
        return exact(read_tensor(tensors[key]))
    vectors, values, rest = (exact(read_tensor(tensors[f"{key}.{part}"])) for part in PARTS)
    return Sketch(vectors, values, rest, float(row["loss"]))


def _check(path: Path, name: str, moment: Moment) -> None:
    """Raise unless a moment can be one."""
    good = _is_sketch(moment) if isinstance(moment, Sketch) else _is_moment(moment)
    if not good or not width(moment) or not bool((diagonal(moment) >= 0).all()):
        raise CheckpointError(
            f"{path}: layer {name!r}: not a second moment of inputs; collect them again"
        )


def _is_moment(moment: Tensor) -> bool:
    """Whether it is a finite vector or symmetric matrix."""
    if not bool(moment.isfinite().all()) or moment.ndim not in (1, 2):
        return False
    if moment.ndim == 1:
        return True
    if moment.shape[0] != moment.shape[1] or not moment.numel():
        return False
    low, high = moment.aminmax()
    slack = 1e-6 * max(float(high), -float(low))
    # some rows at a time: a comparison takes several times their memory
    pairs = zip(moment.split(ROWS), moment.split(ROWS, dim=1), strict=True)
    return all(torch.allclose(a, b.mT, rtol=1e-3, atol=slack) for a, b in pairs)


def _is_sketch(moment: Sketch) -> bool:
    """Whether its vectors are orthonormal, and what belongs to them is not negative."""
    V, values, rest = moment.vectors, moment.values, moment.rest
    if (V.ndim, values.ndim, rest.ndim) != (2, 1, 1) or V.shape != (len(rest), len(values)):
        return False
    unit = torch.eye(len(values), dtype=V.dtype)
    signs = bool((values >= 0).all()) and bool((rest >= 0).all())  # of NaN neither
    finite = bool(values.isfinite().all()) and bool(rest.isfinite().all())
    return signs and finite and 0 <= moment.loss <= 1 and torch.allclose(V.mT @ V, unit, atol=1e-4)
