"""Spectral instruments for neural-network weights.

>>> import bulkedge
>>> record = bulkedge.audit("path/to/base", "path/to/tuned")  # doctest: +SKIP
>>> record.summary.new_directions  # doctest: +SKIP
7

Names are loaded on first use: ``import bulkedge`` alone costs nothing, not even torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from ._audit import audit as audit
    from ._errors import AdapterError as AdapterError
    from ._errors import BulkedgeError as BulkedgeError
    from ._errors import CheckpointError as CheckpointError
    from ._errors import ConvergenceError as ConvergenceError
    from ._errors import DegenerateWarning as DegenerateWarning
    from ._errors import InputError as InputError
    from ._errors import MissingExtraError as MissingExtraError
    from ._errors import NothingAuditedError as NothingAuditedError
    from ._errors import OutputError as OutputError
    from ._errors import RecipeError as RecipeError
    from ._moments import collect_moments as collect_moments
    from ._repair import repair as repair
    from .auditing import LocalEngine as LocalEngine
    from .auditing import RayEngine as RayEngine
    from .auditing import Shard as Shard
    from .auditing import merge_shards as merge_shards
    from .budgeting import BudgetRecord as BudgetRecord
    from .budgeting import budget as budget
    from .budgeting import lora_config as lora_config
    from .moments import Moments as Moments
    from .records import Recipe as Recipe
    from .records import Record as Record
    from .repairing import Clip as Clip
    from .repairing import Project as Project
    from .repairing import Protect as Protect
    from .repairing import RepairRecord as RepairRecord
    from .repairing import Rescale as Rescale
    from .repairing import Scale as Scale
    from .repairing import Shrink as Shrink
    from .spectral import project_spectral_ball as project_spectral_ball
    from .spectral import spectral_cap as spectral_cap
    from .spectral import spectral_norm as spectral_norm
    from .tradeoff import FrontierRecord as FrontierRecord
    from .tradeoff import frontier as frontier
    from .triplet import singular_triplet as singular_triplet
    from .triplet import truncate as truncate

_HOME = {
    "audit": "._audit",
    "LocalEngine": ".auditing",
    "RayEngine": ".auditing",
    "Recipe": ".records",
    "Record": ".records",
    "Shard": ".auditing",
    "merge_shards": ".auditing",
    "budget": ".budgeting",
    "lora_config": ".budgeting",
    "BudgetRecord": ".budgeting",
    "collect_moments": "._moments",
    "Moments": ".moments",
    "Protect": ".repairing",
    "repair": "._repair",
    "Project": ".repairing",
    "RepairRecord": ".repairing",
    "Rescale": ".repairing",
    "Scale": ".repairing",
    "Shrink": ".repairing",
    "Clip": ".repairing",
    "FrontierRecord": ".tradeoff",
    "frontier": ".tradeoff",
    "singular_triplet": ".triplet",
    "truncate": ".triplet",
    "spectral_norm": ".spectral",
    "spectral_cap": ".spectral",
    "project_spectral_ball": ".spectral",
    "BulkedgeError": "._errors",
    "AdapterError": "._errors",
    "CheckpointError": "._errors",
    "ConvergenceError": "._errors",
    "DegenerateWarning": "._errors",
    "InputError": "._errors",
    "MissingExtraError": "._errors",
    "NothingAuditedError": "._errors",
    "OutputError": "._errors",
    "RecipeError": "._errors",
}
_MODULES = (
    "auditing",
    "budgeting",
    "checkpoint",
    "comparison",
    "intruder",
    "moments",
    "records",
    "repairing",
    "report",
    "rmt",
    "simulate",
    "spectral",
    "tradeoff",
    "triplet",
    "tune",
    "update",
)

__all__ = ["__version__", *_HOME, *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name], __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
