"""Intruder dimensions while a model trains: a few layers are checked every few steps."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Union

import torch
from torch import Tensor, nn

from bulkedge._errors import InputError
from bulkedge._fields import (
    DEFAULT_EPSILON,
    EPSILON,
    NOT_NEGATIVE,
    check_values,
    each,
    instance,
    whole,
)
from bulkedge._linmap import LinearMap
from bulkedge.intruder import COUNTED, Verdict, judge_vectors
from bulkedge.rmt.empirical_bulk import MIN_VALUES
from bulkedge.triplet import GolubKahan, singular_triplet

from ._core_svd import effective_rank
from ._full import FullMatrix, NamedWeight, find_weight
from ._layers import adapted_matrices, require_same_layers
from ._matrix import distribute_like, like, require_in_memory
from ._saved import BY_NAME, entries
from ._select import members, select
from ._thresholds import known_thresholds, measure_thresholds

ANGLE = 1e-2
"""To what sine the tuned vectors are sought; it widens every interval."""
PARAMETRIZED = re.compile(r"parametrizations\.([^.]+)\.original$")
"""The name of a parameter from which a parametrization computes a weight."""


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


def full_matrices(
    model: nn.Module,
    modules: str | Sequence[str] = "*",
    *,
    base: Mapping[str, Tensor] | None = None,
) -> list[FullMatrix]:
    """The weights of a model that are trained in full, each with a copy of its present value.

    A weight is found by its name at every use.  One that :func:`hold_update` holds is watched as
    the model uses it, which is the held weight.

    Args:
        model: The model, before it is trained.
        modules: Patterns of parameter names.
        base: The weights before training, by name, if the model has been trained already (a run
            that is resumed): the ``state_dict()`` of the model from which the run began.

    Returns:
        One entry for each trainable matrix, but for embeddings and for matrices with fewer than
        twelve rows or columns (small heads), which have no bulk.

    Raises:
        InputError: If a weight is missing in ``base``, or has another shape there; at a later use,
            if a weight is gone or has another shape.
        RecipeError: If a pattern matches no weight.

    Example:
        >>> model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 2))
        >>> [(matrix.name, matrix.shape) for matrix in full_matrices(model)]
        [('0.weight', (30, 40))]
    """
    check_values("full_matrices", model=(model, instance(nn.Module, "a module")))
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    names = [
        PARAMETRIZED.sub(r"\1", name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.ndim == 2
        and min(parameter.shape) >= MIN_VALUES
        and id(parameter) not in embeddings
    ]
    used = select(modules, names, str)
    return [NamedWeight(model, name, _base_of(model, name, base)) for name in used]


def _base_of(model: nn.Module, name: str, base: Mapping[str, Tensor] | None) -> Tensor:
    """The base of a weight: a copy of it, or what the caller gives, spread as the weight is."""
    with torch.no_grad():
        weight = find_weight(model, name)
    if base is None and weight is not None:
        return require_in_memory(name, weight).detach().clone()
    known = (base or {}).get(name)
    if weight is None or known is None or known.shape != weight.shape:
        found = "nothing" if known is None else tuple(known.shape)
        expected = None if weight is None else tuple(weight.shape)
        raise InputError(
            f"{name}: expected its base of shape {expected} in base=, got {found}; give the "
            "state_dict() of the model that training began with"
        )
    return distribute_like(known.detach(), weight)


@dataclass
class LayerFigures:
    """The figures of a layer at its latest check.

    Attributes:
        step: The step of the check.
        intruders: How many leading directions score below ε, without those that are ``rotated``.
        rotated: How many score below ε but lie mostly inside the base's leading space.  The paper's
            count, ``intruders`` in an audit's record, is the sum of both.
        undecided: How many verdicts the certificate left open.
        worst: The lowest score.
        strongest: The strongest spike of the update over θ_c.
        effective_rank: The effective rank of the update's spikes.
    """

    step: int
    intruders: int
    rotated: int
    undecided: int
    worst: float
    strongest: float
    effective_rank: float


def _read_figures(name: str, saved: object) -> LayerFigures:
    """The saved figures of a layer; InputError if they are none."""
    counts = dict.fromkeys(("step", "intruders", "rotated", "undecided"), whole(0))
    numbers = dict.fromkeys(("worst", "strongest", "effective_rank"), NOT_NEGATIVE)
    return LayerFigures(**entries(name, saved, **counts, **numbers))


Model = Union[nn.Module, Sequence[Watched]]  # noqa: UP007 — Python 3.10
"""A model that PEFT has wrapped, or matrices to be watched."""


class Monitor:
    """Check a few layers every few steps, in turn, and keep the latest figures of each.

    A check solves for the leading tuned triplets, starting from those of the last check, and bounds
    their scores as the audit does (:func:`bulkedge.intruder.certify`) by some tens of thin products
    with the base, or by an SVD of the base if its shorter side is at most 384, which costs less.
    It keeps k vectors a layer and nothing else.

    If parameters are spread over processes (FSDP2), all processes must call ``step``.

    Args:
        model: A model wrapped by PEFT, on the device where it trains; or matrices, such as those of
            :func:`full_matrices`.
        every: Steps between checks.
        per_call: How many layers are checked at a time.
        top_k: How many leading directions are judged.
        epsilon: The paper's bound ε on scores, below which a direction counts as new.
        thresholds: θ_c by name, for matrices whose threshold is known already.
        adapter: Which adapter; the active one if None.
        modules: Patterns of the names of modules, or of matrices.

    Attributes:
        steps: The number of steps so far.
        figures: The latest figures of each layer that was checked, by name.

    Raises:
        InputError: If a number is not positive, there is nothing to watch, two matrices have the
            same name, or a base has no threshold.

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
        epsilon: float = DEFAULT_EPSILON,
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
            self.matrices = select(modules, members(model, "tuned_map"), lambda x: x.name)
        _require_names([matrix.name for matrix in self.matrices])
        self.thresholds = measure_thresholds(self.matrices, thresholds)
        self.steps = self._next = 0
        self.figures: dict[str, LayerFigures] = {}
        self._last: dict[str, tuple[Tensor, Tensor]] = {}
        self._started, self._seconds = time.perf_counter(), 0.0

    def step(self) -> bool:
        """To be called after each step of the optimiser.

        Returns:
            Whether layers were checked at this step.
        """
        self.steps += 1
        if self.steps % self.every:
            return False
        self.check(self.per_call)
        return True

    def check(self, count: int | None = None) -> None:
        """Check the next layers now.

        Args:
            count: How many layers; all of them if None.

        Raises:
            InputError: If a weight is not finite: training has diverged.
        """
        _wait_for_gpu()
        started, layers = time.perf_counter(), len(self.matrices)
        with torch.no_grad():
            for _ in range(layers if count is None else min(count, layers)):
                matrix = self.matrices[self._next % layers]
                try:
                    self.figures[matrix.name] = self._look_at(matrix)
                except InputError as error:
                    raise InputError(f"{matrix.name}: after step {self.steps}: {error}") from error
                self._next += 1
        self._seconds += time.perf_counter() - started

    @property
    def worst_layer(self) -> str | None:
        """The name of the layer with the lowest known score; None before the first check."""
        return min(self.figures, key=lambda name: self.figures[name].worst, default=None)

    @property
    def complete(self) -> bool:
        """Whether every layer has been checked."""
        return len(self.figures) == len(self.matrices)

    def metrics(self) -> dict[str, float]:
        """The latest figures of all layers, as numbers to log; empty before the first check.

        Returns:
            ``bulkedge/coverage``, the fraction of layers that were checked so far; over these
            layers ``worst_score`` (lowest), ``strongest_spike`` (highest), ``effective_rank`` and
            ``intruders_per_layer`` (means); and ``overhead``, the monitor's fraction of the time.
            The counts ``intruders``, ``rotated`` and ``undecided`` are totals over all layers, and
            absent until every layer has been checked: a total over some layers would grow with the
            coverage.
        """
        if not self.figures:
            return {}
        seen = list(self.figures.values())
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        found = {
            "coverage": len(seen) / len(self.matrices),
            "intruders_per_layer": sum(layer.intruders for layer in seen) / len(seen),
            "worst_score": min(layer.worst for layer in seen),
            "strongest_spike": max(layer.strongest for layer in seen),
            "effective_rank": sum(layer.effective_rank for layer in seen) / len(seen),
            "overhead": self._seconds / elapsed,
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
        """Continue from a state.

        Raises:
            InputError: If it is the state of other layers, or not what :meth:`state_dict` returns;
                then nothing is changed.
        """
        rules = {"steps": whole(0), "next": whole(0), "thresholds": BY_NAME, "layers": BY_NAME}
        saved = entries(type(self).__name__, state, **rules)
        thresholds, names = known_thresholds(saved["thresholds"]), list(self.thresholds)
        require_same_layers(names, thresholds)
        require_same_layers(names, [*names, *saved["layers"]])  # some may not be checked yet
        figures = {name: _read_figures(name, x) for name, x in saved["layers"].items()}
        self.steps, self._next = saved["steps"], saved["next"]
        self.thresholds, self.figures = thresholds, figures

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
        found = judge_vectors(
            matrix.base_map(), tuned, "left", subspace=2 * self.top_k, epsilon=self.epsilon
        )
        verdicts = [direction.verdict for direction in found]
        scores = [direction.score for direction in found]
        rotated = sum(map(verdicts.count, COUNTED[:-1]))  # milder than intruders
        gamma = matrix.strengths
        strongest = float(gamma[0]) if len(gamma) else 0.0
        return LayerFigures(
            step=self.steps,
            intruders=sum(score < self.epsilon for score in scores) - rotated,
            rotated=rotated,
            undecided=verdicts.count(Verdict.UNDECIDED),
            worst=min(scores, default=1.0),  # a weight of zeros has no directions
            strongest=strongest / self.thresholds[matrix.name],
            effective_rank=effective_rank(gamma),
        )


def _require_names(names: Sequence[str]) -> None:
    """InputError unless there are matrices to watch, each with a name of its own."""
    if not names or len(set(names)) < len(names):
        twice = [name for name in names if names.count(name) > 1]
        got = f"two named {twice[0]}" if twice else "none"
        raise InputError(f"expected matrices to watch, each with a name of its own, got {got}")


def _wait_for_gpu() -> None:
    """Let queued work of the training finish, so that it does not count as the monitor's time."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
