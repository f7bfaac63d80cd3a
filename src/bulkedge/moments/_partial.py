"""Sums on disk while a long collection runs, so that a stopped one can resume."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from bulkedge import __version__
from bulkedge._errors import CheckpointError, InputError, OutputError
from bulkedge.checkpoint import read_header
from bulkedge.checkpoint.elements import read_tensor
from bulkedge.checkpoint.write import umask

from ._collect import Collector
from ._layer import sample

FORMAT = "bulkedge partial moments 2"
CURVATURE = "curvature."
"""How the names of sums over gradients begin."""
EVERY = 60.0
"""Seconds between two writes, at least."""
SHARE = 20.0
"""And so many times as long as the last write took."""


class Partial:
    """What a collection has summed up so far, in a file beside its output.

    It is written after a batch, at most once a minute and a twentieth of the time, and where the
    run is interrupted.

    Args:
        path: The file; None for no file.
        digest: From :func:`digest_of`.
        collector: Whose sums they are.

    Attributes:
        batches: Number of batches that the sums are of.

    Raises:
        InputError: If the file is of other texts, another model or other settings.
        CheckpointError: If it is damaged.
    """

    def __init__(self, path: Path | None, digest: str, collector: Collector) -> None:
        self.path, self.digest, self.collector = path, digest, collector
        self.batches, self._wait, self._last = 0, EVERY, time.monotonic()
        if path is not None and path.exists():
            self._read(path)
        self._before = self.batches - collector.counted

    def _read(self, path: Path) -> None:
        """Take up the sums of a file."""
        tensors, metadata = read_header(path)
        if metadata.get("format") != FORMAT or metadata.get("digest") != self.digest:
            raise InputError(
                f"{path}: was collected on other texts, with another model or other settings; "
                "remove it to start again, or repeat that command to finish it"
            )
        try:
            table, gradients, powers = (
                json.loads(metadata[key]) for key in ("layers", "gradients", "powers")
            )
            sums = {key: read_tensor(info) for key, info in tensors.items()}
            self.collector.go_on_from(
                {name: (sums[row["sum"]], int(row["count"])) for name, row in table.items()}
            )
            self.collector.curvatures.go_on_from(
                {n: (sums[f"{CURVATURE}{n}"], int(count)) for n, count in gradients.items()}
            )
            self.collector.powers.sums = {n: float(power) for n, power in powers.items()}
            self.batches = int(metadata["batches"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: damaged ({error}); remove it to start anew") from None

    def keep(self, *, now: bool = False) -> None:
        """Write the sums, if it is time to.

        Args:
            now: Whether to write them in any case; sums that are being added to are not.

        Raises:
            OutputError: If they cannot be written.
        """
        started = time.monotonic()
        due = now or started - self._last >= self._wait
        if self.path is None or not due or not self.collector.whole or not self.collector.sums:
            return
        self.batches = self._before + self.collector.counted
        self._write(self.path)
        self._last = time.monotonic()
        self._wait = max(EVERY, SHARE * (self._last - started))

    def _write(self, path: Path) -> None:
        """The file, whole or not at all."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        names: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        table: dict[str, dict[str, Any]] = {}
        for name, (total, count) in self.collector.sums.items():
            key = names.setdefault(id(total), f"sum.{len(names)}")
            tensors[key] = total.cpu().contiguous()
            table[name] = {"sum": key, "count": count}
        curvatures = self.collector.curvatures.sums
        tensors |= {f"{CURVATURE}{n}": x.total.cpu().contiguous() for n, x in curvatures.items()}
        metadata = {
            "gradients": json.dumps({name: x.count for name, x in curvatures.items()}),
            "powers": json.dumps(self.collector.powers.sums),
            "format": FORMAT,
            "digest": self.digest,
            "batches": str(self.batches),
            "layers": json.dumps(table),
        }
        building = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, building, metadata)
            building.chmod(0o666 & ~umask())
            os.replace(building, path)
        except (OSError, ValueError, SafetensorError) as error:
            with suppress(OSError, ValueError):
                building.unlink(missing_ok=True)
            raise OutputError(f"{path}: cannot be written ({error})") from None


def digest_of(
    weights: Mapping[str, Tensor], tokens: Sequence[Sequence[int]], settings: Mapping[str, Any]
) -> str:
    """A digest of everything that sums depend on.

    Args:
        weights: Of the model as it is run; of each some entries count.
        tokens: What it is run on.
        settings: Everything else, as JSON would have it.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> digest_of({}, [[1]], {}) == digest_of({}, [[2]], {})
        False
    """
    found = hashlib.sha256(json.dumps([__version__, settings], sort_keys=True).encode())
    found.update(json.dumps([list(ids) for ids in tokens]).encode())
    for name, weight in weights.items():
        found.update(f"{name} {tuple(weight.shape)}".encode())
        found.update(sample(weight).numpy().tobytes())
    return found.hexdigest()
