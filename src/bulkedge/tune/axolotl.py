"""A plugin of axolotl: fine-tunes are held and watched by its configuration alone.

plugins:
- bulkedge.tune.axolotl.BulkedgePlugin
bulkedge:                   # may be left out: this is what it does by default
hold: leading             # leading, edge, drift, or null
every: 50                 # settings of Hold and of IntruderMonitor, by their names
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from bulkedge._errors import InputError

if TYPE_CHECKING:
    BasePlugin = object
else:
    try:
        from axolotl.integrations.base import BasePlugin
    except ImportError:  # these docs can be read without it
        BasePlugin = object


class BulkedgeArgs(BaseModel):
    """What axolotl adds to the fields of its configuration, so that it accepts them.

    Example:
        >>> BulkedgeArgs(bulkedge={"hold": "edge"}).bulkedge
        {'hold': 'edge'}
    """

    bulkedge: dict[str, Any] | None = None


class BulkedgePlugin(BasePlugin):
    """Adds :class:`~bulkedge.tune.Hold` and :class:`~bulkedge.tune.IntruderMonitor` to a trainer.

    Example:
        >>> BulkedgePlugin().get_input_args()
        'bulkedge.tune.axolotl.BulkedgeArgs'
    """

    def get_input_args(self) -> str:
        """The path of :class:`BulkedgeArgs`, by which axolotl checks its configuration."""
        return f"{__name__}.{BulkedgeArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """The callbacks; axolotl calls this before it makes the trainer.

        Args:
            cfg: The configuration of axolotl.
            model: The model, which is looked at when training begins.

        Returns:
            A holder, unless ``hold`` is null, and a monitor.

        Raises:
            InputError: If a setting is none of theirs.
        """
        from .trainer import Hold, IntruderMonitor

        given = getattr(cfg, "bulkedge", None)
        if not (given is None or isinstance(given, Mapping)):
            raise InputError(f"expected settings by name in bulkedge:, got {given!r:.60}")
        settings = dict(given or {})
        what = settings.pop("hold", "leading")
        of_hold, of_monitor = _names(Hold), _names(IntruderMonitor)
        if odd := sorted(set(settings) - of_hold - of_monitor):
            raise InputError(
                f"bulkedge: expected settings of Hold or IntruderMonitor, got {odd[0]!r}; known "
                f"are hold, {', '.join(sorted(of_hold | of_monitor))}"
            )
        own = {name: x for name, x in settings.items() if name in of_monitor}
        monitor = IntruderMonitor(**own)
        if what is None:
            return [monitor]
        held = {name: x for name, x in settings.items() if name in of_hold}
        return [Hold(what, **held), monitor]


def _names(kind: type) -> set[str]:
    """The settings of a callback that a configuration can give."""
    return set(inspect.signature(kind).parameters) - {"what", "watch"}
