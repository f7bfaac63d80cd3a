"""Rank and scale that follow the spikes while a model trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bulkedge._errors import InputError
from bulkedge._fields import POSITIVE, check_values, each, optional, whole

from ._edge import thresholds
from ._hold import free_factors, hold, partners_of
from ._layers import Adapted, AdaptedMatrix, adapted_matrices
from ._optimizer import after_step
from ._spikes import effective_rank
from .clip import LEVEL

CROWDED = 0.9
"""A spike counts as held where it has this part of the level or more."""
IDLE = 0.02
"""A direction whose spike has less than this part of the strongest carries nothing."""


@dataclass
class LayerState:
    """What the controller knows of a layer.

    Attributes:
        rank: How many of the factors' directions are in use.
        strongest: The strongest spike over θ_c when it was last looked at, before it was held.
        effective_rank: That of the spikes.
    """

    rank: int
    strongest: float = 0.0
    effective_rank: float = 0.0


class RankController:
    """Move scale and rank so that every update stays below its threshold, and uses what it needs.

    *Scale*, after each step: spikes that exceed ``level·θ_c`` are held there, one by one, as
    :class:`~bulkedge.tune.EdgeClip` does.  (To scale the whole update down instead starves the
    directions that are still small: they never grow.)

    *Rank*, every ``every`` steps: a layer of which half the spikes or more are held at the level
    gets ``grow`` more directions, because below the edge only more of them carry more; one whose
    weakest directions carry nothing gives them back.  Directions that are not in use are zero
    columns of B: the file is that of a plain LoRA of the full rank.  Both factors are rewritten
    then, so both must be trained.  Layers that are tied to one another have one rank.

    Args:
        model: A model wrapped by PEFT with the largest rank that may be used; or matrices.
        level: Where to hold the strongest spike, in units of θ_c.
        start: With how many directions each layer begins; a quarter of its rank if None.
        grow: How many directions are added or taken away at a time.
        every: Steps between changes of rank.
        thresholds: θ_c by name, for those that are known already.
        adapter: Which adapter; the active one if None.
        modules: Patterns of module names.

    Attributes:
        state: A :class:`LayerState` by name.
        steps: How many there were.

    Raises:
        InputError: If an argument is not positive, or a base has no threshold; and, at each step,
            if a factor is frozen, not finite, or shared with another layer that has a different
            partner, or a layer is gone.

    References:
        The future work of the seed paper on random matrices and LoRA; adaptive rank by importance
        is AdaLoRA's, arXiv:2303.10512.

    Example:
        >>> from bulkedge.tune import AdaptedMatrix
        >>> generator = torch.Generator().manual_seed(0)
        >>> W0, B, A = (torch.randn(*s, generator=generator) for s in [(50, 40), (50, 8), (8, 40)])
        >>> control = RankController([AdaptedMatrix("layer", W0, A, B)], start=2)
        >>> control.step()
        >>> control.state["layer"].rank, int(torch.linalg.matrix_rank(B @ A))
        (2, 2)
    """

    def __init__(
        self,
        model: Adapted,
        *,
        level: float = LEVEL,
        start: int | None = None,
        grow: int = 1,
        every: int = 20,
        thresholds: Mapping[str, float] | None = None,
        adapter: str | None = None,
        modules: str | Sequence[str] = "*",
    ) -> None:
        counts = {"grow": grow, "every": every}
        check_values(self, level=(level, POSITIVE), **each(counts, whole(1)))
        check_values(self, start=(start, optional(whole(1))))
        self.level, self.grow, self.every = level, grow, every
        self.matrices = adapted_matrices(model, adapter=adapter, modules=modules)
        self.thresholds = _thresholds(self.matrices, thresholds)
        self.steps = 0
        self.state = {
            matrix.name: LayerState(min(start or max(matrix.rank // 4, 1), matrix.rank))
            for matrix in self.matrices
        }

    def step(self) -> None:
        """Hold all updates, and change ranks when it is time."""
        self.steps += 1
        self._silence_all()
        limits = [self.level * self.thresholds[matrix.name] for matrix in self.matrices]
        before, _ = hold(self.matrices, limits)
        partners = partners_of(self.matrices)
        for i, (matrix, gamma, limit) in enumerate(zip(self.matrices, before, limits, strict=True)):
            state = self.state[matrix.name]
            state.strongest = float(gamma[0]) / self.thresholds[matrix.name]
            state.effective_rank = effective_rank(gamma)
            if partners[i] == i and self.steps % self.every == 0:
                self._change_rank(matrix, gamma.clamp_max(limit) / limit)
            state.rank = self.state[self.matrices[partners[i]].name].rank

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Do so after each step of an optimiser.

        Args:
            optimizer: Any optimiser of torch, also as Accelerate or Lightning wraps it.

        Returns:
            A handle: ``handle.remove()`` ends it.

        Raises:
            InputError: If the optimiser trains nothing of what is held, or saves other weights than
                it leaves after a step (schedule-free).
        """
        handle = after_step(optimizer, self.matrices, self.step)
        self._silence_all()
        return handle

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as JSON."""
        return {
            "steps": self.steps,
            "thresholds": dict(self.thresholds),
            "layers": {name: asdict(state) for name, state in self.state.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            InputError: If it is of other layers.
        """
        if set(state["layers"]) != set(self.state):
            odd = sorted(set(state["layers"]) ^ set(self.state))
            raise InputError(f"expected a state of the same layers; only one side has {odd[0]}")
        self.steps = int(state["steps"])
        self.thresholds = dict(state["thresholds"])
        self.state = {name: LayerState(**layer) for name, layer in state["layers"].items()}

    def _silence_all(self) -> None:
        """Directions that are not in use stay zero; of tied layers the first speaks for all."""
        _require_both(self.matrices)
        for i, partner in enumerate(partners_of(self.matrices)):
            if i == partner:
                self._silence(self.matrices[i])

    def _silence(self, matrix: AdaptedMatrix) -> None:
        """Directions that are not in use stay zero, whatever the optimiser did."""
        B, A = matrix.factors
        rank = self.state[matrix.name].rank
        if bool(B[:, rank:].any()):
            B = B.clone()
            B[:, rank:] = 0
            matrix.write(B, A)

    def _change_rank(self, matrix: AdaptedMatrix, held: Tensor) -> None:
        """Give a crowded layer more directions; take idle ones back."""
        state = self.state[matrix.name]
        if 2 * int((held >= CROWDED).sum()) >= state.rank:
            state.rank = min(state.rank + self.grow, matrix.rank)
        elif float(held[state.rank - 1]) < IDLE * float(held[0]) and state.rank > self.grow:
            self._turn_out(matrix, state.rank - self.grow)

    def _turn_out(self, matrix: AdaptedMatrix, rank: int) -> None:
        """Keep the strongest directions only, in the first places of the factors."""
        kept = matrix.spikes()
        keep = min(rank, kept.rank)
        root = abs(matrix.scale) ** 0.5
        sign = -1.0 if matrix.scale < 0 else 1.0
        B, A = (x.clone() for x in matrix.factors)
        B[:, :keep] = (sign * kept.P[:, :keep] / root).to(B)
        A[:keep] = (kept.Q[:, :keep] / root).mT.to(A)
        B[:, keep:] = 0
        matrix.write(B, A)
        self.state[matrix.name].rank = rank


def _require_both(matrices: Sequence[AdaptedMatrix]) -> None:
    """InputError unless both factors of each are its own and trained."""
    for matrix in matrices:
        matrix.settle()
    for matrix, free in zip(matrices, free_factors(matrices), strict=True):
        if not all(free):
            which = "B" if not free[0] else "A"
            raise InputError(
                f"{matrix.name}: expected two factors that are trained and its own, which a change "
                f"of rank rewrites, got {which} frozen or shared with other layers; use EdgeClip"
            )


_thresholds = thresholds  # an argument has the name
