"""Intruder dimensions while they appear: a look at a few layers every few steps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, Union

import torch
from torch import Tensor, nn

from bulkedge._audit.judge import SMALL
from bulkedge._errors import InputError
from bulkedge._fields import EPSILON, check_values, each, whole
from bulkedge._globs import as_globs
from bulkedge._linmap import Dense, Difference, LinearMap
from bulkedge.intruder import Verdict, base_vectors, certify, scores, ties, verdict
from bulkedge.rmt.empirical import FEWEST
from bulkedge.triplet import GolubKahan, SingularTriplets, singular_triplet, thin_svd

from ._edge import thresholds
from ._layers import adapted_matrices, chosen_by, frozen_map, is_distributed
from ._spikes import effective_rank

ANGLE = 1e-2
"""To what sine the tuned vectors are sought; it widens every interval."""
LEADING = 16
"""How many singular values of a dense update are looked at."""
LEAST = 1e-3
"""Below this part of σ₁ a tuned value is not told from zero, and its vectors are any."""


class Watched(Protocol):
    """A matrix that a monitor looks at: :class:`AdaptedMatrix`, or :class:`FullMatrix`."""

    @property
    def name(self) -> str:
        """Of the module."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        ...

    @property
    def strengths(self) -> Tensor:
        """Leading singular values of the update, descending."""
        ...

    def base_map(self) -> LinearMap:
        """W0."""
        ...

    def tuned_map(self) -> LinearMap:
        """W."""
        ...


@dataclass(frozen=True)
class FullMatrix:
    """A weight that is trained in full, and what it was.

    Attributes:
        name: Of the parameter.
        base: W0, a copy, shape ``(m, n)``; it may lie on the CPU, and is moved when it is used.
        weight: The parameter, or a view of it.
    """

    name: str
    base: Tensor
    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self.base.shape[0], self.base.shape[1]

    @property
    def strengths(self) -> Tensor:
        """The leading singular values of ``W − W0``."""
        if is_distributed(self.weight):
            update = frozen_map(self.weight - self.base, self._dtype)
        else:
            update = Difference(self.weight.detach(), self._base, self._dtype)
        found = singular_triplet(
            update, min(LEADING, *self.shape), solver=GolubKahan(rtol=1e-2), strict=False
        )
        return found.sigma.double()

    def base_map(self) -> LinearMap:
        """W0, with products in float32, or in float64 if it is stored so."""
        return frozen_map(self._base, self._dtype)

    def tuned_map(self) -> LinearMap:
        """W, with products in the same."""
        return frozen_map(self.weight, self._dtype)

    @property
    def _base(self) -> Tensor:
        """W0 where the weight is."""
        return self.base if is_distributed(self.base) else self.base.to(self.weight.device)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.weight.dtype is torch.float64 else torch.float32


