"""An update of a layer so that its inputs are its columns, and what it does to inputs."""

from __future__ import annotations

from torch import Tensor

from bulkedge._linmap import LowRank, frobenius
from bulkedge._precision import exact
from bulkedge.comparison import Pair

from .inputs import Inputs
from .solve import Solve, moved

Update = Tensor | LowRank
"""ΔW so that its inputs are its columns: full, or as factors."""


def base_of(pair: Pair, inputs: Inputs) -> Tensor:
    """W0 so that its inputs are its columns: an embedding's are its rows."""
    return pair.base.mT if inputs.rows else pair.base


def update_of(pair: Pair, inputs: Inputs) -> Update:
    """``W − W0`` in float64, likewise."""
    if pair.factors is not None:
        return on_columns(pair.factors, inputs)
    difference = exact(pair.dense_part) - exact(pair.base)
    return difference.mT if inputs.rows else difference


def on_columns(update: LowRank, inputs: Inputs) -> LowRank:
    """A product of factors, likewise."""
    return LowRank(update.A.mT, update.B.mT, update.scale) if inputs.rows else update


def one_sided(solve: Solve, update: Update) -> Update:
    """A full update, or the factor on the input side, by the solver of a pair of moments."""
    if isinstance(update, LowRank):
        return LowRank(update.B, solve(update.A), update.scale)
    return solve(update)


def norm_of(update: Update) -> float:
    """``‖ΔW‖_F``."""
    if isinstance(update, LowRank):
        return update.norm_bound()
    return frobenius(update)


def power_of(pair: Pair, inputs: Inputs) -> float:
    """``tr(W0 C_b W0ᵀ)``: the mean square of the base's outputs."""
    known = inputs.output
    return moved(base_of(pair, inputs), inputs.base.moment) if known is None else known


def drift_of(update: Update, power: float, inputs: Inputs) -> float | None:
    """The part of the base's outputs that an update changes; None of outputs that are zero."""
    return moved(update, inputs.base.moment) / power if power > 0 else None


def task_change(changed: Update, before: Update, inputs: Inputs) -> float | None:
    """The part of what an update does to the task's inputs that changes; None without moments."""
    if inputs.task is None:
        return None
    there = moved(before, inputs.task.moment)
    return max(moved(changed, inputs.task.moment), 0.0) / there if there > 0 else None
