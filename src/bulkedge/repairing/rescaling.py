"""Updates made weaker: α in the configuration of an adapter, numbers in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._linmap import LowRank
from bulkedge._precision import exact, one_thread
from bulkedge.checkpoint import Adapter, LoraFactors, StoredUpdate
from bulkedge.checkpoint.adapter_config import CONFIG
from bulkedge.checkpoint.lora import alpha_of
from bulkedge.checkpoint.read import read_json
from bulkedge.comparison import Comparison, Pair, Plan
from bulkedge.comparison.pair import TILE
from bulkedge.records import Matrix, Recipe, Record
from bulkedge.update import measure

from .output import Output, in_front, key_of, module_of, pattern_of
from .rescale import Rescale
from .work import Options, Row, Work, covers

ADAPTERS = (
    "expected a PEFT adapter with its adapter_config.json, or a checkpoint, to rescale; this one "
    "keeps its scale elsewhere"
)
DORA = "DoRA: s·B·A is not all of its update; merge it into the model first"
BELOW = "below the limit already"
BIAS = "the bias that lora_bias adds to its output has the same α, and is scaled with it"
ROUNDED = "rounding to {} leaves the strongest spike at {:.4g} times the limit"
ROUNDING = 1e-4
"""By what part of the limit the rounding of a copy may lead beyond it, and nothing is said."""
SINGLE = 4
"""The bytes of a number from which on rounding is below what a spike is kept below its limit."""
FULL = "stored in full beside the adapter's factors: no α scales it"


class Rescaling(Work):
    """The updates that are made weaker.

    Args:
        plan: Both inputs.
        recipe: Of the audits.
        method: By how much.
        options: None are taken.

    Raises:
        InputError: If the fine-tune is an adapter without a configuration of PEFT.
    """

    def __init__(self, plan: Plan, recipe: Recipe, method: Rescale, options: Options) -> None:
        options.refuse_beside(method)
        super().__init__(plan, recipe, options)
        self.method = method
        self.factors: dict[str, float] = {}  # by the name of the base matrix
        self.equal: set[str] = set()  # names of those whose update is zero, whatever its α
        adapter = isinstance(plan.tuned, Adapter)
        if adapter and all(file.name != CONFIG for file in plan.tuned.files):
            raise InputError(ADAPTERS)

    @property
    def settings(self) -> dict[str, Any]:
        """See :attr:`Work.settings`."""
        if self.method.uniform is not None:
            return {"name": "rescale", "uniform": self.method.uniform}
        return {"name": "rescale", "level": self.method.level, "of": self.method.of}

    def affected(self, before: Record, only: tuple[str, ...]) -> list[Row]:
        """See :meth:`Work.affected`."""
        self.equal = {row.name for row in before.matrices if row.status == "unchanged"}
        return super().affected(before, only)

    def _concerns(self, row: Matrix) -> bool:
        """See :meth:`Work._concerns`: every matrix that the fine-tune has changed."""
        return row.status == "audited"

    def _treat(self, row: Row, output: Output | None) -> None:
        """Find the factor of one matrix, and write it where it is stored in full."""
        try:
            with one_thread():
                if isinstance(self.plan.tuned, Adapter):
                    self._of_adapter(row)
                else:
                    self._of_checkpoint(row, output)
        except InputError as error:
            row.note = str(error)

    def _of_adapter(self, row: Row) -> None:
        """The factor alone: it is written for all layers at once."""
        comparison = row.comparison
        if (factors := comparison.factors) is None:
            raise InputError(FULL)
        if factors.read_magnitude() is not None:
            raise InputError(DORA)
        if isinstance(factors, LoraFactors) and factors.initial:
            raise InputError(str(factors.correctable()))
        update = LowRank(*factors.read())
        row.update_norm = update.norm_bound()
        self._found(row, self._factor(comparison, float(update.singular_values()[0])))

    def _of_checkpoint(self, row: Row, output: Output | None) -> None:
        """The scaled matrix, over the one in the copy."""
        comparison = row.comparison
        if (stored := comparison.tuned) is None:
            raise InputError(FULL)
        base, tuned = comparison.base.read(), stored.read()
        row.update_norm = _norm(exact(t) - exact(b) for b, t in _tiles(base, tuned))
        spike = Pair(base, tuned, None).update_norm_bound() if self.method.level else 1.0
        s = self._factor(comparison, spike, base)
        self._found(row, s)
        if s == 1:
            return
        scaled = torch.cat([_between(b, t, s).to(tuned.dtype) for b, t in _tiles(base, tuned)])
        tiles = _tiles(base, tuned, scaled)
        row.error = _norm(exact(x) - _between(b, t, s) for b, t, x in tiles)
        if self.method.level and scaled.element_size() < SINGLE:
            row.note = self._beyond(Pair(base, scaled, None), s * spike, scaled.dtype)
        if output is not None:
            output.write_matrix(stored, scaled)

    def _beyond(self, copy: Pair, limit: float, dtype: torch.dtype) -> str | None:
        """What to know of a copy whose rounding leads beyond the limit."""
        found = copy.update_norm(self.recipe.seed) / limit
        return (
            ROUNDED.format(str(dtype).removeprefix("torch."), found)
            if found > 1 + ROUNDING
            else None
        )

    def _factor(self, comparison: Comparison, spike: float, base: Tensor | None = None) -> float:
        """S of one matrix."""
        if self.method.uniform is not None:
            return self.method.uniform
        W0 = comparison.base.read() if base is None else base
        found = measure(W0, top_k=self.recipe.top_k, seed=self.recipe.seed)
        return self.method.factor(spike, found.spectrum, self.recipe.top_k)

    def _found(self, row: Row, s: float) -> None:
        """What is known of a row once its factor is."""
        self.factors[row.comparison.base.name] = s
        row.status, row.rounds = ("left", 0) if s == 1 else ("repaired", 1)
        row.note = BELOW if s == 1 else self._with_its_bias(row)
        row.change, row.energy = (1 - s) * row.update_norm, 1 - s**2

    def _with_its_bias(self, row: Row) -> str | None:
        """What to know of factors that have a bias: PEFT adds ``s·(B A x + b)``."""
        if not isinstance(self.plan.tuned, Adapter) or row.comparison.factors is None:
            return None
        stored = {bias.name for bias in self.plan.tuned.unhandled if bias.set_aside}
        return BIAS if f"{module_of(row.comparison.tuned_name)}.bias" in stored else None

    def _store(self, output: Output | None) -> None:
        """Write α of all layers into the configuration of an adapter."""
        if not isinstance(self.plan.tuned, Adapter):
            return
        layers = self._layers()
        weaker = {key: (s, update) for key, (s, update) in layers.items() if s != 1}
        if output is None or not weaker:
            return
        if self.method.uniform is not None and self._every:
            _scale_all(output.folder / CONFIG, self.method.uniform)
        else:
            _scale_each(output.folder / CONFIG, weaker, rslora=self.plan.tuned.config.use_rslora)

    @property
    def _every(self) -> bool:
        """Whether each update that the adapter stores is scaled, so that one α says it for all.

        Stored, not planned: an update that is excluded, or cannot be judged, has an α as well.
        """
        adapter = self.plan.tuned
        if not isinstance(adapter, Adapter):
            return False
        done = {row.comparison.base.name for row in self.rows if row.status != "refused"}
        done |= self.equal & self.chosen
        mine = [c for c in self.plan.comparisons if c.base.name in done]
        if not all(map(covers, self._by_factors(mine))):
            return False
        scaled = {info.name for c in mine if c.factors is not None for info in c.factors.infos}
        parts = (*adapter.factors.values(), *adapter.wrapped)
        stored = {info.name for part in parts for info in part.infos}
        return scaled >= stored | {row.info.name for row in adapter.unhandled if not row.set_aside}

    def _layers(self) -> dict[str, tuple[float, StoredUpdate]]:
        """The factor of each layer that PEFT has an α for: the least of those of its matrices."""
        found: dict[str, tuple[float, StoredUpdate]] = {}
        rows = {row.comparison.base.name: row for row in self.rows}
        for key, comparisons in self._by_module().items():
            mine = [rows.get(comparison.base.name) for comparison in comparisons]
            done = [row for row in mine if row is not None and row.status != "refused"]
            if len(done) < len(mine) or not all(map(covers, self._by_factors(comparisons))):
                for row in done:
                    row.status, row.change, row.energy = "refused", 0.0, 0.0
                    row.note = "shares its α with a matrix that is not chosen; choose all of them"
                continue
            s = min(self.factors[row.comparison.base.name] for row in done)
            for row in done:
                self._found(row, s)
                if (update := row.comparison.factors) is not None:
                    found[key] = s, update
        return found

    def _by_factors(self, comparisons: Iterable[Comparison]) -> Iterable[list[Comparison]]:
        """The comparisons whose updates are parts of one product, together."""
        groups: dict[str, list[Comparison]] = {}
        for comparison in comparisons:
            if comparison.factors is not None:
                groups.setdefault(comparison.factors.infos[0].name, []).append(comparison)
        return groups.values()

    def _by_module(self) -> dict[str, list[Comparison]]:
        """The comparisons that share an α, where at least one is treated."""
        groups: dict[str, list[Comparison]] = {}
        tuned = self.plan.tuned
        for comparison in self.plan.comparisons:
            if comparison.factors is not None:
                groups.setdefault(key_of(comparison.tuned_name, tuned), []).append(comparison)
        treated = {key_of(row.comparison.tuned_name, tuned) for row in self.rows}
        return {key: group for key, group in groups.items() if key in treated}


def _scale_all(path: Path, s: float) -> None:
    """Every α of a configuration, those of patterns as well."""
    config = read_json(path)
    config["lora_alpha"] = s * config.get("lora_alpha", 8)
    if patterns := config.get("alpha_pattern"):
        config["alpha_pattern"] = {key: s * alpha for key, alpha in patterns.items()}
    _write(path, config)


def _scale_each(
    path: Path, layers: Mapping[str, tuple[float, StoredUpdate]], *, rslora: bool
) -> None:
    """The α of some layers, in front of the patterns that are there: the first match counts."""
    config = read_json(path)
    alphas = {
        pattern_of(key): alpha_of(s * (update.scale or 0.0), update.rank or 1, rslora=rslora)
        for key, (s, update) in layers.items()
    }
    config["alpha_pattern"] = in_front(alphas, config.get("alpha_pattern"))
    _write(path, config)


def _write(path: Path, config: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _between(base: Tensor, tuned: Tensor, s: float) -> Tensor:
    """``W0 + s (W − W0)`` of some rows, in float64."""
    return exact(base) + s * (exact(tuned) - exact(base))


def _tiles(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of several matrices, a tile at a time."""
    return zip(*(matrix.split(TILE) for matrix in matrices), strict=True)


def _norm(tiles: Iterable[Tensor]) -> float:
    """Frobenius norm of a matrix that comes in tiles."""
    return sum(float(tile.square().sum()) for tile in tiles) ** 0.5
