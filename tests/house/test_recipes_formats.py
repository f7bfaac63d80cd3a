"""The recipes of CONTRIBUTING.md for codecs and adapter formats, followed in a copy of the tree."""

import re

import pytest
from test_recipes import Copy, is_named

pytestmark = pytest.mark.timeout(300)  # each runs some tens of tests

CODEC_LIST = "src/bulkedge/checkpoint/codec/__init__.py"
CODEC_TESTS = "tests/checkpoint/test_codecs.py"
FORMATS = "src/bulkedge/checkpoint/formats.py"
HOUSE = "docs/architecture.md"
ALWAYS = (
    "tests/house/test_sizes.py",
    "tests/test_docs.py::test_every_source_file_is_in_the_picture_of_the_house",
)

CODEC = '''"""Weights in int8 with one step for each row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bulkedge.checkpoint.elements import read_tensor
from bulkedge.checkpoint.header import TensorInfo

from .base import Codec, Rows
from .plain import Plain

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RowSteps(Codec):
    """``x.weight`` in int8, times ``x.weight_step``."""

    step: TensorInfo | None = None

    @classmethod
    def claim(
        cls,
        name: str,
        info: TensorInfo,
        tensors: Mapping[str, TensorInfo],
        config: Mapping[str, Any],
    ) -> RowSteps | None:
        """Any tensor in int8."""
        return cls(info, tensors.get(f"{name}_step")) if info.dtype == "I8" else None

    @property
    def companions(self) -> tuple[TensorInfo, ...]:
        """The steps."""
        return () if self.step is None else (self.step,)

    @property
    def unreadable(self) -> str | None:
        """Without steps of the right shape."""
        if self.step is not None and self.step.shape == self.info.shape[:1]:
            return None
        return f"I8 tensor: no {self.name}_step of one number for each row beside it"

    def read(self, expert: int | None, rows: Rows | None, file: Path | None = None) -> Tensor:
        """In float32."""
        part = slice(*rows) if rows else slice(None)
        numbers = read_tensor(self.info).flatten(1)[part].float()
        return numbers if self.step is None else numbers * read_tensor(self.step)[part, None]
'''

MAKER = """
def row_steps(W):
    step = W.abs().max() / 127
    stored = (W / step).round().to(torch.int8)
    return {"q.weight": stored, "q.weight_step": step.repeat(len(W))}, stored.float() * step


"""

FORMAT = '''"""Adapters that store updates as outer products of ``.outer_u`` and ``.outer_v``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .adapter import Adapter, Unhandled
from .elements import read_tensor
from .header import TensorInfo
from .read import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

U, V = ".outer_u", ".outer_v"


@dataclass(frozen=True)
class OuterProduct:
    """The update ``u vᵀ``."""

    u: TensorInfo
    v: TensorInfo
    rows: tuple[int, int] | None = None
    note: str | None = None
    kind = "outer"
    rank = 1
    scale = None
    embedding = fan_in_fan_out = False

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """Both vectors."""
        return self.u, self.v

    @property
    def shape(self) -> tuple[int, int]:
        """Of the block of rows."""
        start, stop = self.rows or (0, self.u.size)
        return stop - start, self.v.size

    def fits(self, stored: tuple[int, ...]) -> bool:
        """One matrix of that shape."""
        return stored == (self.u.size, self.v.size)

    def of(
        self, *, expert: int | None = None, rows: tuple[int, int] | None = None
    ) -> OuterProduct:
        """A block of rows; no experts are stored this way."""
        return replace(self, rows=self.rows if rows is None else rows)

    def read(self) -> tuple[Tensor, Tensor, float]:
        """u as a column, v as a row."""
        u, v = (read_tensor(info).double().flatten() for info in self.infos)
        return u[slice(*self.rows) if self.rows else slice(None), None], v[None], 1.0

    def read_magnitude(self) -> None:
        """None is stored."""

    def correctable(self) -> str:
        """A correction has a rank of its own."""
        return "an outer product: its form holds no update of a higher rank"


def is_outer_file(checkpoint: Checkpoint) -> bool:
    """Whether a file holds such vectors."""
    return any(name.endswith(U) for name in checkpoint.tensors)


def open_outer_file(checkpoint: Checkpoint) -> Adapter:
    """The updates by the names of their weights."""
    stored, found = checkpoint.tensors, {}
    for name, info in stored.items():
        layer = name.removesuffix(U)
        if layer != name and layer + V in stored:
            found[f"{layer}.weight"] = OuterProduct(info, stored[layer + V])
    used = {info.name for update in found.values() for info in update.infos}
    reason = "one vector without the other: save the adapter again"
    lost = [info for info in stored.values() if info.name not in used]
    unhandled = tuple(Unhandled(i, f"{i.name.rpartition('.')[0]}.weight", reason) for i in lost)
    return Adapter(checkpoint.path, checkpoint.files, found, unhandled=unhandled)
'''

