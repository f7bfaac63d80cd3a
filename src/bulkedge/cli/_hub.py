"""Models of the Hugging Face hub: the option ``--download``, the only way to the network."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from bulkedge._errors import CheckpointError, install, printable

Command = TypeVar("Command", bound=Callable[..., None])

download_option = click.option(
    "--download",
    is_flag=True,
    help="Fetch a model that is named by its id, org/name[@revision], from the hub.",
)
"""The option of a command that reads models."""


def fetch(paths: Iterable[Path | None], *, quiet: bool = False) -> None:
    """Fetch from the hub what is named by an id: weights, indexes and configurations alone.

    Args:
        paths: What the user gave; what lies on the disk is left alone.
        quiet: Show no progress.

    Raises:
        CheckpointError: If a model cannot be fetched.
    """
    from bulkedge.checkpoint.hub import hub_id

    for path in paths:
        if path is not None and (named := hub_id(path)) is not None:
            _fetch(*named, quiet=quiet)


def _fetch(repo: str, revision: str | None, *, quiet: bool) -> None:
    """Fetch one model into the hub's cache."""
    from bulkedge.checkpoint.hub import WANTED

    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise CheckpointError(f"{repo}: to fetch models of the hub: {install('hub')}") from None
    if not quiet:
        click.echo(f"fetching {printable(repo)} from the hub", err=True)
    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
    try:
        snapshot_download(repo, revision=revision, allow_patterns=list(WANTED))
    except Exception as error:  # whatever the client, the server or the network comes to
        raise CheckpointError(f"{repo}: {_why_not(error, revision)}") from None


def _why_not(error: Exception, revision: str | None) -> str:
    """What is wrong, in one line; some of the client's messages have ten."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "gated: accept its terms on the hub, then log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "not on the hub, or private; check the id, or log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no revision {revision!r} on the hub; check what follows the @"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: unset it, or fetch the model elsewhere"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return f"the hub at {constants.ENDPOINT} cannot be reached; try again when it can"
    first = str(error).strip().partition("\n")[0] or "no reason given"
    return f"cannot be fetched ({type(error).__name__}: {first:.200}); try again"


def fetch_if_asked(paths: Iterable[Path], options: dict[str, Any]) -> None:
    """Fetch from the hub what is named by an id, if ``--download`` was given."""
    if options["download"]:
        fetch(paths, quiet=options.get("quiet", False))


def base_of(adapter: Path, options: dict[str, Any]) -> Path:
    """The base that an adapter names, on the disk or in the hub's cache.

    Args:
        adapter: What the user gave alone.
        options: Of the command.

    Returns:
        The base's file or folder, or its id.

    Raises:
        click.UsageError: If what the user gave is no adapter.
        CheckpointError: If the base is not known, or not there.
    """
    from bulkedge.checkpoint import Adapter, open_path
    from bulkedge.checkpoint.hub import hub_id, located

    opened = open_path(adapter)
    if not isinstance(opened, Adapter):
        raise click.UsageError(f"Missing argument 'TUNED': {adapter} is a full model, no adapter")
    whole = f"bulkedge audit BASE {shlex.quote(str(adapter))}"
    named, revision = opened.config.base_model_name_or_path, opened.config.revision
    if not isinstance(named, str) or not named.strip():
        raise CheckpointError(f"{adapter}: does not say which base it was trained on; give {whole}")
    known = isinstance(revision, str) and revision and hub_id(named) is not None
    base = Path(f"{named}@{revision}" if known else named)
    fetch_if_asked((base,), options)
    try:
        found = Path(located(base))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or give the base itself: {whole}") from None
    if not found.exists():
        raise CheckpointError(
            f"{adapter}: was trained on {named!r:.200}, which is not on this disk; give {whole}"
        )
    if not options["quiet"]:
        click.echo(f"against {printable(str(base))}, which the adapter names as its base", err=True)
    return base
