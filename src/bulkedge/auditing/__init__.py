"""The audit of a plan: rows are computed, stored and merged."""

from __future__ import annotations

from .engine import Engine, LocalEngine, RayEngine
from .inputs import keep_out, keep_out_of_inputs
from .journal import refuse_other_kind
from .lock import JOURNAL_NAME, hold, refuse_held
from .run import Notice, Progress, run_plan, run_plans
from .shard import Shard, merge_shards

__all__ = [
    "JOURNAL_NAME",
    "Engine",
    "LocalEngine",
    "Notice",
    "Progress",
    "RayEngine",
    "Shard",
    "hold",
    "keep_out",
    "keep_out_of_inputs",
    "merge_shards",
    "refuse_held",
    "refuse_other_kind",
    "run_plan",
    "run_plans",
]
