"""Intruder dimensions while they appear: a look at a few layers every few steps."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Union

import torch
from torch import Tensor, nn

from bulkedge._errors import InputError
from bulkedge._fields import EPSILON, check_values, each, whole
from bulkedge._linmap import Dense, LinearMap
from bulkedge.auditing.judge import SMALL
from bulkedge.intruder import Verdict, base_vectors, certify, scores, ties, verdict
from bulkedge.rmt.empirical_bulk import MIN_VALUES
from bulkedge.triplet import GolubKahan, SingularTriplets, singular_triplet, thin_svd

from ._chosen import chosen
from ._edge import thresholds
from ._full import FullMatrix, NamedWeight, weight_of
from ._layers import adapted_matrices
from ._matrix import like, require_in_memory, spread_like
from ._spikes import effective_rank

ANGLE = 1e-2
"""To what sine the tuned vectors are sought; it widens every interval."""
PARAMETRIZED = re.compile(r"parametrizations\.([^.]+)\.original$")
"""The name of a parameter from which a parametrization computes a weight."""
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


def full_matrices(
    model: nn.Module,
    modules: str | Sequence[str] = "*",
    *,
    base: Mapping[str, Tensor] | None = None,
) -> list[FullMatrix]:
    """The weights of a model that are trained in full, each with a copy of what it is now.

    A weight is found by its name whenever it is looked at.  One that :func:`hold_update` holds is
    watched as the model uses it: held.

    Args:
        model: The model, before it is trained.
        modules: Patterns of parameter names.
        base: What the weights were, by name, where the model has been trained already, as that of a
            run that is resumed: the ``state_dict()`` of the model that it began with.

    Returns:
        One entry a trainable matrix that is no embedding and has a bulk: a head with fewer than
        twelve outputs has none.

    Raises:
        InputError: If a weight is missing in ``base``, or has another shape there; later, if a
            weight is gone or has another shape.
        RecipeError: If a pattern matches none of them.

    Example:
        >>> model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 2))
        >>> [(matrix.name, matrix.shape) for matrix in full_matrices(model)]
        [('0.weight', (30, 40))]
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    names = [
        PARAMETRIZED.sub(r"\1", name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.ndim == 2
        and min(parameter.shape) >= MIN_VALUES
        and id(parameter) not in embeddings
    ]
    used = chosen(modules, names, str)
    return [NamedWeight(model, name, _before(model, name, base)) for name in used]


def _before(model: nn.Module, name: str, base: Mapping[str, Tensor] | None) -> Tensor:
    """What a weight was: a copy, or what the caller gives; spread over processes as it is."""
    with torch.no_grad():
        weight = weight_of(model, name)
    if base is None and weight is not None:
        return require_in_memory(name, weight).detach().clone()
    known = (base or {}).get(name)
    if weight is None or known is None or known.shape != weight.shape:
        found = "nothing" if known is None else tuple(known.shape)
        wanted = None if weight is None else tuple(weight.shape)
        raise InputError(
            f"{name}: expected its base of shape {wanted} in base=, got {found}; give the "
            "state_dict() of the model that training began with"
        )
    return spread_like(known.detach(), weight)


@dataclass
class LayerFigures:
    """What a look at a layer has found.

    Attributes:
        step: When it was.
        intruders: How many leading directions score below ε, without those that are ``rotated``.
        rotated: How many score below ε but lie mostly inside the base's leading space.  The paper's
            count, ``intruders`` in an audit's record, is the sum of both.
        undecided: How many verdicts the certificate left open.
        worst: The lowest score.
        strongest: The strongest spike of the update over θ_c.
        effective_rank: That of the update's spikes.
    """

    step: int
    intruders: int
    rotated: int
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
            self.matrices = chosen(modules, model, lambda matrix: matrix.name)
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

    @property
    def complete(self) -> bool:
        """Whether every layer has been looked at."""
        return len(self.figures) == len(self.matrices)

    def metrics(self) -> dict[str, float]:
        """What the latest look at each layer has found, as numbers to log; empty before a look.

        Returns:
            ``bulkedge/coverage``: the part of the layers that were looked at so far, and over these
            ``worst_score`` (lowest), ``strongest_spike`` (highest), ``effective_rank`` and
            ``intruders_per_layer`` (means), and ``overhead``.  The counts ``intruders``,
            ``rotated`` and ``undecided`` are totals over all layers, and absent until every layer
            has been looked at: a sum over a part of the model grows while nothing changes.
        """
        if not self.figures:
            return {}
        seen = list(self.figures.values())
        elapsed = max(time.perf_counter() - self._begun, 1e-9)
        found = {
            "coverage": len(seen) / len(self.matrices),
            "intruders_per_layer": sum(layer.intruders for layer in seen) / len(seen),
            "worst_score": min(layer.worst for layer in seen),
            "strongest_spike": max(layer.strongest for layer in seen),
            "effective_rank": sum(layer.effective_rank for layer in seen) / len(seen),
            "overhead": self._own / elapsed,
        }
        if self.complete:
            for count in ("intruders", "rotated", "undecided"):
                found[count] = float(sum(getattr(layer, count) for layer in seen))
        return {f"bulkedge/{name}": value for name, value in found.items()}

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
            solver=GolubKahan(vector_tol=ANGLE),
            init=like(W, self._last.get(matrix.name)),
            strict=False,
        )
        self._last[matrix.name] = tuned.u, tuned.v
        score, verdicts = self._scores(matrix.base_map(), tuned)
        rotated = verdicts.count(Verdict.ROTATED)
        gamma = matrix.strengths
        strongest = float(gamma[0]) if len(gamma) else 0.0
        return LayerFigures(
            step=self.steps,
            intruders=int((score < self.epsilon).sum()) - rotated,
            rotated=rotated,
            undecided=verdicts.count(Verdict.UNDECIDED),
            worst=float(score.min()) if len(score) else 1.0,
            strongest=strongest / self.thresholds[matrix.name],
            effective_rank=effective_rank(gamma),
        )

    def _scores(self, W0: LinearMap, tuned: SingularTriplets) -> tuple[Tensor, Sequence[Verdict]]:
        """The score of each direction, and the verdict on it."""
        count = int((tuned.sigma > LEAST * tuned.sigma[0]).sum())
        if count == 0:  # a weight of zeros has no directions
            return tuned.sigma[:0], []
        small = min(W0.shape) <= SMALL and isinstance(W0, Dense)
        look = self._by_svd if small else self._by_products
        return look(W0, tuned, count)

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
