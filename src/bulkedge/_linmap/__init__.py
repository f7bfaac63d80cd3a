"""Linear maps known by their products: ``Dense``, ``LowRank``, ``Sum``, ``Adjoint``, ``Scaled``.

A fine-tuned weight ``W0 + s·B·A`` is the sum of a dense and a low-rank map.  Everything that this
package asks of it is a product with a thin block, so the sum is never formed.
"""

from .base import Gradients, LinearMap, MatrixLike, as_map, frobenius, times_power
from .counted import Counted
from .dense import Dense, Difference, Upcast
from .low_rank import LowRank
from .scaled import RowScaled, Scaled
from .size import image_exponent, innermost, not_finite, remedy
from .sums import Adjoint, Sum
from .tangent import Tangent

__all__ = [
    "Adjoint",
    "Counted",
    "Dense",
    "Difference",
    "Gradients",
    "LinearMap",
    "LowRank",
    "MatrixLike",
    "RowScaled",
    "Scaled",
    "Sum",
    "Tangent",
    "Upcast",
    "as_map",
    "frobenius",
    "image_exponent",
    "innermost",
    "not_finite",
    "remedy",
    "times_power",
]
