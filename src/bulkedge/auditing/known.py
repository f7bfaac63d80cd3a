"""What is known of the matrices of a base, for several fine-tunes of it, in memory and on disk.

In memory the base matrix that was asked for last is kept, with its SVD and its bulk: the matrices
of all fine-tunes are taken base matrix by base matrix.  The folder holds singular values, and the
SVDs of matrices that are small enough.  Each is a file named by a digest of everything that it
depends on, the content of the base's files included: a changed base has other names.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bulkedge._errors import CheckpointError, OutputError
from bulkedge.checkpoint import StoredMatrix, read_header, read_tensor
from bulkedge.comparison import Comparison
from bulkedge.intruder import Remember

from .inputs import plain
from .journal import digest

VECTORS_UP_TO = 512
"""Singular vectors are kept on disk up to this length of the shorter side: they take twice the
space of the matrix in float64."""

STORED = ("svd", "eigen", "values")
"""What is kept on disk."""

CHECKSUM = "sha256"
"""The entry of a file's metadata that its tensors must fit; what does not is computed again."""


@dataclass
class KnownBases:
    """What is known of base matrices.

    Attributes:
        folder: Where it is kept on disk; None to keep it in memory alone.
        digests: SHA-256 of the base's files by their paths; needed for a folder.

    Raises:
        OutputError: If the folder cannot be made or written to.
    """

    folder: Path | None = None
    digests: Mapping[Path, str] = field(default_factory=dict)
    _base: StoredMatrix | None = field(default=None, init=False, repr=False)
    _known: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(self.folder, os.W_OK)
        except OSError as error:
            why = f"cannot be made ({error.strerror})"
            raise OutputError(f"{self.folder}: {why}; give another folder") from None
        if not writable:
            raise OutputError(f"{self.folder}: is not writable; give another folder")

    def of(self, comparison: Comparison, device: torch.device) -> Remember:
        """Where what is computed of the base of a comparison is kept.

        Args:
            comparison: What is compared.
            device: Where it is computed.

        Returns:
            A function that computes what is not known yet.
        """
        if self._base != comparison.base:
            self._base, self._known = comparison.base, {}

        def remember(what: str, compute: Callable[[], Any]) -> Any:
            if what not in self._known:
                self._known[what] = self._stored(what, comparison.base, device, compute)
            return self._known[what]

        return remember

    def _stored(
        self, what: str, base: StoredMatrix, device: torch.device, compute: Callable[[], Any]
    ) -> Any:
        """What the folder has, else what is computed, which it then has."""
        if self.folder is None or what not in STORED:
            return compute()
        if what != "values" and min(base.acts_as) > VECTORS_UP_TO:
            return compute()
        file = self.folder / f"{self._key(what, base, device)}.safetensors"
        shapes = _shapes(what, base, device)
        found = _read(file, shapes)
        if found is None:
            computed = compute()
            tensors = computed if isinstance(computed, tuple) else (computed,)
            _write(file, dict(zip(shapes, tensors, strict=True)))
            return computed
        return found[0] if what == "values" else tuple(tensor.to(device) for tensor in found)

    def _key(self, what: str, base: StoredMatrix, device: torch.device) -> str:
        """A digest of what the numbers depend on."""
        content = {
            "what": what,
            "torch": torch.__version__,
            "device": str(device),
            "base": plain(base, self.digests),
        }
        return digest(content)


def _shapes(what: str, base: StoredMatrix, device: torch.device) -> dict[str, tuple[int, ...]]:
    """The tensors of what is kept, in order, with the shapes that they must have."""
    (rows, columns), p = base.acts_as, min(base.acts_as)
    if what == "eigen":
        shapes = {"values": (p,), "inner": (p, p)}
        if device.type == "cpu":
            shapes |= {"reflectors": (p - 1, p - 1), "factors": (p - 1,)}
        return shapes
    if what == "svd":
        return {"U": (rows, p), "S": (p,), "V": (columns, p)}
    return {"S": (p,)}


def _read(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[torch.Tensor, ...] | None:
    """The tensors of a file in order; None where it is missing, damaged, or of something else."""
    if not os.path.lexists(file):
        return None
    try:
        infos, metadata = read_header(file)[:2]
        if {name: info.shape for name, info in infos.items()} != shapes:
            return None
        found = {name: read_tensor(info) for name, info in infos.items()}
    except CheckpointError:
        return None
    if (metadata or {}).get(CHECKSUM) != _checksum(found):
        return None
    if not all(t.dtype is torch.float64 and bool(t.isfinite().all()) for t in found.values()):
        return None
    return tuple(found[name] for name in shapes)


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the bytes of all tensors, in the order of their names."""
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        hashed.update(name.encode() + b"\0")
        hashed.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def _write(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a file whole, or not at all where that fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    building = None
    try:
        descriptor, building = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}.")
        os.close(descriptor)
        save_file(values, building, {CHECKSUM: _checksum(values)})
        os.replace(building, file)
    except (OSError, SafetensorError):  # a full disk: the next audit computes it again
        if building is not None:
            Path(building).unlink(missing_ok=True)
