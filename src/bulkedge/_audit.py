"""The audit of one fine-tune, from files to a record."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bulkedge._fields import as_path
from bulkedge.auditing import Engine, Notice, Progress, Shard, run_plan
from bulkedge.comparison import Plan, make_plan, with_moments
from bulkedge.moments import Moments
from bulkedge.records import Recipe, Record, make_recipe, takes_recipe

IN_MEMORY = "moments.safetensors"
"""What a record calls the file of moments that were in memory."""


@takes_recipe
def audit(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    recipe: Recipe | Mapping[str, Any] | None = None,
    moments: Moments | str | os.PathLike[str] | None = None,
    jobs: int = 1,
    engine: Engine | None = None,
    shard: Shard | None = None,
    journal: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> Record:
    """Find the intruder dimensions that a fine-tune wrote into a model.

    For each weight matrix, the ``top_k`` leading singular vectors of the tuned matrix are compared
    with all singular vectors of the base: ``score = max_i |⟨y, u_i⟩|``.  Tensors are read from the
    files one matrix at a time; no model is built, nothing is unpickled, no network is used.

    Args:
        base: A ``.safetensors`` file, a model folder, or a sharded one.
        tuned: The same, or a PEFT LoRA adapter folder.
        recipe: What to measure, a ``Recipe`` or its fields; ``Recipe()`` if None.
        moments: Second moments of the base's inputs, or their file: the record then says how far
            the update moves the outputs on such inputs, ``drift = tr(ΔW C ΔWᵀ)/tr(W0 C W0ᵀ)``.
            Moments in memory are written to a temporary file for the workers, which the record
            calls ``moments.safetensors``.
        jobs: Worker processes of one thread each.  With more than one, a script needs the usual
            ``if __name__ == "__main__":`` guard.
        engine: Where to compute; ``LocalEngine(jobs)`` if None.  On processors of one kind the
            record is the same but for ``run``; see docs/audit.md for others.
        shard: The part to compute; see :func:`merge_shards`.
        journal: A file that each row is added to as soon as it is finished.
        resume: Whether to take the rows that are in the journal, if they were computed from the
            same files by the same recipe and versions; else a new journal takes its place.
        progress: Called after each matrix.
        notice: Called with what was found in the journal.

    Returns:
        The record: one row per matrix, one per direction, and every skipped tensor with the reason.

    Raises:
        CheckpointError: If an input cannot be read or does not fit the other.
        AdapterError: The same, for an adapter.
        NothingAuditedError: If the two have no matrix to compare.
        RecipeError: If the recipe has an unknown field, a bad value, or an idle glob.
        InputError: If ``jobs`` or the device is not to be had, or the moments are of none of the
            base's weights.
        OutputError: If the journal cannot be written.
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
        >>> audit(folder / "base.safetensors", folder / "tuned.safetensors").summary.new_directions
        1
    """
    settled = recipe if isinstance(recipe, Recipe) else make_recipe(recipe or {})
    plan = make_plan(as_path("base", base), as_path("tuned", tuned), settled)
    with _measured(plan, moments) as measured:
        record = run_plan(
            measured,
            settled,
            engine=engine,
            jobs=jobs,
            shard=shard,
            journal=journal,
            resume=resume,
            progress=progress,
            notice=notice,
        )
    if not isinstance(moments, Moments) or record.inputs.moments is None:
        return record
    named = record.inputs.moments.model_copy(update={"path": IN_MEMORY})
    return record.model_copy(update={"inputs": record.inputs.model_copy(update={"moments": named})})


@contextmanager
def _measured(plan: Plan, moments: Moments | str | os.PathLike[str] | None) -> Iterator[Plan]:
    """A plan with moments, in a file while it is needed."""
    if not isinstance(moments, Moments):
        yield plan if moments is None else with_moments(plan, moments)
        return
    with tempfile.TemporaryDirectory(prefix="bulkedge-") as folder:
        file = Path(folder) / IN_MEMORY
        moments.save(file)
        yield with_moments(plan, file)
