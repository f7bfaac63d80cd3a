"""The recipes of CONTRIBUTING.md for codecs and adapter formats, followed in a copy of the tree."""

import pytest
from recipe import Copy, follow_and_check

pytestmark = pytest.mark.timeout(300)  # each runs some tens of tests

CODEC_LIST = "src/bulkedge/checkpoint/codec/__init__.py"
CODEC_TESTS = "tests/checkpoint/test_codecs.py"
FORMATS = "src/bulkedge/checkpoint/formats.py"
HOUSE = "docs/architecture.md"
CODEC = '''"""Weights in int8 with one step for each row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bulkedge.checkpoint.elements import read_tensor
from bulkedge.checkpoint.header import TensorInfo

from .base import Candidate, Codec, Rows
from .plain import Plain

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RowSteps(Codec):
    """``x.weight`` in int8, times ``x.weight_step``."""

    step: TensorInfo | None = None

    @classmethod
    def claim(cls, stored: Candidate) -> RowSteps | None:
        """Any tensor in int8."""
        return cls(stored.info, stored.beside("_step")) if stored.info.dtype == "I8" else None

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

FORMAT = '''"""LoHa as PEFT saves it: updates ``s·(B1 A1 ⊙ B2 A2)``, product entry by entry.

Hyeon-Woo et al., FedPara, arXiv:2108.06098.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .adapter import Adapter, Unhandled
from .elements import read_tensor
from .format import AdapterFormat, Place, plain_name
from .header import TensorInfo
from .lora import scale_of

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
"""B1, A1, B2 and A2."""


@dataclass(frozen=True)
class HadamardProduct:
    """Four factors and their scale; of rank r² as a matrix."""

    infos: tuple[TensorInfo, ...]
    scale: float
    rows: tuple[int, int] | None = None
    note: str | None = None
    kind = "loha"
    embedding = fan_in_fan_out = False

    @property
    def rank(self) -> int:
        """The rank r of each product."""
        return self.infos[1].shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the block of rows."""
        start, stop = self.rows or (0, self.infos[0].shape[0])
        return stop - start, self.infos[1].shape[1]

    def fits(self, stored: tuple[int, ...]) -> bool:
        """One matrix of that shape."""
        return stored == (self.infos[0].shape[0], self.infos[1].shape[1])

    def of(
        self, *, expert: int | None = None, rows: tuple[int, int] | None = None
    ) -> HadamardProduct:
        """A block of rows; no experts are stored this way."""
        return replace(self, rows=self.rows if rows is None else rows)

    def read(self) -> tuple[Tensor, Tensor, float]:
        """Row by row ``B1 ⊗ B2``, column by column ``A1 ⊗ A2``: their product is that of both."""
        B1, A1, B2, A2 = (read_tensor(info).double() for info in self.infos)
        B = (B1[:, :, None] * B2[:, None, :]).flatten(1)
        A = (A1[:, None, :] * A2[None, :, :]).flatten(0, 1)
        return B[slice(*self.rows) if self.rows else slice(None)], A, self.scale

    def read_magnitude(self) -> None:
        """None is stored."""

    def correctable(self) -> str:
        """A correction is added, and a product entry by entry holds no sum."""
        return "LoHa: a product entry by entry holds no sum with a correction; merge it first"


def open_loha(place: Place) -> Adapter:
    """The updates by the names of their weights; what is incomplete, with the reason."""
    layers: dict[str, dict[str, TensorInfo]] = {}
    for name, info in place.tensors.items():
        layer, _, part = plain_name(name).rpartition(".")
        layers.setdefault(layer, {})[part] = info
    found, lost = {}, []
    for layer, parts in layers.items():
        infos = tuple(parts[part] for part in PARTS if part in parts)
        if set(parts) == set(PARTS):
            scale = scale_of(place.settings["alpha"], infos[1].shape[0])
            found[f"{layer}.weight"] = HadamardProduct(infos, scale)
        else:
            reason = f"expected {', '.join(PARTS)}, found {', '.join(parts)}; save it again"
            lost += [Unhandled(info, f"{layer}.weight", reason) for info in parts.values()]
    return place.adapter(method="LoHa", factors=found, unhandled=tuple(lost))


LOHA = AdapterFormat(lambda place: place.settings.get("peft_type") == "LOHA", open_loha)
'''

FORMAT_TESTS = '''import json
import warnings

import pytest
import torch

import bulkedge
from bulkedge.auditing.matrix import load
from bulkedge.comparison import make_plan
from helpers import save, save_adapter, weights

RECIPE = {"top_k": 2, "method": "dense"}
PARTS = {"w1_a": (40, 1), "w1_b": (1, 30), "w2_a": (40, 1), "w2_b": (1, 30)}