def full_matrices(
    model: nn.Module,
    modules: str | Sequence[str] = "*",
    *,
    base: Mapping[str, Tensor] | None = None,
) -> list[FullMatrix]:
    """The weights of a model that are trained in full, each with a copy of what it is now.

    Args:
        model: The model, before it is trained.
        modules: Patterns of parameter names.
        base: What the weights were, by name, where the model has been trained already, as that of a
            run that is resumed: the ``state_dict()`` of the model that it began with.

    Returns:
        One entry a trainable matrix that is no embedding and has a bulk: a head with fewer than
        twelve outputs has none.

    Raises:
        InputError: If a weight is missing in ``base``, or has another shape there.
        RecipeError: If a pattern matches none of them.

    Example:
        >>> model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 2))
        >>> [(matrix.name, matrix.shape) for matrix in full_matrices(model)]
        [('0.weight', (30, 40))]
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    known = [
        FullMatrix(name, parameter, parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.ndim == 2
        and min(parameter.shape) >= FEWEST
        and id(parameter) not in embeddings
    ]
    return [
        replace(matrix, base=_before(matrix.name, matrix.weight, base))
        for matrix in chosen_by(as_globs(modules), known)
    ]


def _before(name: str, parameter: Tensor, base: Mapping[str, Tensor] | None) -> Tensor:
    """What a parameter was: a copy, or what is told; spread over processes as it is."""
    if base is None:
        return parameter.detach().clone()
    known = base.get(name)
    if known is None or known.shape != parameter.shape:
        found = "nothing" if known is None else tuple(known.shape)
        raise InputError(
            f"{name}: expected its base of shape {tuple(parameter.shape)} in base=, got {found}; "
            "give the state_dict() of the model that training began with"
        )
    if is_distributed(parameter) and not is_distributed(known):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements  # pyright: ignore
        return distribute_tensor(known.detach().to(parameter.device), mesh, placements)
    return known.detach()


@dataclass
class LayerFigures:
    """What a look at a layer has found.

    Attributes:
        step: When it was.
        intruders: How many leading directions score below ε: the paper's count.
        undecided: How many verdicts the certificate left open.
        worst: The lowest score.
        strongest: The strongest spike of the update over θ_c.
        effective_rank: That of the update's spikes.
    """

    step: int
    intruders: int
    undecided: int
    worst: float
    strongest: float
    effective_rank: float


Model = Union[nn.Module, Sequence[Watched]]  # noqa: UP007 — Python 3.10


class Monitor:
    """Look at a few layers every few steps, in turn, and tell what is known of all.

    A look takes the leading tuned triplets, from where the last look found them, and bounds their
    scores as the audit does (:func:`bulkedge.intruder.certify`): some tens of thin products with
    the base; an SVD of it where its shorter side is at most 384, which costs less.  Nothing is kept
    but k vectors a layer.

    With parameters that are spread over processes (FSDP2), all processes must call ``step``.

    Args:
        model: A model wrapped by PEFT, on the device where it trains; or matrices, such as those of
            :func:`full_matrices`.
        every: Steps between looks.
        per_call: Layers a look.
        top_k: How many leading directions are judged.
        epsilon: The paper's threshold of scores.
        thresholds: θ_c by name, for those that are known already.
        adapter: Which adapter; the active one if None.
        modules: Patterns of the names of modules, or of matrices.

    Attributes:
        steps: How many there were.
        figures: What is known of each layer that was looked at, by name.

    Raises:
        InputError: If a number is not positive, there is nothing to watch, two matrices have one
            name, or a base has no threshold.

    Example:
        >>> from bulkedge.tune import AdaptedMatrix
        >>> generator = torch.Generator().manual_seed(0)
        >>> W0, B, A = (torch.randn(*s, generator=generator) for s in [(60, 50), (60, 1), (1, 50)])
        >>> monitor = Monitor([AdaptedMatrix("layer", W0, A, B)], every=1, top_k=1)
        >>> monitor.step()
        True
        >>> monitor.figures["layer"].intruders
        1
    """

    def __init__(
        self,
        model: Model,
        *,
        every: int = 50,
        per_call: int = 2,
        top_k: int = 10,
        epsilon: float = 0.5,
        thresholds: Mapping[str, float] | None = None,
        adapter: str | None = None,
        modules: str | Sequence[str] = "*",
    ) -> None:
        counts = {"every": every, "per_call": per_call, "top_k": top_k}
        check_values(self, epsilon=(epsilon, EPSILON), **each(counts, whole(1)))
        self.every, self.per_call, self.top_k, self.epsilon = every, per_call, top_k, epsilon
        self.matrices: list[Watched]
        if isinstance(model, nn.Module):
            self.matrices = list(adapted_matrices(model, adapter=adapter, modules=modules))
        else:
            self.matrices = chosen_by(as_globs(modules), model)
        names = [matrix.name for matrix in self.matrices]
        if not names or len(set(names)) < len(names):
            twice = [name for name in names if names.count(name) > 1]
            got = f"two named {twice[0]}" if twice else "none"
            raise InputError(f"expected matrices to watch, each with a name of its own, got {got}")
        self.thresholds = _thresholds(self.matrices, thresholds)
        self.steps = self._next = 0
        self.figures: dict[str, LayerFigures] = {}
        self._last: dict[str, tuple[Tensor, Tensor]] = {}
        self._begun, self._own = time.perf_counter(), 0.0

    def step(self) -> bool:
        """To be called after each step of the optimiser.

        Returns:
            Whether this one brought a look.
        """
        self.steps += 1
        if self.steps % self.every:
            return False
        self.look(self.per_call)
        return True

    def look(self, count: int | None = None) -> None:
        """Look at the next layers now.

        Args:
            count: How many; all of them if None.

        Raises:
            InputError: If a weight is not finite: training has diverged.
        """
        _finish_other_work()
        begun, layers = time.perf_counter(), len(self.matrices)
        with torch.no_grad():
            for _ in range(layers if count is None else min(count, layers)):
                matrix = self.matrices[self._next % layers]
                try:
                    self.figures[matrix.name] = self._look_at(matrix)
                except InputError as error:
                    raise InputError(f"{matrix.name}: after step {self.steps}: {error}") from error
                self._next += 1
        self._own += time.perf_counter() - begun

    @property
    def worst_layer(self) -> str | None:
        """Where the lowest score is that is known; None before a look."""
        return min(self.figures, key=lambda name: self.figures[name].worst, default=None)

    def metrics(self) -> dict[str, float]:
        """What is known so far of all layers together, as numbers to log; empty before a look."""
        if not self.figures:
            return {}
        seen = list(self.figures.values())
        elapsed = max(time.perf_counter() - self._begun, 1e-9)
        return {
            "bulkedge/intruders": float(sum(layer.intruders for layer in seen)),
            "bulkedge/worst_score": min(layer.worst for layer in seen),
            "bulkedge/strongest_spike": max(layer.strongest for layer in seen),
            "bulkedge/effective_rank": sum(layer.effective_rank for layer in seen) / len(seen),
            "bulkedge/overhead": self._own / elapsed,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as JSON."""
        return {
            "steps": self.steps,
            "next": self._next,
            "thresholds": dict(self.thresholds),
            "layers": {name: asdict(layer) for name, layer in self.figures.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            InputError: If it is of other layers.
        """
        known = {matrix.name for matrix in self.matrices}
        if set(state["thresholds"]) != known:
            odd = sorted(set(state["thresholds"]) ^ known)
            raise InputError(f"expected a state of the same layers; only one side has {odd[0]}")
        self.steps, self._next = int(state["steps"]), int(state["next"])
        self.thresholds = dict(state["thresholds"])
        self.figures = {name: LayerFigures(**x) for name, x in state["layers"].items()}

    def _look_at(self, matrix: Watched) -> LayerFigures:
        """The figures of one layer."""
        W = matrix.tuned_map()
        tuned = singular_triplet(
            W,
            min(self.top_k, *W.shape),
            solver=GolubKahan(angle=ANGLE),
            init=self._last.get(matrix.name),
            strict=False,
        )
        self._last[matrix.name] = tuned.u, tuned.v
        intruders, undecided, worst = self._scores(matrix.base_map(), tuned)
        gamma = matrix.strengths
        strongest = float(gamma[0]) if len(gamma) else 0.0
        return LayerFigures(
            step=self.steps,
            intruders=intruders,
            undecided=undecided,
            worst=worst,
            strongest=strongest / self.thresholds[matrix.name],
            effective_rank=effective_rank(gamma),
        )

    def _scores(self, W0: LinearMap, tuned: SingularTriplets) -> tuple[int, int, float]:
        """How many directions are intruders, of how many it is open, and the lowest score."""
        count = int((tuned.sigma > LEAST * tuned.sigma[0]).sum())
        if count == 0:  # a weight of zeros has no directions
            return 0, 0, 1.0
        small = min(W0.shape) <= SMALL and isinstance(W0, Dense)
        look = self._by_svd if small else self._by_products
        score, verdicts = look(W0, tuned, count)
        below = int((score < self.epsilon).sum())
        return below, verdicts.count(Verdict.UNDECIDED), float(score.min())

    def _by_products(
        self, W0: LinearMap, tuned: SingularTriplets, count: int
    ) -> tuple[Tensor, Sequence[Verdict]]:
        """Scores from some tens of products with the base."""
        groups, errors = ties(tuned)
        found = certify(
            W0,
            tuned.u[:, :count],
            epsilon=self.epsilon,
            errors=errors[:count],
            groups=groups[:count],
            subspace=2 * self.top_k,
        )
        return found.score, found.verdicts

    def _by_svd(
        self, W0: LinearMap, tuned: SingularTriplets, count: int
    ) -> tuple[Tensor, Sequence[Verdict]]:
        """Scores from all vectors of a small base, which costs less than the products."""
        U, S, _ = thin_svd(W0.to_dense().double())
        known = base_vectors(U, S, W0.shape)
        found = scores(tuned.u[:, :count].double(), known, 2 * self.top_k)
        columns = (x.tolist() for x in (found.score, found.subspace_overlap, tuned.vector_errors))
        verdicts = [
            verdict(score, overlap, epsilon=self.epsilon, vector_error=error)
            for score, overlap, error in zip(*columns, strict=False)
        ]
        return found.score, verdicts


def _finish_other_work() -> None:
    """What training has left to do on a GPU is not this monitor's time."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


_thresholds = thresholds  # an argument has the name
