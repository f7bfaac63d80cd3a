"""Intruder dimensions while a model trains: layers are checked every few steps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import (
    DEFAULT_EPSILON,
    POSITIVE_SHARE,
    check_values,
    each,
    optional,
    whole,
)
from bulkedge._linmap import LinearMap
from bulkedge.intruder import COUNTED, Verdict, judge, judge_vectors
from bulkedge.moments import Moments
from bulkedge.triplet import GolubKahan, singular_triplet
from bulkedge.update import effective_rank

from ._drift import layer_drifts, measure
from ._figure import draw
from ._forecast import Forecast, forecasts, strengths_of
from ._layers import require_same_layers
from ._matrix import like
from ._saved import BY_NAME, entries
from ._thresholds import Thresholds, known_thresholds, measure_lines, measure_thresholds
from ._watched import Model, Watched, watched_matrices
from .figures import LayerFigures, energy_share, read_figures, summary, totals

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ANGLE = 1e-2
"""To what sine the tuned vectors are sought; it widens every interval."""
KEPT_AS = torch.float16
"""The dtype in which the vectors are kept from which the next check starts."""


class Monitor:
    """Check layers every few steps, all or a few in turn, and keep the latest figures of each.

    A figure counts for one round: the steps in which each layer has its turn.  One from before the
    first step does not count after it.  So no count is of layers that were lost sight of.

    A check solves for the leading tuned triplets, starting from those of the last check.  It bounds
    their scores as the audit does (:func:`bulkedge.intruder.certify`), by some tens of thin
    products with the base.  If the base's shorter side is at most 384, an SVD of it costs less, and
    is used.  The monitor keeps k vectors per layer and nothing else.

    If parameters are spread over processes (FSDP2), all processes must call ``step``.

    Args:
        model: A model wrapped by PEFT, on the device where it trains; or matrices, such as those of
            :func:`full_matrices`.
        every: Steps between checks.
        per_call: How many layers are checked at a time, in turn; all if None.  A few cost less, but
            then the figures are of different steps.
        top_k: How many leading directions are judged.
        epsilon: The paper's bound ε on scores, below which a direction counts as new.
        thresholds: θ_c by name, or a file that ``bulkedge budget`` has written, for matrices whose
            threshold is known already.
        moments: Second moments of the base's inputs, for the drift of each layer.
        adapter: Which adapter; the active one if None.
        include: Patterns of the names of modules, or of matrices.
        exclude: Patterns of the names of those that are left out.
        full: Whether weights that are trained in full are watched, too, for which a copy of each
            base is kept; if None, they are in a model without adapters.
        base: The weights before training by name, if the model has been trained already.

    Attributes:
        steps: The number of steps so far.
        thresholds: θ_c of each layer that has one, by name.
        top_k_thresholds: θ_k of each layer of which it is known, by name.
        figures: The latest figures of each layer that was checked, by name.
        history: ``(step, metrics)`` of every check.

    Raises:
        InputError: If a number is not positive, there is nothing to watch, two matrices have the
            same name, or the moments are of another model or lack a layer.

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
        per_call: int | None = None,
        top_k: int = 10,
        epsilon: float = DEFAULT_EPSILON,
        thresholds: Thresholds | None = None,
        moments: Moments | None = None,
        adapter: str | None = None,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        full: bool | None = None,
        base: Mapping[str, Tensor] | None = None,
    ) -> None:
        counts, own = {"every": every, "top_k": top_k}, {"per_call": per_call}
        check_values(self, epsilon=(epsilon, POSITIVE_SHARE), **each(counts, whole(1)))
        check_values(self, **each(own, optional(whole(1))))
        self.every, self.top_k, self.epsilon = every, top_k, epsilon
        self.matrices = watched_matrices(model, adapter, include, exclude, full, base)
        self.per_call = min(per_call or len(self.matrices), len(self.matrices))
        lines = measure_lines(self.matrices, thresholds)
        self.thresholds, self.top_k_thresholds = lines["edge"], lines["leading"]
        drifts = [] if moments is None else layer_drifts(self.matrices, moments)
        self._drifts = {drift.matrix.name: drift for drift in drifts}
        self.steps = self._next = 0
        self.figures: dict[str, LayerFigures] = {}
        self._last: dict[str, tuple[Tensor, Tensor]] = {}
        self._started, self._seconds = time.perf_counter(), 0.0
        self._looks, self._looking = 0, 0.0
        self.history: list[tuple[int, dict[str, float]]] = []

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
            count: How many layers; if None all of them, decided as an audit is: where the
                certificate leaves a verdict open, by SVDs of that layer.

        Raises:
            InputError: If a weight is not finite: training has diverged.
        """
        _wait_for_gpu()
        started, layers = time.perf_counter(), len(self.matrices)
        with torch.no_grad():
            for _ in range(layers if count is None else min(count, layers)):
                matrix = self.matrices[self._next % layers]
                try:
                    self.figures[matrix.name] = self._look_at(matrix, decide=count is None)
                except InputError as error:
                    what = str(error).removeprefix(f"{matrix.name}: ")
                    raise InputError(f"{matrix.name}: after step {self.steps}: {what}") from error
                self._next += 1
        self._seconds += _since(started)
        self.history.append((self.steps, self.metrics()))

    @property
    def worst_layer(self) -> str | None:
        """The name of the layer with the lowest known score; None where no figures count."""
        seen = self._seen()
        return min(seen, key=lambda name: seen[name].worst, default=None)

    @property
    def complete(self) -> bool:
        """Whether every layer was checked in the last round."""
        return len(self._seen()) == len(self.matrices)

    @property
    def round(self) -> int:
        """In how many steps every layer has its turn."""
        return self.every * -(-len(self.matrices) // self.per_call)

    @property
    def oldest_check(self) -> int:
        """How many steps ago the layer was checked that was so longest ago; all without a check."""
        return self.steps - min(
            self.figures[x.name].step if x.name in self.figures else 0 for x in self.matrices
        )

    @property
    def intruders_so_far(self) -> float:
        """How many there are in the layers that were checked in the last round."""
        return float(sum(layer.intruders for layer in self._seen().values()))

    def _seen(self) -> dict[str, LayerFigures]:
        """The figures that still count, by name: of the last round, and of a trained update."""
        first = min(self.steps, max(1, self.steps - self.round + 1))
        return {name: layer for name, layer in self.figures.items() if layer.step >= first}

    def metrics(self) -> dict[str, float]:
        """The latest figures of all layers, as numbers to log; empty before the first check.

        Returns:
            ``bulkedge/coverage``, the fraction of layers that were checked in the last round, not
            counting a check before the first step, and ``oldest_check``, how many steps ago the
            layer was checked that was so longest ago.  Over the layers of the last round:
            ``lowest_score``, ``strongest_spike`` (the highest over θ_c), ``energy_share``,
            ``effective_rank``, ``new_directions_per_layer`` and ``intruders_per_layer`` (means).
            With moments also ``drift`` (of all of them, ``Σ tr(ΔW C ΔWᵀ)/Σ tr(W0 C W0ᵀ)``) and
            ``highest_drift``.  Of the monitor itself: ``check_seconds``, what a check of
            ``per_call`` layers takes, and ``overhead``, its fraction of the time.  The counts
            ``new_directions``, which is ``intruders`` and ``rotated``, and ``undecided`` are totals
            over all layers, and absent while the coverage is below 1.
        """
        if not self.figures:
            return {}
        seen = list(self._seen().values())
        found = {
            "coverage": len(seen) / len(self.matrices),
            "oldest_check": float(self.oldest_check),
        } | summary(seen)
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        if self.steps:
            found["overhead"] = self._seconds / elapsed
        found["check_seconds"] = self.check_seconds
        if self._drifts:
            found |= self._drift_in_all()
        if self.complete:
            found |= totals(seen)
        return {f"bulkedge/{name}": value for name, value in found.items()}

    @property
    def check_seconds(self) -> float:
        """What a check of ``per_call`` layers takes, in seconds, by the layers seen so far."""
        return self.per_call * self._looking / self._looks if self._looks else 0.0

    @property
    def seconds(self) -> float:
        """How long all checks so far have taken, in seconds."""
        return self._seconds

    def figure(self) -> Figure:
        """The run so far as a figure of matplotlib: a curve for each kind of figure over the steps.

        Returns:
            The figure; ``figure.savefig("run.png")`` writes it.

        Raises:
            InputError: If nothing was checked yet.
            MissingExtraError: Without matplotlib.
        """
        return draw(self.history, self.epsilon)

    def forecast(self, rates: Sequence[float]) -> list[Forecast]:
        """Which updates will reach θ_k, where new directions are leading ones, before the run ends.

        The strength of a LoRA that began at zero is taken to grow as a power of the sum of the
        learning rates.  Ask after some twenty steps or more.  DoRA and weights that are trained in
        full are left out.

        Cost: the Gram matrices of the factors; θ_k is measured if it is not known yet.

        Args:
            rates: The learning rate of every step of the run, those to come included.

        Returns:
            One entry for each layer with a threshold, the strongest at the end first.

        Raises:
            InputError: If there was no step yet, or there are not as many rates.
        """
        with torch.no_grad():
            unknown = [
                x for x in self.matrices
                if x.name in self.thresholds and x.name not in self.top_k_thresholds
            ]  # fmt: skip
            self.top_k_thresholds |= measure_thresholds(unknown, of="leading")
            now = strengths_of(self.matrices, self.top_k_thresholds)
        return forecasts(now, self.steps, rates)

    def _drift_in_all(self) -> dict[str, float]:
        """The drift of the layers that were checked, together and at most; of none, nothing."""
        pairs = [
            (self._drifts[name].output, layer.drift)
            for name, layer in self._seen().items()
            if layer.drift is not None  # not known of figures from a run without moments
        ]
        if not pairs:
            return {}
        moved = sum(output * drift for output, drift in pairs)
        return {
            "drift": moved / sum(output for output, _ in pairs),
            "highest_drift": max(drift for _, drift in pairs),
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
        """Continue from a state.

        Raises:
            InputError: If it is the state of other layers, or not what :meth:`state_dict` returns;
                then nothing is changed.
        """
        rules = {"steps": whole(0), "next": whole(0), "thresholds": BY_NAME, "layers": BY_NAME}
        saved = entries(type(self).__name__, state, **rules)
        thresholds, names = known_thresholds(saved["thresholds"]), [x.name for x in self.matrices]
        require_same_layers(self.thresholds, thresholds)
        require_same_layers(names, [*names, *saved["layers"]])  # some may not be checked yet
        figures = {name: read_figures(name, x) for name, x in saved["layers"].items()}
        self.steps, self._next = saved["steps"], saved["next"]
        self.thresholds, self.figures = thresholds, figures

    def _look_at(self, matrix: Watched, *, decide: bool) -> LayerFigures:
        """The figures of one layer; ``decide`` leaves no verdict open."""
        drift, theta = self._drifts.get(matrix.name), self.thresholds.get(matrix.name)
        gamma = matrix.strengths
        W = matrix.tuned_map()  # last: what reads a sharded layer frees what was gathered of it
        strongest = float(gamma[0]) if len(gamma) else 0.0
        # of the base itself nothing is new; the first is looked at all the same, for its time
        if self._looks and len(gamma) and strongest == 0:
            found, energy = [], 0.0
        else:
            started = time.perf_counter()
            found, energy = self._judged(matrix, W, decide=decide)
            self._looks, self._looking = self._looks + 1, self._looking + _since(started)
        verdicts = [direction.verdict for direction in found]
        return LayerFigures(
            step=self.steps,
            intruders=verdicts.count(Verdict.INTRUDER),
            rotated=sum(map(verdicts.count, COUNTED[:-1])),
            undecided=verdicts.count(Verdict.UNDECIDED),
            # a weight of zeros has no directions
            worst=min((direction.score for direction in found), default=1.0),
            energy=energy,
            strongest=None if theta is None else strongest / theta,
            effective_rank=effective_rank(gamma),
            drift=None if drift is None else measure([drift])[0],
        )

    def _judged(
        self, matrix: Watched, W: LinearMap, *, decide: bool
    ) -> tuple[Sequence[Any], float]:
        """The leading directions of one layer, and the share of energy of those that are new."""
        start = like(W, self._last.get(matrix.name))
        tuned = singular_triplet(
            W,
            min(self.top_k, *W.shape),
            solver=GolubKahan(vector_tol=ANGLE),
            init=start,
            strict=False,
        )
        self._last[matrix.name] = tuned.u.to(KEPT_AS), tuned.v.to(KEPT_AS)
        side: Any = getattr(matrix, "side", "left")
        found = judge_vectors(
            matrix.base_map(), tuned, side, subspace=2 * self.top_k, epsilon=self.epsilon
        )
        if decide and any(direction.verdict is Verdict.UNDECIDED for direction in found):
            found = judge(
                matrix.base_map(), W, self.top_k, epsilon=self.epsilon, sides=(side,), start=start
            ).directions
        return found, energy_share(tuned.sigma, [direction.verdict for direction in found])


def _since(started: float) -> float:
    """The seconds since a time."""
    return time.perf_counter() - started


def _wait_for_gpu() -> None:
    """Let queued work of the training finish, so that it does not count as the monitor's time."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
