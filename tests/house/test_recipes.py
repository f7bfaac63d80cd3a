"""The recipes of CONTRIBUTING.md, followed to the letter in a copy of the tree, end green."""

import pytest
from recipe import ALWAYS, Copy, follow_and_check

pytestmark = pytest.mark.timeout(300)

SOLVERS, ADJOINTS, TRIPLET, RMT = (
    f"src/bulkedge/{place}/__init__.py"
    for place in ("triplet/solver", "triplet/adjoint", "triplet", "rmt")
)
HOUSE = "docs/architecture.md"

SOLVER = '''"""A full SVD of the matrix that its products with the unit vectors are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._linmap import LinearMap
from bulkedge.triplet._result import SingularTriplets, Status, neighbour_gaps

from ._start import Randomness


@dataclass(frozen=True)
class ByColumns:
    """All triplets from n products, of which k are kept."""

    def compute(
        self, A: LinearMap, k: int, start: Tensor | None, generator: Randomness
    ) -> SingularTriplets:
        """The k leading triplets; a start helps nothing here, and nothing is drawn."""
        matrix = A.matmat(torch.eye(A.shape[1], dtype=A.dtype, device=A.device)).double()
        U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
        u, sigma, v = (x.to(A.dtype) for x in (U[:, :k], S[:k], Vt[:k].mT))
        residuals = torch.hypot(
            torch.linalg.vector_norm(A.matmat(v) - u * sigma, dim=0),
            torch.linalg.vector_norm(A.rmatmat(u) - v * sigma, dim=0),
        )
        gaps = neighbour_gaps(S, k, complete=True).to(A.dtype)
        return SingularTriplets(
            sigma, u, v, residuals, gaps, steps=1, passes=3, status=Status.CONVERGED
        )
'''

ADJOINT = '''"""Dense solution of the whole singular system, by its pseudo-inverse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._system import System


@dataclass(frozen=True)
class PseudoInverse:
    """Column by column, with the projections of both sides that make the solution unique."""

    def solve(self, system: System) -> tuple[Tensor, Tensor]:
        """See :class:`~bulkedge.triplet.adjoint.AdjointSolver`."""
        Phi, Psi = system.filled
        A = system.A.to_dense()
        m, n = A.shape
        upper, lower = torch.eye(m).to(A), torch.eye(n).to(A)
        P, Q = [], []
        for i, sigma in enumerate(system.sigma):
            K = torch.cat(
                [torch.cat([sigma * upper, -A], 1), torch.cat([-A.mT, sigma * lower], 1)]
            )
            both = torch.linalg.pinv(K, rtol=1e-9) @ torch.cat([Phi[:, i], Psi[:, i]])
            P.append(both[:m])
            Q.append(both[m:])
        return system.outside_u(torch.stack(P, 1)), system.outside_v(torch.stack(Q, 1))
'''

LAW = '''"""The semicircle law, by its radius."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from torch import Tensor

from bulkedge._fields import POSITIVE, check_fields

from ._arc import Arc
from ._law import AffineLaw


@dataclass(frozen=True)
class HalfDisc(AffineLaw):
    """``2√(R² − x²)/(πR²)`` on [−R, R]."""

    radius: float = 2.0

    def __post_init__(self) -> None:
        check_fields(self, radius=POSITIVE)

    @property
    def sigma(self) -> float:
        """``R/2``."""
        return self.radius / 2

    def mean(self) -> float:
        """``0``."""
        return 0.0

    def var(self) -> float:
        """``R²/4``."""
        return self.sigma**2

    def bulk_support(self) -> tuple[float, float]:
        """``(−R, R)``."""
        return -self.radius, self.radius

    @property
    def _r(self) -> float:
        return 0.0

    @functools.cached_property
    def _arc(self) -> Arc:
        return Arc.of(0.0)

    def _density(self, x: Tensor) -> Tensor:
        a, b = self._gaps(x)
        return 2 * a * b / (math.pi * self.radius**2)
'''


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


def test_a_solver(copy):
    edits = [
        ("src/bulkedge/triplet/solver/by_columns.py", SOLVER),
        (SOLVERS, "from .dense import", "from .by_columns import ByColumns\n"),
        (SOLVERS, '    "DenseSVD",\n', '    "ByColumns",\n'),
        (TRIPLET, "    DenseSVD,\n", "    ByColumns,\n"),
        (TRIPLET, '    "DenseSVD",\n', '    "ByColumns",\n'),
        ("tests/triplet/test_solvers.py", "    DenseSVD,\n", "    ByColumns,\n"),
        ("tests/triplet/test_solvers.py", '    "dense": D', '    "by_columns": ByColumns(),\n'),
        (HOUSE, "`lanczos`", "`by_columns`, "),
    ]
    names = {
        "tests/house/test_references.py": ("what_a_text_names", "code_that_the_pages"),
        "tests/test_docs.py": ("every_source_file_is_in", "every_public_module_is_in"),
        "tests/test_public.py": ("public_names",),
    }
    tests = ("tests/triplet/test_solvers.py", "tests/triplet/test_derivative.py")
    new = "by_columns and (leading or pseudo or explicit)"
    follow_and_check(copy, "Add a solver", edits, tests, new, always=ALWAYS | names)


@pytest.mark.slow
def test_an_adjoint(copy):
    edits = [
        ("src/bulkedge/triplet/adjoint/pseudo.py", ADJOINT),
        (ADJOINTS, "from .push_through", "from .pseudo import PseudoInverse\n"),
        (ADJOINTS, '    "PushThrough",\n', '    "PseudoInverse",\n'),
        (TRIPLET, "    PushThrough,\n", "    PseudoInverse,\n"),
        (TRIPLET, '    "PushThrough",\n', '    "PseudoInverse",\n'),
        ("tests/triplet/test_derivative.py", "    PushThrough,\n", "    PseudoInverse,\n"),
        ("tests/triplet/test_derivative.py", '    "kkt": K', '    "pseudo": PseudoInverse(),\n'),
        (HOUSE, "`minres`", "`pseudo`, "),
    ]
    tests = ("tests/triplet/test_derivative.py",)
    follow_and_check(copy, "Add an adjoint", edits, tests, "pseudo and dense")


@pytest.mark.slow
def test_a_law(copy):
    edits = [
        ("src/bulkedge/rmt/half_disc.py", LAW),
        (RMT, "from .law_bulk import", "from .half_disc import HalfDisc\n"),
        (RMT, '    "Law",\n', '    "HalfDisc",\n'),
        ("tests/rmt/test_laws.py", "    MarchenkoPastur,\n", "    HalfDisc,\n"),
        (
            "tests/rmt/test_laws.py",
            "    if isinstance(law, SpikedSemicircle):",
            (
                "    if isinstance(law, HalfDisc):\n"
                "        r = law.radius\n"
                "        return 2 * root(r**2 - x**2) / (pi * r**2)\n"
            ),
        ),
        ("tests/rmt/test_laws.py", "    Semicircle(0.7),\n", "    HalfDisc(1.4),\n"),
        (HOUSE, "`semicircle`", "`half_disc`, "),
    ]
    follow_and_check(copy, "Add a law", edits, ("tests/rmt/test_laws.py",), "HalfDisc")
