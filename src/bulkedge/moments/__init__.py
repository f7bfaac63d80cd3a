"""Second moments of the inputs of a model's layers: what its weights are used on."""

from __future__ import annotations

from ._collect import Collector
from ._layer import Layer, alike, sample
from ._moments import Moments
from ._sketch import Moment, Sketch, diagonal, output_power, right_times, sketch, to_dense, width
from ._texts import read_texts

__all__ = [
    "Collector", "Layer", "Moment", "Moments", "Sketch", "alike", "diagonal", "output_power",
    "read_texts", "right_times", "sample", "sketch", "to_dense", "width",
]  # fmt: skip
