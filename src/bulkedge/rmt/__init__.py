"""Random-matrix theory of weights: laws, bulks, edges, and the effect of spikes.

- What noise alone looks like: :class:`MarchenkoPastur`, :class:`Semicircle`, :class:`TracyWidom`.
- Where it ends in given singular values: :func:`fit_bulk`, :func:`edge_test`,
  :func:`lower_edge_test`.
- When something that is added to noise, or to any law (:class:`LawBulk`), stands out of it:
  :func:`spike`.
- How its values and vectors are spread: all values together (:class:`GaussianEnsemble`,
  :class:`LaguerreEnsemble`), neighbours (:func:`spacing_test`), the components of a vector
  (:func:`vector_test`).

Everything takes numbers, NumPy arrays or torch tensors, and returns the same kind.
"""

from ._law import Law
from .bulk import Bulk, Spike, Traces
from .edge import BulkFit, edge_test, fit_bulk
from .eigenvectors import PorterThomas, VectorTest, vector_test
from .empirical_bulk import Edge, EmpiricalBulk, count_outliers, fit_edge
from .ensembles import GaussianEnsemble, LaguerreEnsemble
from .law_bulk import LawBulk, SymmetricLawBulk
from .lower_edge import LowerEdge, fit_lower_edge, lower_edge_test
from .marchenko_pastur import MarchenkoPastur, QuarterCircle, SingularValueLaw
from .semicircle import Semicircle, SpikedSemicircle
from .spacings import SpacingTest, WignerSurmise, spacing_test, unfold
from .spike import Wigner, spike, strength
from .tracy_widom import TracyWidom
from .transform import d_transform, resolvent_traces, stieltjes, stieltjes_inversion
from .white_bulk import WhiteBulk

__all__ = [
    "Bulk",
    "BulkFit",
    "Edge",
    "EmpiricalBulk",
    "GaussianEnsemble",
    "LaguerreEnsemble",
    "Law",
    "LawBulk",
    "LowerEdge",
    "MarchenkoPastur",
    "PorterThomas",
    "QuarterCircle",
    "Semicircle",
    "SingularValueLaw",
    "SpacingTest",
    "Spike",
    "SpikedSemicircle",
    "SymmetricLawBulk",
    "Traces",
    "TracyWidom",
    "VectorTest",
    "WhiteBulk",
    "Wigner",
    "WignerSurmise",
    "count_outliers",
    "d_transform",
    "edge_test",
    "fit_bulk",
    "fit_edge",
    "fit_lower_edge",
    "lower_edge_test",
    "resolvent_traces",
    "spacing_test",
    "spike",
    "stieltjes",
    "stieltjes_inversion",
    "strength",
    "unfold",
    "vector_test",
]
