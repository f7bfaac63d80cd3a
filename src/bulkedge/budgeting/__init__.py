"""How strong an update of each matrix of a base may be, before there is one."""

from __future__ import annotations

from bulkedge.records.budget import BudgetRecord

from .patterns import lora_config
from .ranks import rank_config
from .run import budget

__all__ = ["BudgetRecord", "budget", "lora_config", "rank_config"]
