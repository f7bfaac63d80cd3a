"""The recipes for engines, repairs, simulations, holders and PEFT methods, followed in a copy."""

import pytest
from recipe import Copy, follow_and_check

pytestmark = pytest.mark.timeout(300)

ENGINE = '''"""This process, the last matrix first."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from bulkedge._precision import one_thread
from bulkedge.auditing.matrix import audit_matrix
from bulkedge.comparison import Comparison
from bulkedge.records.recipe import Recipe
from bulkedge.records.rows import Matrix

from ._device import check_device


@dataclass(frozen=True)
class Backwards:
    """This process, from the last matrix to the first."""

    @property
    def name(self) -> str:
        """``backwards``."""
        return "backwards"

    @property
    def jobs(self) -> int:
        """One process."""
        return 1

    def check(self, recipe: Recipe) -> None:
        """See ``Engine``."""
        check_device(recipe.device)

    def rows(
        self, comparisons: Sequence[Comparison], recipe: Recipe
    ) -> Generator[tuple[int, Matrix]]:
        """See ``Engine``."""
        for i in reversed(range(len(comparisons))):
            with one_thread():
                row = audit_matrix(comparisons[i], recipe)
            yield i, row
'''

METHOD = '''@dataclass(frozen=True)
class Halve:
    """Halve the update of every matrix with an intruder: ``W0 + ΔW/2``.

    Attributes:
        rounds: See :class:`Method`.

    Raises:
        InputError: If ``rounds`` is not positive.

    Example:
        >>> Halve().rounds
        1
    """

    rounds: int = 1

    def __post_init__(self) -> None:
        check_fields(self, rounds=whole(1))

    def correct(self, case: Case) -> Correction:
        """See :class:`Method`."""
        gamma, u, v = case.spikes_above(0.0)
        return Correction(-0.5 * u * gamma, v)


'''

METHOD_TEST = """

@pytest.mark.parametrize("dense", [False, True])
def test_halve_halves_the_update(dense, tmp_path):
    B, A = spiked(40.0, 30.0)
    update, record = repaired(tmp_path, base(), B, A, Halve(), dense=dense)
    torch.testing.assert_close(update, B @ A / 2, rtol=1e-6, atol=1e-6)
    assert record.method == {"name": "halve", "rounds": 1}


"""

SIMULATION = '''"""The norm of noise, and its edge."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from . import _draw
from ._experiment import Experiment, Row
from ._model import noise, white_bulk
from ._table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("square", "wide")


class NormOfNoise(Experiment):
    """The largest singular value of noise against the edge of its bulk."""

    name: ClassVar[str] = "norm_of_noise"
    keys: ClassVar = {"shape": "square, or twice as wide"}
    measured: ClassVar = {"norm": "largest singular value over the threshold"}
    predicted: ClassVar = {"edge": "edge of the bulk over the threshold"}
    quick: ClassVar = {"size": 40, "repeats": 2}

    size: int = Field(200, ge=20, le=2000, description="Shorter side of a matrix.")

    def trial(self, generator: torch.Generator) -> Iterator[Row]:
        """See :meth:`Experiment.trial`."""
        for kind in KINDS:
            norm = torch.linalg.matrix_norm(noise(self._shape(kind), generator), 2)
            yield {"shape": kind, "norm": float(norm)}

    def theory(self, key: Row) -> Row:
        """See :meth:`Experiment.theory`."""
        return {"edge": white_bulk(self._shape(key["shape"])).edge}

    def plot(self, table: Table) -> Figure:
        """See :meth:`Experiment.plot`."""
        figure, (axes,) = _draw.panels(1, 1, note="points: means; line: edge")
        _draw.points(axes, table, "shape", "norm", series=0)
        _draw.curve(axes, range(len(table)), table.numbers("edge"), series=0)
        _draw.set_labels(axes, "shape", "norm")
        return figure

    def _shape(self, kind: str) -> tuple[int, int]:
        return self.size, self.size * (1 + KINDS.index(kind))
'''

CLAIM_TEST = """

def test_the_norm_of_noise_is_near_the_edge():
    table = run("norm_of_noise", size=100, repeats=5)
    np.testing.assert_allclose(table.numbers("norm"), table.numbers("edge"), rtol=0.05)


"""

HOLDER = '''"""Updates of bounded norm."""

from __future__ import annotations

from .holder import AdapterHolder


class BoundedNorm(AdapterHolder):
    """Hold ``‖s·B·A‖₂ ≤ 0.1`` after each step by scaling B."""

    def step(self) -> None:
        """Scale B where the norm is larger."""
        for matrix in self.matrices:
            B, A = matrix.factors
            matrix.write(B * min(0.1 / float(matrix.strengths[0]), 1.0), A)
'''


PEFT_METHOD = '''"""Updates of orthonormal factors with a gain for each direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .config import FactoredConfig, register
from .layer import FactoredLayer
from .model import FactoredModel


@dataclass
class GainsConfig(FactoredConfig):
    """Configuration of the method."""

    method: ClassVar[str] = "gains"


class GainsLayer(FactoredLayer):
    """``ΔW = Q_X diag(g) Q_Yᵀ``, both Q from a QR decomposition."""

    method = GainsConfig.method
    adapter_layer_names = ("gains_left", "gains_right", "gains_of")

    def _allocate(self, adapter_name: str, config: Any) -> None:
        m, n = self._weight.shape
        for held, size in ((self.gains_left, m), (self.gains_right, n)):
            held[adapter_name] = nn.Parameter(torch.randn(size, config.r))
        self.gains_of[adapter_name] = nn.Parameter(torch.zeros(config.r))

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """The first with the gains in it."""
        sides = (self.gains_left, self.gains_right)
        X, Y = (torch.linalg.qr(side[adapter_name]).Q for side in sides)
        return X * self.gains_of[adapter_name], Y


class GainsModel(FactoredModel):
    """A model with such layers."""

    tuner_layer_cls = GainsLayer


register(GainsConfig, GainsModel)
'''


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


