"""The effect of a low-rank update on the singular values and vectors of its base.

Exactly (:class:`Secular`), to second order (:func:`singular_perturbation`), and in expectation,
from singular values alone (:func:`predict`, :func:`budget`).
"""

from ._by_solves import Cholesky, ConjugateGradients, SystemSolver
from ._measure import MOMENTS, measure_base, moment_misfit
from ._products import Measured, measure
from ._update_svd import UpdateSVD, effective_rank, update_svd
from .bracket import ScaleBracket, ScaledDirections, bracket_scale
from .critical import (
    aligned_scale,
    aligned_scores,
    critical_scale,
    generic_scale,
)
from .perturbation import (
    EigenPerturbation,
    SingularPerturbation,
    eigen_perturbation,
    eigenvalue_perturbation,
    singular_perturbation,
)
from .predict import (
    BaseSpectrum,
    Budget,
    Expectation,
    Prediction,
    budget,
    predict,
    predict_spikes,
)
from .resolvent import resolvent_update, resolvent_update_low_rank, secular_function
from .secular import Outliers, Secular

__all__ = [
    "MOMENTS",
    "BaseSpectrum",
    "Budget",
    "Cholesky",
    "ConjugateGradients",
    "EigenPerturbation",
    "Expectation",
    "Measured",
    "Outliers",
    "Prediction",
    "ScaleBracket",
    "ScaledDirections",
    "Secular",
    "SingularPerturbation",
    "SystemSolver",
    "UpdateSVD",
    "aligned_scale",
    "aligned_scores",
    "bracket_scale",
    "budget",
    "critical_scale",
    "effective_rank",
    "eigen_perturbation",
    "eigenvalue_perturbation",
    "generic_scale",
    "measure",
    "measure_base",
    "moment_misfit",
    "predict",
    "predict_spikes",
    "resolvent_update",
    "resolvent_update_low_rank",
    "secular_function",
    "singular_perturbation",
    "update_svd",
]
