"""Models of the Hugging Face hub: the option ``--download``, the only way to the network."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import click

from bulkedge._errors import CheckpointError, printable

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
    from bulkedge.checkpoint.hub import EXTRA, WANTED

    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise CheckpointError(f"{repo}: to fetch models of the hub: {EXTRA}") from None
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
        return "no such model on the hub, or a private one; check the id, or log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no revision {revision!r} on the hub; check what follows the @"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so nothing is fetched; unset it, or fetch the model elsewhere"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return f"the hub at {constants.ENDPOINT} cannot be reached; try again when it can"
    first = str(error).strip().partition("\n")[0] or "no reason given"
    return f"cannot be fetched ({type(error).__name__}: {first:.200}); try again"
