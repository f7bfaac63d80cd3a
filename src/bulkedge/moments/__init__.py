"""Second moments of the inputs of a model's layers."""

from __future__ import annotations

from ._collect import Collector
from ._file import StoredLayer, is_of_tuned, stored_layers
from ._layer import Layer, alike, sample, sample_places
from ._match import match_weights
from ._moments import Moments
from ._read import read_texts
from ._sketch import Moment, Sketch, diagonal, output_power, right_times, sketch, to_dense, width

__all__ = [
    "Collector", "Layer", "Moment", "Moments", "Sketch", "StoredLayer", "alike", "diagonal",
    "is_of_tuned", "match_weights", "output_power", "read_texts", "right_times", "sample",
    "sample_places", "sketch", "stored_layers", "to_dense", "width",
]  # fmt: skip
