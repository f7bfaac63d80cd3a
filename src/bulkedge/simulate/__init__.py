"""Experiments with random matrices: predictions of theory for updates, and measurements.

Each experiment is a frozen set of settings.  ``run`` draws, measures and averages into a
:class:`Table`; ``draw`` makes its figure (with matplotlib, the extra ``[report]``).
Your own experiment is a subclass of :class:`Experiment`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from bulkedge._errors import InputError, RecipeError, settings_problems

from ._draw import to_svg
from ._experiment import Experiment, Progress
from ._table import Table
from .adapters import Adapters
from .full_vs_lora import FullVsLora
from .heavy_tailed import HeavyTailed
from .laws import Laws
from .rank import Rank
from .scaling import Scaling
from .sequential import Sequential
from .similarity import Similarity
from .transition import Transition
from .universality import Universality

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPERIMENTS: Mapping[str, type[Experiment]] = {
    experiment.name: experiment
    for experiment in (
        Laws,
        Transition,
        FullVsLora,
        Rank,
        Scaling,
        Adapters,
        Similarity,
        Sequential,
        Universality,
        HeavyTailed,
    )
}
"""Every experiment by its name."""

__all__ = [
    "EXPERIMENTS",
    "Adapters",
    "Experiment",
    "FullVsLora",
    "HeavyTailed",
    "Laws",
    "Progress",
    "Rank",
    "Scaling",
    "Sequential",
    "Similarity",
    "Table",
    "Transition",
    "Universality",
    "configure",
    "draw",
    "run",
    "to_svg",
]


def run(name: str, *, progress: Progress | None = None, **settings: Any) -> Table:
    """Run an experiment.

    Args:
        name: The name of the experiment.
        progress: Called after each repeat with the name, how many are done, and of how many.
        **settings: The settings that differ from the defaults.

    Returns:
        The table.

    Raises:
        InputError: If there is no such experiment.
        RecipeError: If a setting is unknown or bad.

    Example:
        >>> table = run("rank", size=60, ranks=[1, 16], norm=3.0, repeats=1)
        >>> table.where(spikes="equal").column("theory_outliers")
        [1, 0]
    """
    return configure(name, settings).run(progress)


def configure(name: str, settings: Mapping[str, Any], source: str = "settings") -> Experiment:
    """An experiment from plain values.

    Args:
        name: The name of the experiment.
        settings: The settings that differ from the defaults.
        source: Where the settings come from, for error messages.

    Returns:
        The experiment.

    Raises:
        InputError: If there is no such experiment.
        RecipeError: Naming every unknown field and every bad value at once.

    Example:
        >>> configure("transition", {"size": 100}).seed
        0
    """
    if name not in EXPERIMENTS:
        raise InputError(f"expected one of {', '.join(EXPERIMENTS)}; got {name!r}")
    kind = EXPERIMENTS[name]
    try:
        return kind.model_validate(dict(settings))
    except ValidationError as error:
        raise RecipeError(settings_problems(error, source, kind.model_fields)) from None


def draw(table: Table) -> Figure:
    """The figure of a table, new or read from a file; needs matplotlib.

    Args:
        table: The table of an experiment.

    Returns:
        The figure.

    Raises:
        InputError: If the experiment is unknown.
        MissingExtraError: Without matplotlib.
        RecipeError: If the table holds settings that the experiment does not take.
    """
    return configure(table.experiment, table.config, "table").draw(table)
