"""Holders, the monitor and penalties in a ``Trainer`` of transformers, or one that is built on it.

>>> from bulkedge.tune import Hold, IntruderMonitor
>>> callbacks = [Hold("leading"), IntruderMonitor()]
"""

from bulkedge._errors import MissingExtraError, install

try:
    import transformers.trainer_callback  # noqa: F401 — asked for before the others need it
except ImportError as error:
    raise MissingExtraError(f"bulkedge.tune.trainer needs transformers: {install('hf')}") from error

from ._figures import write_figures
from ._hold import Hold
from ._monitor import IntruderMonitor
from ._penalty import PenaltyMixin

__all__ = ["Hold", "IntruderMonitor", "PenaltyMixin", "write_figures"]
