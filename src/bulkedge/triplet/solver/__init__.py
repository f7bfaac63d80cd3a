"""Forward solvers: one method a file, each a frozen dataclass with its tolerances.

A solver's ``compute(A, k, start, generator)`` sees numbers only: a map A with m ≥ n, the number of
triplets, a guess of the right vectors (or None), and the one source of randomness.  It returns
``SingularTriplets``.
"""

from bulkedge.triplet._thin_svd import thin_svd

from ._solver import Solver
from .auto import Auto
from .block_krylov import BlockKrylov
from .dense import DenseSVD
from .golub_kahan import GolubKahan
from .gradient import GradientAscent
from .lanczos import Lanczos
from .newton import Newton
from .power import Power
from .rayleigh import RayleighQuotient
from .refined import Refined
from .riemannian import Riemannian

__all__ = [
    "Auto",
    "BlockKrylov",
    "DenseSVD",
    "GolubKahan",
    "GradientAscent",
    "Lanczos",
    "Newton",
    "Power",
    "RayleighQuotient",
    "Refined",
    "Riemannian",
    "Solver",
    "thin_svd",
]