FORMAT_TESTS = """import pytest

import bulkedge
from cases import gaussian, orthonormal
from helpers import save, weights

RECIPE = {"top_k": 2, "method": "dense"}


def test_an_update_is_audited_and_its_repair_refused(tmp_path):
    W0, u, v = gaussian(40, 30), 60 * orthonormal(40, 1, 1), orthonormal(30, 1, 2)
    base = save(tmp_path / "b.safetensors", {"q.weight": W0.float(), "k.weight": W0.float()})
    stored = {"q.outer_u": u.float(), "q.outer_v": v.float(), "k.outer_u": u.float()}
    tuned = save(tmp_path / "t.safetensors", stored)
    record = bulkedge.audit(base, tuned, recipe=RECIPE)
    (row,) = record.matrices
    assert (row.name, row.rank, row.intruders) == ("q.weight", 1, 1)
    assert abs(row.spectral_norm_update - 60) < 1e-3
    (lost,) = [row for row in record.skipped if row.lost]
    assert lost.reason == "one vector without the other: save the adapter again"
    fates = {row.name: row.fate for row in record.tensors if row.side == "base"}
    assert fates == {"q.weight": "judged", "k.weight": "lost"}
    (row,) = bulkedge.repair(base, tuned, None, recipe=RECIPE).matrices
    assert (row.status, row.note.split(":")[0]) == ("refused", "an outer product")


def test_two_of_them_are_no_base_and_fine_tune(tmp_path):
    stored = {"q.outer_u": weights(4), "q.outer_v": weights(3)}
    tuned = save(tmp_path / "t.safetensors", stored)
    with pytest.raises(bulkedge.CheckpointError, match="is an adapter, and so is"):
        bulkedge.audit(tuned, tuned)
"""


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


def follow(copy, title, edits, tests, new):
    """Every edit in a file that the recipe names, three of them code; then what it says to run."""
    for edit in edits:
        (copy.write if len(edit) == 2 else copy.put)(*edit)
    assert len([path for path in copy.touched if path.startswith("src/")]) <= 3
    assert [path for path in copy.touched if not is_named(path, title)] == []
    chosen = f"{new} or no_file_is_longer or every_source_file"
    passed = copy.run("-m", "pytest", "-o", "addopts=", tests, *ALWAYS, "-k", chosen)
    assert int(re.search(r"(\d+) passed", passed)[1]) > 2


def test_a_codec(copy):
    edits = [
        ("src/bulkedge/checkpoint/codec/row_steps.py", CODEC),
        (CODEC_LIST, "\n__all__", "from .row_steps import RowSteps\n"),
        (CODEC_LIST, "BlockFp8,)\n", "RowSteps, "),
        (CODEC_TESTS, "# for a matrix", MAKER),
        (CODEC_TESTS, '    "nibbles"', '    "row_steps": row_steps,\n'),
        (HOUSE, "`block_fp8`", "`row_steps`, "),
    ]
    follow(copy, "Add a codec", edits, CODEC_TESTS, "row_steps")


@pytest.mark.slow
def test_an_adapter_format(copy):
    edits = [
        ("src/bulkedge/checkpoint/outer_product.py", FORMAT),
        (FORMATS, "from .peft", "from .outer_product import is_outer_file, open_outer_file\n"),
        (FORMATS, "AdapterFormat(is_lora", "AdapterFormat(is_outer_file, open_outer_file), "),
        (HOUSE, "`kohya`", "`outer_product`, "),
    ]
    copy.write("tests/checkpoint/test_outer_product.py", FORMAT_TESTS)
    tests = "tests/checkpoint/test_outer_product.py"
    follow(copy, "Add an adapter format", edits, tests, "outer or base")
