"""The recipes of CONTRIBUTING.md, followed to the letter in a copy of the tree, end green."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)  # each runs some hundred tests

ROOT = Path(__file__).parents[2]
COPIED = (
    "src", "tests", "docs", "examples", "benchmarks", "CONTRIBUTING.md", "README.md",
    "CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "NOTICE", "constraints.txt",
    "pyproject.toml",
)  # fmt: skip
NAMED = re.compile(r"`((?:[\w.-]+/)+(?:[\w.-]+\.(?:py|md))?)`")
SOLVERS, ADJOINTS, TRIPLET, RMT = (
    f"src/bulkedge/{place}/__init__.py"
    for place in ("triplet/solver", "triplet/adjoint", "triplet", "rmt")
)
# a name in the row of each folder in docs/architecture.md, before which another goes
ROWS = {"solver": "lanczos", "adjoint": "minres", "rmt": "semicircle"}
# what every recipe must leave green, whichever part of the package it adds to
ALWAYS = (
    "tests/test_public.py", "tests/house/test_imports.py", "tests/house/test_sizes.py",
    "tests/house/test_references.py",
    "tests/test_docs.py::test_every_source_file_is_in_the_picture_of_the_house",
    "tests/test_docs.py::test_every_public_module_is_in_the_reference",
)  # fmt: skip

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


def section(title):
    """A recipe, as it is written."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


class Copy:
    """A copy of the tree that notes which files a recipe made it touch."""

    def __init__(self, top):
        self.top, self.touched = top, set()
        skip = shutil.ignore_patterns("__pycache__")
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, top / name, **({"ignore": skip} if (ROOT / name).is_dir() else {}))
        (top / "build").symlink_to(ROOT / "build")

    def write(self, name, text):
        assert not (self.top / name).exists()
        (self.top / name).write_text(text, encoding="utf-8")
        self.touched.add(name)

    def put(self, name, before, added):
        """Add text before the first place where another stands."""
        text = (self.top / name).read_text(encoding="utf-8")
        head, found, tail = text.partition(before)
        assert found, (name, before)
        (self.top / name).write_text(head + added + found + tail, encoding="utf-8")
        self.touched.add(name)

    def run(self, *command):
        ended = subprocess.run(
            [sys.executable, *command], cwd=self.top, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(self.top / "src")}, timeout=800,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
        return ended.stdout


def is_named(path, title):
    """Whether a recipe names a file, or the folder that it goes to."""
    text = section(title) + section("Whatever you add")
    return any(path.endswith(name) or path.startswith(name) for name in NAMED.findall(text))


def follow(copy, title, edits, tests, new):
    """Every edit in a file that the recipe names; then tests of what is new, and of all parts."""
    for edit in edits:
        (copy.write if len(edit) == 2 else copy.put)(*edit)
    (place,) = (edit[0] for edit in edits if len(edit) == 2)
    folder, name = Path(place).parent.name, Path(place).stem
    copy.put("docs/architecture.md", f"`{ROWS[folder]}`", f"`{name}`, ")
    assert [path for path in copy.touched if not is_named(path, title)] == []
    passed = copy.run("-m", "pytest", "-o", "addopts=", "-m", "not slow", tests, "-k", new)
    assert re.search(r"[1-9]\d* passed", passed)
    copy.run("-m", "pytest", "-q", *ALWAYS)


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
    ]
    follow(
        copy,
        "Add a solver",
        edits,
        "tests/triplet",
        "by_columns and (leading or pseudo or explicit)",
    )


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
    ]
    follow(copy, "Add an adjoint", edits, "tests/triplet", "pseudo and dense")


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
    ]
    follow(copy, "Add a law", edits, "tests/rmt/test_laws.py", "HalfDisc")
