"""Second moments of the inputs of a model's layers: what its weights are used on."""

from __future__ import annotations

from ._collect import Collector
from ._moments import Layer, Moments, alike, sample
from ._texts import read_texts

__all__ = ["Collector", "Layer", "Moments", "alike", "read_texts", "sample"]
