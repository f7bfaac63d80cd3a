"""The audit: plan, compute, record."""

from __future__ import annotations

import datetime
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bulkedge import __version__
from bulkedge._errors import CheckpointError, InputError
from bulkedge.checkpoint import Adapter, Checkpoint

from .plan import Comparison, Plan, make_plan
from .recipe import Recipe, make_recipe, read_recipe
from .record import File, Inputs, Matrix, Record, Run, Skipped, Source, Summary, Tool, summarise

__all__ = [
    "Comparison",
    "Matrix",
    "Plan",
    "Recipe",
    "Record",
    "Skipped",
    "Summary",
    "audit",
    "check_device",
    "make_plan",
    "make_recipe",
    "read_recipe",
    "run_plan",
]

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what was finished, how many so far, how many in all)``."""


def audit(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    recipe: Recipe | Mapping[str, Any] | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Record:
    """Find the intruder dimensions that a fine-tune wrote into a model.

    For each weight matrix, the ``top_k`` leading singular vectors of the tuned matrix are compared
    with all singular vectors of the base: ``score = max_i |⟨y, u_i⟩|``.  Tensors are read from the
    files one matrix at a time; no model is built, nothing is unpickled, no network is used.

    Args:
        base: A ``.safetensors`` file, a model folder, or a sharded one.
        tuned: The same, or a PEFT LoRA adapter folder.
        recipe: What to measure, a ``Recipe`` or its fields; ``Recipe()`` if None.
        jobs: Worker processes of one thread each.  With more than one, a script needs the usual
            ``if __name__ == "__main__":`` guard.
        progress: Called after each matrix.

    Returns:
        The record: one row a matrix, one a direction, and every tensor that was skipped and why.

    Raises:
        CheckpointError: If an input cannot be read or does not fit the other.
        AdapterError: The same, for an adapter.
        NothingAuditedError: If the two have no matrix to compare.
        RecipeError: If the recipe has an unknown field, a bad value, or an idle glob.
        InputError: If ``jobs`` or the device is not to be had.
        BulkedgeError: If a worker process died.

    References:
        Shuttleworth et al., arXiv:2410.21228.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> W0 = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
        >>> update = 50 * torch.eye(32)[:, :1] @ torch.eye(32)[:1]
        >>> save_file({"layer.weight": W0}, folder / "base.safetensors")
        >>> save_file({"layer.weight": W0 + update}, folder / "tuned.safetensors")
        >>> audit(folder / "base.safetensors", folder / "tuned.safetensors").summary.intruders
        1
    """
    settled = recipe if isinstance(recipe, Recipe) else make_recipe(recipe or {})
    plan = make_plan(os.fspath(base), os.fspath(tuned), settled)
    return run_plan(plan, settled, jobs=jobs, progress=progress)


def run_plan(
    plan: Plan, recipe: Recipe, *, jobs: int = 1, progress: Progress | None = None
) -> Record:
    """Compute every row of a plan.

    Args:
        plan: From :func:`make_plan`.
        recipe: The recipe that the plan was made for.
        jobs: See :func:`audit`.
        progress: See :func:`audit`.

    Returns:
        The record.

    Raises:
        InputError: If ``jobs`` or the device is not to be had.
        CheckpointError: If a file changed during the audit.
    """
    import torch

    from .engine import compute_rows

    if jobs < 1:
        raise InputError(f"expected jobs ≥ 1, got {jobs}")
    check_device(recipe.device)
    started, clock = datetime.datetime.now(datetime.timezone.utc), time.perf_counter()
    files = [*plan.base.files, *plan.tuned.files]
    before = _stamps(files)
    inputs = Inputs(base=_source(plan.base), tuned=_source(plan.tuned))
    rows: dict[int, Matrix] = {}
    for position, row in compute_rows(plan.comparisons, recipe, jobs):
        rows[position] = row
        if progress is not None:
            progress(row.name, len(rows), len(plan.comparisons))
    if _stamps(files) != before:
        raise CheckpointError("an input file was changed during the audit; start again")
    matrices = [rows[position] for position in sorted(rows)]
    skipped = list(plan.skipped)
    return Record(
        tool=Tool(version=__version__, torch=torch.__version__),
        inputs=inputs,
        recipe=recipe,
        summary=summarise(matrices, skipped),
        skipped=skipped,
        matrices=matrices,
        run=Run(
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.perf_counter() - clock, 3),
            jobs=jobs,
        ),
    )


def check_device(device: str) -> None:
    """Raise unless torch can compute on ``device``.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: If it is not there.
    """
    if device.startswith("cuda"):
        import torch

        index = int(device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise InputError(
                f"device {device!r}: torch {torch.__version__} sees {torch.cuda.device_count()} "
                "CUDA devices; use device 'cpu'"
            )


def _source(opened: Checkpoint | Adapter) -> Source:
    """An input with the digests of its files."""
    rows = [
        File(name=_text(file.name), sha256=_sha256(file), bytes=file.stat().st_size)
        for file in opened.files
    ]
    return Source.model_validate({"path": _text(opened.path), "kind": opened.kind, "files": rows})


def _text(path: str | Path) -> str:
    """A path for JSON, which cannot hold bytes that are no text."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _sha256(path: Path) -> str:
    """Digest of a file, read in pieces."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _stamps(files: Iterable[Path]) -> list[tuple[int, int]]:
    """Size and time of last change of each file, none of one that is gone."""
    found = (file.stat() for file in files if file.exists())
    return [(status.st_size, status.st_mtime_ns) for status in found]
