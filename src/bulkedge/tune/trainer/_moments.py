"""Moments as a callback is given them: in memory, or as the file to be read when a run begins."""

from __future__ import annotations

import os
from typing import Union

from bulkedge._errors import InputError
from bulkedge.moments import Moments

MomentsOrPath = Union[Moments, str, "os.PathLike[str]"]
"""Moments, or the file in which they are."""


def check_moments(given: object, *, is_needed: bool) -> None:
    """Check that these are moments or the path of a file.

    Args:
        given: What a callback is given.
        is_needed: Whether None is refused, too.

    Raises:
        InputError: If they are not.
    """
    if (given is not None or is_needed) and not isinstance(given, (Moments, str, os.PathLike)):
        raise InputError(
            f"expected moments= to be Moments or their file, got {given!r:.60}; make some with "
            "`bulkedge moments`"
        )


def read_moments(given: MomentsOrPath) -> Moments:
    """The moments, read if it is a file.

    Args:
        given: Moments, or their file.

    Returns:
        The moments.
    """
    return given if isinstance(given, Moments) else Moments.load(given)


def saved_path(given: MomentsOrPath | None) -> str | None:
    """The file of moments as JSON can hold it; None for moments in memory."""
    return None if given is None or isinstance(given, Moments) else os.fspath(given)