def loha(folder, **parts):
    """A LoHa of one layer, which is a spike, and of another what is asked for."""
    layer = {f"q.hada_{n}": weights(*s, seed=i) for i, (n, s) in enumerate(PARTS.items())}
    tensors = {f"base_model.model.{name}": x for name, x in (layer | parts).items()}
    return save_adapter(folder, tensors, peft_type="LOHA", r=1, alpha=9)


def base(path):
    return save(path, {"q.weight": weights(40, 30, seed=9), "k.weight": weights(40, 30)})


def test_loha_is_read_as_peft_merges_it(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(30, 40), "k": torch.nn.Linear(8, 40)})
    save(tmp_path / "b.safetensors", {n: x.detach() for n, x in model.state_dict().items()})
    settings = peft.LoHaConfig(r=3, alpha=5, target_modules=["q", "k"], init_weights=False)
    model.forward = lambda x: model["q"](x)
    tuned = peft.get_peft_model(model, settings)
    tuned.save_pretrained(tmp_path / "a")
    plan = make_plan(tmp_path / "b.safetensors", tmp_path / "a", bulkedge.Recipe())
    merged = tuned.merge_and_unload().state_dict()
    assert plan.skipped == ()
    assert {pair.base.name for pair in plan.comparisons} == {"q.weight", "k.weight"}
    for pair in plan.comparisons:
        W = load(pair, torch.device("cpu")).tuned_map(torch.float64).to_dense()
        torch.testing.assert_close(W.float(), merged[pair.base.name], rtol=1e-5, atol=1e-5)


def test_loha_is_judged_and_counted_and_its_repair_refused(tmp_path):
    a = loha(tmp_path / "a", **{"k.hada_w1_a": weights(40, 1)})
    record = bulkedge.audit(base(tmp_path / "b.safetensors"), a, recipe=RECIPE)
    (row,) = record.matrices
    assert (row.name, row.update, row.rank, row.new_directions) == ("q.weight", "loha", 1, 1)
    assert record.inputs.tuned.kind == "loha"
    (lost,) = [row for row in record.skipped if row.lost]
    assert lost.reason.endswith("found hada_w1_a; save it again")
    fates = {row.name: row.fate for row in record.tensors if row.side == "base"}
    assert fates == {"q.weight": "judged", "k.weight": "lost"}
    (row,) = bulkedge.repair(tmp_path / "b.safetensors", a, None, recipe=RECIPE).matrices
    assert (row.status, row.note.split(":")[0]) == ("refused", "LoHa")


def test_other_folders_are_left_to_loha_of_others(tmp_path):
    a = loha(tmp_path / "a")
    with pytest.raises(bulkedge.CheckpointError, match="is an adapter, and so is"):
        bulkedge.audit(a, a)
    settings = json.loads((a / "adapter_config.json").read_text())
    (a / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "POLY"}))
    with pytest.raises(bulkedge.AdapterError, match="a 'POLY' adapter"):
        bulkedge.audit(base(tmp_path / "b.safetensors"), a)
    (a / "adapter_config.json").write_text("{")
    with pytest.raises(bulkedge.CheckpointError, match="not valid JSON"):
        bulkedge.audit(base(tmp_path / "b.safetensors"), a)
'''


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


@pytest.mark.slow
def test_a_codec(copy):
    edits = [
        ("src/bulkedge/checkpoint/codec/row_steps.py", CODEC),
        (CODEC_LIST, "\n__all__", "from .row_steps import RowSteps\n"),
        (CODEC_LIST, "Gptq, Awq\n)", "RowSteps, "),
        (CODEC_TESTS, "# for a matrix", MAKER),
        (CODEC_TESTS, '    "nibbles"', '    "row_steps": row_steps,\n'),
        (HOUSE, "`block_fp8`", "`row_steps`, "),
    ]
    follow_and_check(copy, "Add a codec", edits, (CODEC_TESTS,), "row_steps")


@pytest.mark.slow
def test_an_adapter_format(copy):
    edits = [
        ("src/bulkedge/checkpoint/loha.py", FORMAT),
        (FORMATS, "from .peft", "from .loha import LOHA\n"),
        (FORMATS, "PEFT_OTHER, PEFT_OF_BASE, PEFT_LORA, LORA_FILE)", "LOHA, "),
        (HOUSE, "`kohya`", "`loha`, "),
        ("tests/checkpoint/test_loha.py", FORMAT_TESTS),
    ]
    follow_and_check(
        copy, "Add an adapter format", edits, ("tests/checkpoint/test_loha.py",), "loha"
    )
