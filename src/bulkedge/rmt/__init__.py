"""Random-matrix theory of weights: laws, bulks, edges, and what a spike does to them.

What noise alone looks like (:class:`MarchenkoPastur`, :class:`Semicircle`,
:class:`TracyWidom`), where it ends in given singular values (:func:`fit_bulk`, :func:`edge_test`),
and when something added to it stands out (:func:`spike`), of noise or of any law
(:class:`LawBulk`).  Everything takes numbers, NumPy arrays or torch tensors, and answers in kind.
"""

from ._law import Law
from .bulk import Bulk, Spike, Traces
from .edge import BulkFit, edge_test, fit_bulk
from .empirical_bulk import Edge, EmpiricalBulk, count_outliers, fit_edge
from .law_bulk import LawBulk, SymmetricLawBulk
from .marchenko_pastur import MarchenkoPastur, QuarterCircle, SingularValueLaw
from .semicircle import Semicircle, SpikedSemicircle
from .spike import Wigner, spike, strength
from .tracy_widom import TracyWidom
from .transform import d_transform, resolvent_traces, stieltjes, stieltjes_inversion
from .white_bulk import WhiteBulk

__all__ = [
    "Bulk",
    "BulkFit",
    "Edge",
    "EmpiricalBulk",
    "Law",
    "LawBulk",
    "MarchenkoPastur",
    "QuarterCircle",
    "Semicircle",
    "SingularValueLaw",
    "Spike",
    "SpikedSemicircle",
    "SymmetricLawBulk",
    "Traces",
    "TracyWidom",
    "WhiteBulk",
    "Wigner",
    "count_outliers",
    "d_transform",
    "edge_test",
    "fit_bulk",
    "fit_edge",
    "resolvent_traces",
    "spike",
    "stieltjes",
    "stieltjes_inversion",
    "strength",
]