@pytest.mark.slow
def test_an_engine(copy):
    place = "src/bulkedge/auditing"
    edits = [
        (f"{place}/engine/backwards.py", ENGINE),
        (f"{place}/engine/__init__.py", "from .local import", "from .backwards import Backwards\n"),
        (f"{place}/engine/__init__.py", '"Engine", ', '"Backwards", '),
        (f"{place}/__init__.py", "Engine, LocalEngine", "Backwards, "),
        (f"{place}/__init__.py", '    "Engine",\n', '    "Backwards",\n'),
        ("tests/audit/test_engines_agree.py", "from bulkedge.comparison", (
            "from bulkedge.auditing import Backwards\n"
        )),
        ("tests/audit/test_engines_agree.py", '    "local": L', '    "backwards": Backwards(),\n'),
        ("docs/architecture.md", "`local` processes", "`backwards`, "),
    ]  # fmt: skip
    follow_and_check(
        copy, "Add an engine", edits, ("tests/audit/test_engines_agree.py",), "backwards"
    )


@pytest.mark.slow
def test_a_repair_method(copy):
    edits = [
        ("src/bulkedge/repairing/method.py", 'METHODS = {"clip"', METHOD),
        ("src/bulkedge/repairing/method.py", '"project": P', '"halve": Halve, '),
        ("src/bulkedge/cli/_repair.py", '"project", ', '"halve", '),
        ("src/bulkedge/repairing/__init__.py", "Method, Project", "Halve, "),
        ("src/bulkedge/repairing/__init__.py", '    "Method",\n', '    "Halve",\n'),
        (
            "docs/repair.md",
            "| `project` | `P",
            "| `halve` | `Halve()` | W0 + ΔW/2 | `--rounds` |\n",
        ),
        ("tests/repair/test_method.py", "Method\n", "Halve, "),
        ("tests/repair/test_method.py", "\n\ndef test_corrections_compose", METHOD_TEST),
    ]
    tests = ("tests/repair/test_method.py", "tests/repair/test_repair_command.py")
    new = "halve or the_command_names_every_method"
    follow_and_check(copy, "Add a repair method", edits, tests, new)


@pytest.mark.slow
def test_a_simulation(copy):
    listed = "src/bulkedge/simulate/__init__.py"
    edits = [
        ("src/bulkedge/simulate/norm_of_noise.py", SIMULATION),
        (listed, "from .rank", "from .norm_of_noise import NormOfNoise\n"),
        (listed, "        Rank,\n", "        NormOfNoise,\n"),
        (listed, '    "Progress",\n', '    "NormOfNoise",\n'),
        ("docs/simulate.md", "| `rank` |", "| `norm_of_noise` | Where is the edge? | the norm |\n"),
        ("tests/simulate/test_claims.py", "\n\ndef test_noise_crosses", CLAIM_TEST),
        ("docs/architecture.md", "`full_vs_lora`", "`norm_of_noise`, "),
    ]
    tests = [f"tests/simulate/test_{name}.py" for name in ("experiments", "claims", "page")]
    follow_and_check(copy, "Add a simulation", edits, tests, "norm_of_noise or every_experiment_is")


@pytest.mark.slow
def test_a_holder(copy):
    listed, tests = "src/bulkedge/tune/__init__.py", "tests/tune/test_optimizers.py"
    edits = [
        ("src/bulkedge/tune/bounded_norm.py", HOLDER),
        (listed, "from .clip import", "from .bounded_norm import BoundedNorm\n"),
        (listed, '    "FullMatrix",\n', '    "BoundedNorm",\n'),
        (tests, "    OrthonormalFactors,\n", "    BoundedNorm,\n"),
        (tests, '    "OrthonormalFactors": O', '    "BoundedNorm": BoundedNorm,\n'),
        ("docs/architecture.md", "`clip`, `control`", "`bounded_norm`, "),
    ]
    follow_and_check(copy, "Add a holder", edits, (tests,), "BoundedNorm or every_holder")


@pytest.mark.slow
def test_a_peft_method(copy):
    names = "".join(f'    "Gains{part}",\n' for part in ("Config", "Layer", "Model"))
    listed, tests = "src/bulkedge/tune/peft/__init__.py", "tests/tune/test_peft_methods.py"
    edits = [
        ("src/bulkedge/tune/peft/gains.py", PEFT_METHOD),
        (listed, "from .layer import", "from .gains import GainsConfig, GainsLayer, GainsModel\n"),
        (listed, '    "SpectralConfig",\n', names),
        (tests, "    SpectralConfig,\n", "    GainsConfig,\n"),
        (tests, '    "rotational": S', '    "gains": GainsConfig(r=3, target_modules=TARGETS),\n'),
        ("docs/architecture.md", "`spectral`; what they", "`gains`, "),
    ]
    follow_and_check(copy, "Add a PEFT method", edits, (tests,), "gains or every_method")
