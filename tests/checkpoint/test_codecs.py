"""A codec whose weights have another name and shape than their tensors, from listing to repair."""

from dataclasses import dataclass

import pytest
import torch

import bulkedge
from bulkedge import CheckpointError, Recipe, Scale
from bulkedge.checkpoint import Codec, Plain, codec, open_checkpoint
from bulkedge.checkpoint.elements import read_tensor, write_elements
from bulkedge.comparison import make_plan
from bulkedge.comparison.pair import load
from cases import gaussian, orthonormal
from helpers import save, save_adapter, some, weights

CPU = torch.device("cpu")
RECIPE = {"top_k": 3, "method": "dense"}


@dataclass(frozen=True)
class Nibbles(Codec):
    """``x.packed``, two numbers of four bits in a byte, times ``x.steps``, one for each row."""

    steps: object = None

    @classmethod
    def claim(cls, name, info, tensors, config):
        steps = tensors.get(f"{name.removesuffix('.packed')}.steps")
        return cls(info, steps) if name.endswith(".packed") and steps else None

    @property
    def name(self):
        return f"{self.info.name.removesuffix('.packed')}.weight"

    @property
    def shape(self):
        *stack, columns = self.info.shape
        return (*stack, 2 * columns)

    @property
    def companions(self):
        return (self.steps,)

    @property
    def bits(self):
        return 4

    @property
    def read_only(self):
        return None

    def _steps(self, rows):
        return read_tensor(self.steps)[slice(*rows) if rows else slice(None)]

    def read(self, expert, rows, file=None):
        packed = read_tensor(self.info)[slice(*rows) if rows else slice(None)]
        numbers = torch.stack([packed % 16, packed // 16], dim=-1).flatten(1)
        return (numbers.float() - 8) * self._steps(rows)[:, None]

    def write(self, value, expert, rows, file):
        numbers = (value / self._steps(rows)[:, None] + 8).round().clamp(0, 15).to(torch.uint8)
        low, high = numbers.unflatten(1, (-1, 2)).unbind(-1)
        first = (rows or (0, 0))[0] * self.info.shape[1]
        write_elements(self.info, first, low + 16 * high, file)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(codec, "CODECS", (Nibbles, *codec.CODECS))


def packed(W, name="q", step=0.3):
    """The tensors of a weight, and what they stand for."""
    numbers = (W / step + 8).round().clamp(0, 15).to(torch.uint8)
    low, high = numbers.unflatten(1, (-1, 2)).unbind(-1)
    tensors = {f"{name}.packed": low + 16 * high, f"{name}.steps": torch.full((len(W),), step)}
    return tensors, (numbers.float() - 8) * step


def test_a_weight_is_listed_by_its_own_name_and_shape(tmp_path):
    tensors, W = packed(weights(6, 10))
    opened = open_checkpoint(save(tmp_path / "x.safetensors", tensors | {"k.weight": W}))
    assert {name: found.shape for name, found in opened.weights.items()} == {
        "q.weight": (6, 10), "q.steps": (6,), "k.weight": (6, 10),
    }  # fmt: skip
    assert torch.equal(opened.weights["q.weight"].read(None, (2, 5)), W[2:5])


def test_two_tensors_for_one_weight(tmp_path):
    tensors, W = packed(weights(6, 10))
    opened = open_checkpoint(save(tmp_path / "x.safetensors", tensors | {"q.weight": W}))
    with pytest.raises(CheckpointError, match=r"both hold the weight 'q\.weight'; remove one"):
        _ = opened.weights


def test_packed_base_and_plain_fine_tune(tmp_path):
    tensors, W = packed(weights(6, 10))
    base = save(tmp_path / "b.safetensors", tensors)
    plan = make_plan(base, save(tmp_path / "t.safetensors", {"q.weight": W + 1}), Recipe())
    (comparison,) = plan.comparisons
    assert (comparison.base.name, comparison.base.shape, comparison.base.nbytes) == (
        "q.weight", (6, 10), 30,
    )  # fmt: skip
    assert torch.equal(load(comparison, CPU).base, W)
    assert {(row.side, row.name): row.fate for row in plan.tensors} == {
        ("base", "q.packed"): "judged", ("tuned", "q.weight"): "judged",
    }  # fmt: skip
    assert [(row.name, row.lost) for row in plan.skipped] == [("q.steps", False)]


def test_the_blocks_of_a_fused_weight_and_an_adapter(tmp_path):
    tensors, W = packed(weights(9, 10))
    base = save(tmp_path / "b.safetensors", tensors)
    factors = {"q.lora_A.weight": weights(2, 10), "q.lora_B.weight": weights(9, 2)}
    adapter = save_adapter(tmp_path / "a", factors)
    plan = make_plan(base, adapter, Recipe(split={"q.weight": [3, 6]}))
    assert [c.base.name for c in plan.comparisons] == ["q.weight[0:3]", "q.weight[3:9]"]
    for comparison, rows in some(zip(plan.comparisons, (slice(0, 3), slice(3, 9)), strict=True)):
        assert torch.equal(load(comparison, CPU).base, W[rows])


def test_what_can_be_written_is_repaired(tmp_path):
    spike = 60 * orthonormal(40, 1, 1) @ orthonormal(30, 1, 2).mT
    W0 = gaussian(40, 30)
    for name, W in (("b", W0), ("t", W0 + spike)):
        save(tmp_path / f"{name}.safetensors", packed(W.float(), step=1.5)[0])
    out = tmp_path / "out"
    sides = (tmp_path / "b.safetensors", tmp_path / "t.safetensors")
    record = bulkedge.repair(*sides, out, method=Scale(0.0), recipe=RECIPE)
    assert [row.status for row in record.matrices] == ["repaired"]
    assert (record.before.summary.intruders, record.after.summary.intruders) == (1, 0)


def test_what_cannot_be_written_is_refused_with_the_codecs_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(Nibbles, "read_only", property(lambda codec: "its tables are shared"))
    spike = 60 * orthonormal(40, 1, 1) @ orthonormal(30, 1, 2).mT
    for name, W in (("b", gaussian(40, 30)), ("t", gaussian(40, 30) + spike)):
        save(tmp_path / f"{name}.safetensors", packed(W.float(), step=1.5)[0])
    sides = (tmp_path / "b.safetensors", tmp_path / "t.safetensors")
    (row,) = bulkedge.repair(*sides, None, recipe=RECIPE).matrices
    assert (row.status, row.note) == ("refused", "its tables are shared")


def test_a_codec_that_says_nothing_of_writing_cannot_write(tmp_path):
    class Halved(Plain):
        read_only, write = Codec.read_only, Codec.write

    opened = open_checkpoint(save(tmp_path / "x.safetensors", {"q.weight": weights(2, 2)}))
    found = Halved(opened.tensors["q.weight"])
    assert found.read_only == "F32: quantised, and would have to be quantised anew"
    with pytest.raises(NotImplementedError, match="Halved: F32: quantised, and would have to be"):
        found.write(weights(2, 2), None, None, tmp_path / "x.safetensors")
