"""What is done to a trained update, nothing retrained: each returns a new update of all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from material import settings
from protect_arms import mean, with_ridge
from torch import Tensor
from weights import SPIKES, Layer

import bulkedge
from bulkedge._linmap import as_map
from bulkedge.repairing import Case, Clip, Method, Project, Scale, Shrink
from bulkedge.update import UpdateSVD

Updates = dict[str, Tensor]
Named = tuple[str, float, Callable[[], Updates]]


@dataclass
class Matrix:
    """A layer with its update, decomposed.

    Attributes:
        layer: The base.
        D: The update.
        C_t: The second moment of the inputs on the task's text, in the tuned model.
        low: Whether the update is of low rank.
    """

    layer: Layer
    D: Tensor
    C_t: Tensor
    low: bool

    @cached_property
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, γ and V of the update, without rounding."""
        U, S, Vh = torch.linalg.svd(self.D, full_matrices=False)
        keep = SPIKES * S[0] < S
        return U[:, keep], S[keep], Vh[keep].mT

    @property
    def ratio(self) -> float:
        """``‖ΔW‖₂/θ_k``."""
        return float(self.svd[1][0]) / self.layer.leading

    @cached_property
    def new(self) -> list[int]:
        """Places of the new directions among the leading ones."""
        return self.layer.new_directions(self.triplets[0][:, : settings()["leading"]])

    @cached_property
    def triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, σ and V of the tuned matrix."""
        U, S, Vh = torch.linalg.svd(self.layer.W0 + self.D, full_matrices=False)
        return U, S, Vh.mT

    @cached_property
    def alike(self) -> list[int]:
        """As many aligned directions of the nearest singular values, none taken twice.

        Those among the leading ten come first where they are nearest; beyond them directions are
        not judged, so that the search goes no further than three times ten.
        """
        S, k = self.triplets[1], settings()["leading"]
        left = [i for i in range(k) if i not in self.new]
        left += self._aligned_beyond(k)
        found = []
        for i in self.new:
            if not left:
                break
            best = min(left, key=lambda j: abs(float(S[j] - S[i])))
            left.remove(best)
            found.append(best)
        return found

    def _aligned_beyond(self, k: int) -> list[int]:
        """Directions after the leading k whose score is at least one half."""
        some = self.triplets[0][:, k : 3 * k]
        score = (self.layer.svd[0].mT @ some).abs().amax(0)
        return [k + int(i) for i in torch.nonzero(score >= 0.5)[:, 0]]

    def case(self, places: list[int]) -> Case:
        """What a repair method is given."""
        U, S, V = self.triplets
        u, gamma, v = self.svd
        root = gamma.sqrt()
        return Case(
            base=as_map(self.layer.W0), tuned=as_map(self.layer.W0 + self.D), update=as_map(self.D),
            sigma=S[places], u=U[:, places], v=V[:, places],
            left=torch.ones(len(places), dtype=torch.bool),
            right=torch.zeros(len(places), dtype=torch.bool),
            spikes=UpdateSVD(u * root, v * root, gamma) if self.low else None,
            fit=self.layer.fit, subspace=2 * settings()["leading"],
        )  # fmt: skip

    def treated(self, method: Method, places: list[int] | None) -> Tensor:
        """By one round of a repair method; on the whole update where places are None."""
        if places is not None and not places:
            return self.D
        done = method.correct(self.case(places or []))
        return (0 if done.anew else self.D) + done.X @ done.Y.mT


class Treated:
    """A trained update, and all that is done to it.

    Args:
        layers: The base's.
        updates: Of the cell.
        task: Moments on the task's text.
        low: Whether updates are of low rank.
    """

    def __init__(
        self, layers: Mapping[str, Layer], updates: Updates, task: bulkedge.Moments, *, low: bool
    ) -> None:
        self.matrices = {
            name: Matrix(layers[name], D, torch.as_tensor(task[name].moment), low)
            for name, D in updates.items()
        }

    @property
    def count(self) -> int:
        """New directions in all."""
        return sum(len(matrix.new) for matrix in self.matrices.values())

    def all(self) -> Iterator[Named]:
        """Name, setting and the update, computed when it is called."""
        s = settings()
        yield "as trained", 1.0, partial(self.scaled, 1.0)
        for scale in s["scales"]:
            yield "scaled", scale, partial(self.scaled, scale)
        for strength in s["strengths"]:
            yield "protect", strength, partial(self.protected, strength)
        yield "budget", 1.0, partial(self.each, lambda m: m.D * min(1.0, 1 / m.ratio))
        yield "budget edge", 1.0, partial(
            self.each, lambda m: m.D * min(1.0, 1 / (m.ratio * m.layer.leading / m.layer.edge))
        )  # fmt: skip
        yield "clip", 1.0, partial(self.by, Clip(), None)
        yield "shrink", 1.0, partial(self.by, Shrink(), None)
        yield "high", 1.0, partial(self.grouped, high=True)
        yield "low", 1.0, partial(self.grouped, high=False)
        if not self.count:
            return
        yield "project", 1.0, partial(self.by, Project(), "new")
        yield "project, aligned", 1.0, partial(self.by, Project(), "alike")
        for keep in s["keeps"]:
            yield "λ", keep, partial(self.by, Scale(keep), "new")
        for keep in s["control_keeps"]:
            yield "λ, aligned", keep, partial(self.by, Scale(keep), "alike")

    def each(self, change: Callable[[Matrix], Tensor]) -> Updates:
        """Every layer changed."""
        return {name: change(matrix) for name, matrix in self.matrices.items()}

    def scaled(self, scale: float) -> Updates:
        """All by one number."""
        return self.each(lambda matrix: scale * matrix.D)

    def by(self, method: Method, places: str | None) -> Updates:
        """One round of a repair method on new directions, on others like them, or on the whole."""
        return self.each(
            lambda m: m.treated(method, None if places is None else getattr(m, places))
        )

    def protected(self, strength: float) -> Updates:
        """``ΔW C_t (C_t + λ C_b)⁻¹`` as in docs/protect.md; one λ for all layers."""

        def change(matrix: Matrix) -> Tensor:
            C_b, C_t = matrix.layer.C, matrix.C_t
            exchange = mean(C_b) / mean(C_t)
            task = with_ridge(C_t, settings()["ridge"])
            both = task + strength * exchange * with_ridge(C_b, settings()["ridge"])
            factor = torch.linalg.cholesky(both)
            return torch.cholesky_solve(task @ matrix.D.mT, factor).mT

        return self.each(change)

    def grouped(self, *, high: bool) -> Updates:
        """Layers beyond their threshold made weaker, or the others, by the same squared norm."""
        order = sorted(self.matrices, key=lambda name: -self.matrices[name].ratio)
        beyond = sum(self.matrices[name].ratio > 1 for name in order)
        if not 3 <= beyond <= len(order) - 3:
            beyond = len(order) // 2
        groups = order[:beyond], order[beyond:]
        squares = [sum(float(self.matrices[n].D.square().sum()) for n in g) for g in groups]
        removed = 0.75 * min(squares)
        chosen, square = (groups[0], squares[0]) if high else (groups[1], squares[1])
        scale = max(0.0, 1 - removed / square) ** 0.5
        return {n: m.D * (scale if n in chosen else 1.0) for n, m in self.matrices.items()}
