"""Ranks that follow the spikes while a model trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import NOT_NEGATIVE, check_values, each, optional, whole
from bulkedge.update import effective_rank

from ._clip_spikes import changeable_factors, first_of_tied
from ._layers import Adapted, AdaptedMatrix, require_same_layers
from ._saved import BY_NAME, entries
from ._thresholds import Line, Thresholds, known_thresholds
from .holder import LEVEL, ThresholdHolder

AT_LIMIT = 0.9
"""A spike counts as held at its limit from this fraction of the limit on."""
IDLE = 0.02
"""A direction whose spike is below this fraction of the strongest counts as unused."""


@dataclass
class LayerState:
    """What the controller knows of a layer.

    Attributes:
        rank: How many directions of the factors are in use.
        strongest: The strongest spike over θ_c at the last step, before it was clipped.
        effective_rank: The effective rank of the spikes at the last step.
    """

    rank: int
    strongest: float = 0.0
    effective_rank: float = 0.0


class RankController(ThresholdHolder):
    """Hold every update below its threshold, and give each layer the rank that it needs.

    *Spikes*, after each step: those that exceed ``level·θ_c`` are clipped one by one, as
    :class:`~bulkedge.tune.SpikeClip` does.  (Scaling the whole update down instead would keep
    directions that are still small from growing.)

    *Rank*, every ``every`` steps: a layer with half of its spikes or more at the limit gets
    ``grow`` more directions, because below the threshold only more directions can carry more; a
    layer whose weakest directions carry nothing loses them.  Directions that are not in use are
    zero columns of B: the file is that of a plain LoRA of the full rank.  A change of rank rewrites
    both factors, so both must be trained.  Layers that are tied to one another have one rank.

    Args:
        model: A model wrapped by PEFT with the largest rank that may be used; or adapted matrices.
        level: Where to hold the strongest spike, in units of its threshold.
        of: Which threshold, as in :class:`~bulkedge.tune.SpikeClip`.
        start: With how many directions each layer begins; a quarter of its rank if None.
        grow: How many directions are added or taken away at a time.
        every: Steps between changes of rank.
        thresholds: Thresholds by name, or a file that ``bulkedge budget`` has written, for layers
            whose threshold is known already.
        adapter: Which adapter; the active one if None.
        include: Patterns of module names.
        exclude: Patterns of the names of those that are left out.

    Attributes:
        state: A :class:`LayerState` by name.
        steps: How many steps there were.

    Raises:
        InputError: If an argument is not positive, or no base has a threshold; and, at each step,
            if a factor is frozen, not finite, or shared with another layer that has a different
            partner, or a layer is gone.

    References:
        The future work of the seed paper on random matrices and LoRA; adaptive rank by importance
        is AdaLoRA's, arXiv:2303.10512.

    Example:
        >>> import torch
        >>> from bulkedge.tune import AdaptedMatrix
        >>> generator = torch.Generator().manual_seed(0)
        >>> W0, B, A = (torch.randn(*s, generator=generator) for s in [(50, 40), (50, 8), (8, 40)])
        >>> control = RankController([AdaptedMatrix("layer", W0, A, B)], start=2)
        >>> control.step()
        >>> control.state["layer"].rank, int(torch.linalg.matrix_rank(B @ A))
        (2, 2)
    """

    takes = ()

    def __init__(
        self,
        model: Adapted,
        *,
        level: float = LEVEL,
        of: Line = "edge",
        start: int | None = None,
        grow: int = 1,
        every: int = 20,
        thresholds: Thresholds | None = None,
        adapter: str | None = None,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
    ) -> None:
        counts = each({"grow": grow, "every": every}, whole(1))
        check_values(self, start=(start, optional(whole(1))), **counts)
        super().__init__(
            model,
            level=level,
            of=of,
            thresholds=thresholds,
            adapter=adapter,
            include=include,
            exclude=exclude,
        )
        self.grow, self.every = grow, every
        self.steps = 0
        self.state = {
            matrix.name: LayerState(min(start or max(matrix.rank // 4, 1), matrix.rank))
            for matrix in self.matrices
        }

    def step(self) -> None:
        """Clip all updates, and change ranks when it is time."""
        self.steps += 1
        self._clear_unused()
        limits = self.limits
        before, _ = self.clip()
        tied_to = first_of_tied(self.matrices)
        for i, (matrix, gamma, limit) in enumerate(zip(self.matrices, before, limits, strict=True)):
            state = self.state[matrix.name]
            state.strongest = float(gamma[0]) / self.thresholds[matrix.name]
            state.effective_rank = effective_rank(gamma)
            if tied_to[i] == i and self.steps % self.every == 0:
                self._change_rank(matrix, gamma.clamp_max(limit) / limit)
            state.rank = self.state[self.matrices[tied_to[i]].name].rank

    def on_attach(self) -> None:
        """Set the directions that are not in use to zero; this is no step yet."""
        self._clear_unused()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as JSON."""
        return {
            "steps": self.steps,
            "thresholds": dict(self.thresholds),
            "layers": {name: asdict(state) for name, state in self.state.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            InputError: If it is the state of other layers, or not what :meth:`state_dict` returns;
                then nothing is changed.
        """
        rules = {"steps": whole(0), "thresholds": BY_NAME, "layers": BY_NAME}
        saved = entries(type(self).__name__, state, **rules)
        thresholds, layers = known_thresholds(saved["thresholds"]), saved["layers"]
        require_same_layers(self.state, layers)
        require_same_layers(self.state, thresholds)
        read = {m.name: _read_layer(m, layers[m.name]) for m in self.matrices}
        self.steps, self.thresholds, self.state = saved["steps"], thresholds, read

    def _clear_unused(self) -> None:
        """Set the directions that are not in use to zero, whatever the optimiser wrote there."""
        _require_both_factors(self.matrices)
        for i, first in enumerate(first_of_tied(self.matrices)):
            if i == first:  # tied layers share their factors and their rank
                self._clear_beyond_rank(self.matrices[i])

    def _clear_beyond_rank(self, matrix: AdaptedMatrix) -> None:
        """Set the columns of B beyond the rank in use to zero."""
        B, A = matrix.factors
        rank = self.state[matrix.name].rank
        if bool(B[:, rank:].any()):
            B = B.clone()
            B[:, rank:] = 0
            matrix.write(B, A)

    def _change_rank(self, matrix: AdaptedMatrix, relative: Tensor) -> None:
        """Add directions where half are at the limit; take those away that carry nothing.

        Args:
            matrix: The matrix.
            relative: Its clipped spikes over their limit, descending.
        """
        state = self.state[matrix.name]
        if 2 * int((relative >= AT_LIMIT).sum()) >= state.rank:
            state.rank = min(state.rank + self.grow, matrix.rank)
        elif float(relative[state.rank - 1]) < IDLE * float(relative[0]) and state.rank > self.grow:
            self._reduce_rank(matrix, state.rank - self.grow)

    def _reduce_rank(self, matrix: AdaptedMatrix, rank: int) -> None:
        """Keep the strongest directions only, in the first columns of B and rows of A."""
        spikes = matrix.spikes()
        kept = min(rank, spikes.rank)
        root = abs(matrix.scale) ** 0.5
        sign = -1.0 if matrix.scale < 0 else 1.0
        B, A = (x.clone() for x in matrix.factors)
        B[:, :kept] = (sign * spikes.P[:, :kept] / root).to(B)
        A[:kept] = (spikes.Q[:, :kept] / root).mT.to(A)
        B[:, kept:] = 0
        matrix.write(B, A)
        self.state[matrix.name].rank = rank


def _read_layer(matrix: AdaptedMatrix, saved: object) -> LayerState:
    """The saved state of a layer; InputError if it does not fit the layer."""
    figures = dict.fromkeys(("strongest", "effective_rank"), NOT_NEGATIVE)
    return LayerState(**entries(matrix.name, saved, rank=whole(1, matrix.rank), **figures))


def _require_both_factors(matrices: Sequence[AdaptedMatrix]) -> None:
    """InputError unless both factors of each are trained, and shared with no other update."""
    for matrix in matrices:
        matrix.prepare_factors()
    for matrix, changeable in zip(matrices, changeable_factors(matrices), strict=True):
        if not all(changeable):
            which = "B" if not changeable[0] else "A"
            raise InputError(
                f"{matrix.name}: expected two factors that are trained and its own, which a change "
                f"of rank rewrites, got {which} frozen or shared with other layers; use SpikeClip"
            )
