"""What can be watched while it trains, and which matrices of a model are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, Union

from torch import Tensor, nn

from bulkedge._errors import InputError
from bulkedge._linmap import LinearMap

from ._held import held_matrices
from ._select import members, select


class Watched(Protocol):
    """A matrix that a monitor checks: :class:`AdaptedMatrix`, :class:`FullMatrix`, or your own."""

    @property
    def name(self) -> str:
        """The name of the module or parameter."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        ...

    @property
    def strengths(self) -> Tensor:
        """The leading singular values of the update, descending."""
        ...

    def base_map(self) -> LinearMap:
        """The base W0 as a map."""
        ...

    def tuned_map(self) -> LinearMap:
        """The present weight W as a map."""
        ...


Model = Union[nn.Module, Sequence[Watched]]  # noqa: UP007 — Python 3.10
"""A model that PEFT has wrapped, or matrices to be watched."""


def watched_matrices(
    model: Model,
    adapter: str | None,
    include: str | Sequence[str],
    exclude: str | Sequence[str],
    full: bool | None = None,
    base: Mapping[str, Tensor] | None = None,
) -> list[Watched]:
    """The matrices that are watched, each with a name of its own.

    Args:
        model: A model that PEFT has wrapped, or matrices, which are filtered.
        adapter: Which adapter; the active one if None.
        include: Patterns of names.
        exclude: Patterns of the names of those that are left out.
        full: Whether weights that are trained in full are watched, too; if None, they are in a
            model without adapters.
        base: The weights before training by name, or None.

    Returns:
        At least one.
    """
    if isinstance(model, nn.Module):
        return list(
            held_matrices(
                model,
                adapter=adapter,
                include=include,
                exclude=exclude,
                full=full,
                base=base,
                watched=True,
            )
        )
    found = select(members(model, "tuned_map"), lambda x: x.name, include, exclude)
    _require_names([matrix.name for matrix in found])
    return found


def _require_names(names: Sequence[str]) -> None:
    """InputError unless there are matrices to watch, each with a name of its own."""
    if not names or len(set(names)) < len(names):
        twice = [name for name in names if names.count(name) > 1]
        got = f"two named {twice[0]}" if twice else "none"
        raise InputError(f"expected matrices to watch, each with a name of its own, got {got}")
