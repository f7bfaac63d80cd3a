"""Upper bounds of ‖A‖₂: a proof by Cholesky factorisation, a bet on a random Lanczos start.

Iterations bound the norm from below; a Lipschitz constant needs the other side.
"""

from ._bound import Certificate, NormBound
from .probable import Probable
from .rigorous import Rigorous

__all__ = ["Certificate", "NormBound", "Probable", "Rigorous"]
