"""Laws of random matrices: what singular values and eigenvalues noise alone would have."""

from ._law import Law
from .marchenko_pastur import MarchenkoPastur, QuarterCircle, SingularValueLaw
from .semicircle import Semicircle, SpikedSemicircle
from .tracy_widom import TracyWidom

__all__ = [
    "Law",
    "MarchenkoPastur",
    "QuarterCircle",
    "Semicircle",
    "SingularValueLaw",
    "SpikedSemicircle",
    "TracyWidom",
]
