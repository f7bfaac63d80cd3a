"""The threshold θ_c of each base: the strength beyond which a generic spike makes an outlier."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, TypeVar, Union

import torch

from bulkedge._errors import InputError, RecipeError, count
from bulkedge._fields import POSITIVE, as_real, check_values, number, one_of
from bulkedge._linmap import LinearMap
from bulkedge._precision import exact
from bulkedge.records.budget import BudgetRecord
from bulkedge.update import BaseSpectrum, budget, measure_base
from bulkedge.update._products import by_products

from ._select import names_of

EXACT_UP_TO = 1024
"""The shorter side up to which all singular values of a base are computed."""

HIGHEST_LEVEL = 10.0
"""The largest level, in units of θ_c: from 1 on generic spikes make outliers, and far beyond that
nothing is held."""

LEADING = 10
"""How many leading directions the leading line is about: as many as an audit judges."""
SHOWN = 5
"""How many names a note lists."""

Thresholds = Union[Mapping[str, float], str, "os.PathLike[str]"]
"""Thresholds by name, or the file of a budget."""
Line = Literal["edge", "leading"]
"""The strength at which a generic spike makes an outlier of the base (θ_c), or at which its value
reaches the k-th of the base, and it enters the leading k (θ_k): at most that value."""
LINE = one_of("edge", "leading")
"""The rule for a line."""


class NoBulkError(InputError):
    """A base has no bulk, and so no threshold."""


class HasBase(Protocol):
    """Anything with a base and a name."""

    @property
    def name(self) -> str:
        """The name of the module."""
        ...

    def base_map(self) -> LinearMap:
        """W0."""
        ...


Based = TypeVar("Based", bound=HasBase)


def base_spectrum(name: str, base: LinearMap, stored: torch.dtype = torch.float32) -> BaseSpectrum:
    """The singular values of a base, and the bulk fitted to them.

    Cost: ``svdvals`` where the shorter side is at most 1024, 20 to 64 passes where it is longer.

    Args:
        name: For messages.
        base: W0, shape ``(m, n)``.
        stored: The dtype in which it is stored, whose rounding is no bulk.

    Returns:
        The spectrum.

    Raises:
        NoBulkError: If the base has no bulk.
        InputError: If it is not finite, or is not in memory.
    """
    _require_numbers(name, base)
    shape, known = base.shape, min(base.shape)
    with torch.no_grad():
        found = by_products(base, LEADING, 0) if known > EXACT_UP_TO else None
        if found is None:
            values = torch.linalg.svdvals(exact(base.to_dense())).cpu()
        else:
            values, known = found.values, found.exact
    spectrum, problem = measure_base(values, (shape[0], shape[1]), known, stored)
    if spectrum is None:
        raise NoBulkError(
            f"{name}: expected a base with a bulk, got none ({problem}); leave it out"
        )
    return spectrum


def _require_numbers(name: str, base: LinearMap) -> None:
    """InputError unless a base has finite entries, in memory."""
    if base.device.type == "meta":
        raise InputError(
            f"{name}: expected a base in memory, got one on the meta device; load the weights first"
        )
    if not math.isfinite(base.norm_bound()):
        raise InputError(
            f"{name}: expected a base with finite entries, got NaN or infinity; the weights that "
            "were loaded are damaged, or not loaded yet"
        )


def measure_thresholds(
    matrices: Sequence[HasBase],
    known: Thresholds | None = None,
    of: Line = "edge",
    *,
    in_pieces: bool = False,
) -> dict[str, float]:
    """The threshold of every matrix by its name; a matrix whose base has none is left out.

    Args:
        matrices: The matrices.
        known: Thresholds by name that are not measured again; each name is that of a matrix.  Or
            a file that ``bulkedge budget`` has written: what is in it is not measured again.
        of: Which line.
        in_pieces: Whether the lowest threshold of a matrix and of its pieces counts, where
            checkpoints may store it in pieces.

    Returns:
        ``{name: θ_c}``, or θ_k.

    Raises:
        InputError: If a known threshold is not positive and finite, or a base is not finite.
        RecipeError: If a known threshold has the name of no matrix.
    """
    given = _given(matrices, known, of)
    found = {}
    for matrix in matrices:
        theta = given.get(matrix.name)
        if theta is None:
            maps = [matrix.base_map(), *(getattr(matrix, "pieces", ()) if in_pieces else ())]
            found_in = [_lines(matrix, x)[of] for x in maps]
            # an update is no weaker than a piece of it, so that the lowest holds them all
            theta = min((x for x in found_in if x > 0), default=0.0)
        if theta > 0:  # a bulk that ends in a step has none: any spike makes an outlier of it
            found[matrix.name] = float(theta)
    return found


def measure_lines(
    matrices: Sequence[HasBase], known: Thresholds | None = None
) -> dict[Line, dict[str, float]]:
    """Both thresholds of every matrix by its name, from one look at each base.

    Args:
        matrices: The matrices.
        known: θ_c by name, or a file with both, as in :func:`measure_thresholds`.

    Returns:
        ``{name: θ}`` for each line; no θ_k of matrices whose θ_c alone is known.

    Raises:
        InputError: As :func:`measure_thresholds`.
        RecipeError: As :func:`measure_thresholds`.
    """
    given: dict[Line, dict[str, float]] = {"edge": _given(matrices, known, "edge"), "leading": {}}
    if isinstance(known, (str, os.PathLike)):
        given["leading"] = _given(matrices, known, "leading")
    for matrix in matrices:
        if matrix.name not in given["edge"]:
            for line, theta in _lines(matrix, matrix.base_map()).items():
                given[line][matrix.name] = theta
    return {
        line: {x: theta for x, theta in own.items() if theta > 0} for line, own in given.items()
    }


def _given(matrices: Sequence[HasBase], known: Thresholds | None, of: Line) -> dict[str, float]:
    """The thresholds that are known beforehand."""
    names = [matrix.name for matrix in matrices]
    if isinstance(known, (str, os.PathLike)):
        return _from_budget(known, names, of)
    given = known_thresholds(known)
    _require_matrices(given, names)
    return given


def _lines(matrix: HasBase, base: LinearMap) -> dict[Line, float]:
    """The strengths at which a spike of a matrix, or of a piece, reaches each line; 0 without."""
    try:
        stored = getattr(matrix, "stored_dtype", torch.float32)
        spectrum = base_spectrum(matrix.name, base, stored)
    except NoBulkError:
        return {"edge": 0.0, "leading": 0.0}
    limit = budget(spectrum, 1, top_k=LEADING)
    return {"edge": limit.threshold, "leading": limit.top_k_threshold}


def with_threshold(
    matrices: Sequence[Based], known: Thresholds | None = None, of: Line = "edge"
) -> tuple[list[Based], dict[str, float]]:
    """The matrices that can be held, and their thresholds; one note names those that cannot.

    Args:
        matrices: The matrices.
        known: Thresholds by name, as in :func:`measure_thresholds`.
        of: Which line.

    Returns:
        The matrices whose base has a threshold, and the thresholds by name.

    Raises:
        InputError: If none has; or as in :func:`measure_thresholds`.
    """
    found = measure_thresholds(matrices, known, of, in_pieces=True)
    kept = [matrix for matrix in matrices if matrix.name in found]
    note_without_bulk(matrices, kept)
    return kept, found


def note_without_bulk(matrices: Sequence[HasBase], kept: Sequence[HasBase]) -> None:
    """One note about the matrices that are left alone.

    Args:
        matrices: All.
        kept: Those whose base has a bulk.

    Raises:
        InputError: If none is kept.
    """
    names = {matrix.name for matrix in kept}
    left = [matrix.name for matrix in matrices if matrix.name not in names]
    listed = ", ".join(left[:SHOWN]) + (f" and {len(left) - SHOWN} more" if left[SHOWN:] else "")
    if not kept:
        raise InputError(
            f"expected a layer with a bulk, and so a threshold, got none of {len(left)}: {listed}; "
            "small or flat weights have none: adapt larger layers, or give thresholds="
        )
    if left:
        warnings.warn(
            f"left alone: {count(len(left), 'layer')} without a bulk that a spike could leave: "
            f"{listed}",
            stacklevel=4,
        )


def check_level(owner: object, level: float, name: str = "level") -> None:
    """InputError unless a level is positive, and not so high that nothing would be held.

    Args:
        owner: What it is given to: an object, or the name of a function.
        level: Where to hold spikes, in units of their threshold.
        name: What it is called there.
    """
    most = number(f"≤ {HIGHEST_LEVEL:g}", lambda x: x <= HIGHEST_LEVEL)
    check_values(owner, **{name: (level, POSITIVE)})
    check_values(owner, **{name: (level, most)})


def known_thresholds(known: object) -> dict[str, float]:
    """Thresholds that a caller or a saved state gives, by name.

    Args:
        known: ``{name: θ_c}``; None for none.

    Returns:
        The same as plain numbers.

    Raises:
        InputError: If it is no mapping, or a threshold is not positive and finite.
    """
    if known is not None and not isinstance(known, Mapping):
        raise InputError(
            f"expected thresholds by name, got {type(known).__name__}; give thresholds= a mapping "
            "such as {name: 1.5}, or leave it out"
        )
    given = dict(known or {})
    for name, theta in given.items():
        check_values("thresholds=", **{f"the threshold of {name}": (theta, POSITIVE)})
    return {name: as_real(theta) or 0.0 for name, theta in given.items()}


def saved_thresholds(given: Thresholds | None) -> dict[str, float] | str | None:
    """Thresholds, or the path of their file, as JSON can hold them.

    Args:
        given: What a callback is given.

    Returns:
        The same, checked.
    """
    if isinstance(given, (str, os.PathLike)):
        return os.fspath(given)
    return None if given is None else known_thresholds(given)


def _from_budget(path: str | os.PathLike[str], names: Sequence[str], of: Line) -> dict[str, float]:
    """The thresholds that a budget has of matrices of these names; 0 of one without a limit."""
    record = BudgetRecord.from_json(Path(path))
    if of == "leading" and record.settings.top_k != LEADING:
        raise InputError(
            f"{path}: expected a budget of the {LEADING} leading directions, got one of "
            f"{record.settings.top_k}; make it anew with --top-k {LEADING}"
        )
    rows = {row.name: row for row in record.matrices if row.status != "failed"}
    found = {}
    for name in names:
        row = rows.get(names_of(name)[1])
        if row is not None:
            found[name] = (row.threshold if of == "edge" else row.top_k_threshold) or 0.0
    if not found:
        raise InputError(
            f"{path}: expected a budget of the base that is trained, got one without any of "
            f"{count(len(names), 'layer')}, {names[0]} among them; make it with `bulkedge budget` "
            "of this base"
        )
    return found


def _require_matrices(known: Mapping[str, float], names: Sequence[str]) -> None:
    """RecipeError for a threshold that would be ignored: its name is misspelt, or left out."""
    if idle := [name for name in known if name not in names]:
        raise RecipeError(
            f"{idle[0]!r} in thresholds= is no matrix that is held or watched here, whose names "
            f"look like {max(names, key=len, default='')!r}; correct the name, or leave it out"
        )
