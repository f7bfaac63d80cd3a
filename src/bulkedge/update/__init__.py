"""What a low-rank update does to the singular values and vectors of its base, exactly."""

from ._by_solves import Cholesky, ConjugateGradients, SystemSolver
from .perturbation import (
    EigenPerturbation,
    SingularPerturbation,
    eigen_perturbation,
    eigenvalue_perturbation,
    singular_perturbation,
)
from .resolvent import resolvent_update, resolvent_update_low_rank, secular_function
from .secular import Outliers, Secular

__all__ = [
    "Cholesky",
    "ConjugateGradients",
    "EigenPerturbation",
    "Outliers",
    "Secular",
    "SingularPerturbation",
    "SystemSolver",
    "eigen_perturbation",
    "eigenvalue_perturbation",
    "resolvent_update",
    "resolvent_update_low_rank",
    "secular_function",
    "singular_perturbation",
]
