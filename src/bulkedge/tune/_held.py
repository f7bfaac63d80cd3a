"""Which matrices of a model are held or watched: those with adapters, those trained in full."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

from torch import Tensor, nn

from bulkedge._errors import InputError
from bulkedge._fields import FLAG, check_values, optional

from ._factored import factored_candidates
from ._full import PARAMETRIZED, FullMatrix, full_matrix, is_adapter, trained_weights
from ._layers import Adapted, candidates, nothing_adapted, require_distinct
from ._matrix import AdaptedMatrix
from ._select import members, select

Held = Union[AdaptedMatrix, FullMatrix]  # noqa: UP007 — Python 3.10
"""An adapted matrix, or a weight that is trained in full."""
SHOWN = 3
"""How many names a note lists."""


def held_matrices(
    model: Adapted,
    *,
    adapter: str | None = None,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    full: bool | None = None,
    base: Mapping[str, Tensor] | None = None,
    watched: bool = False,
) -> list[Any]:
    """The matrices of a model that are trained, or those of a sequence.

    Args:
        model: A model, or matrices, which are filtered.
        adapter: Which adapter; all active ones together if None.
        include: Patterns of names.
        exclude: Patterns of the names of those that are left out.
        full: Whether weights that are trained in full belong to them; if None, they do in a model
            without adapters, and beside adapters one note names them.
        base: The weights before training by name, for weights that have been trained already.
        watched: Whether they are to be watched alone: then spectral adapters belong to them.

    Returns:
        At least one, each with a name of its own.

    Raises:
        InputError: If there is none, or two have one name.
        RecipeError: If a pattern matches none.
    """
    check_values("full_matrices", full=(full, optional(FLAG)))
    if not isinstance(model, nn.Module):
        given = members(model, "write", "subtract")
        found = select(given, lambda matrix: matrix.name, include, exclude)
    else:
        known = _candidates(model, adapter, full, base, watched)
        chosen = select(known, lambda named: named[0], include, exclude)
        found = [make() for _, make in chosen]
    if not found:
        problem = nothing_adapted(model, include, adapter)
        raise problem
    require_distinct([matrix.name for matrix in found])
    return found


def require_form(owner: Any, matrices: Sequence[Held]) -> None:
    """InputError unless a holder, or a penalty, takes matrices of these forms.

    Args:
        owner: The holder, with the forms that it ``takes``.
        matrices: What it is to hold.

    Raises:
        InputError: If it does not.
    """
    for matrix in matrices:
        form = getattr(matrix, "form", None)
        if form is not None and form not in owner.takes:
            raise InputError(
                f"{matrix.name}: expected W0 + s·B·A of one adapter, which "
                f"{type(owner).__name__} needs, got {form}; leave it out with exclude=, or "
                "hold it with SpikeClip"
            )


def _candidates(
    model: nn.Module,
    adapter: str | None,
    full: bool | None,
    base: Mapping[str, Tensor] | None,
    watched: bool,
) -> list[tuple[str, Callable[[], Any]]]:
    """What may be chosen, by name; nothing is measured or copied yet."""
    found: list[tuple[str, Callable[[], Any]]] = list(candidates(model, adapter, watched=watched))
    if watched:
        found += factored_candidates(model, adapter)
    has_adapters = bool(found) or any(is_adapter(module) for module in model.modules())
    known = trained_weights(model, embeddings=True)
    names = [name for name in known if not PARAMETRIZED.search(name)]
    if full or (full is None and not has_adapters and adapter is None):
        return found + [(name, _make(model, name, base)) for name in names]
    if full is None and found and names:
        _note_beside(names, "watched" if watched else "held")
    return found


def _make(
    model: nn.Module, name: str, base: Mapping[str, Tensor] | None
) -> Callable[[], FullMatrix]:
    return lambda: full_matrix(model, name, base)


def _note_beside(names: Sequence[str], verb: str) -> None:
    """One note on weights that are trained in full beside adapters, such as a new head."""
    listed = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" * bool(names[SHOWN:]))
    what = "1 weight is" if len(names) == 1 else f"{len(names)} weights are"
    warnings.warn(
        f"{what} trained in full beside the adapters and not {verb}: {listed}; a new head needs "
        "no limit, full=True includes all",
        stacklevel=5,
    )
