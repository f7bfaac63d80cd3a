"""Every codec, and one whose weights are named and shaped otherwise than their tensors."""

import io
import pickle
from dataclasses import dataclass

import pytest
import torch
from rich.console import Console

import bulkedge
import packing
from bulkedge import CheckpointError, Recipe, Scale
from bulkedge.checkpoint import Codec, Plain, StoredMatrix, codec, open_checkpoint
from bulkedge.checkpoint.codec.base import ANEW
from bulkedge.checkpoint.elements import read_tensor, write_elements
from bulkedge.checkpoint.packed import refuse_packed
from bulkedge.comparison import make_plan
from bulkedge.comparison.pair import load
from bulkedge.report import print_record
from bulkedge.report.advice import steps
from bulkedge.report.doubts import doubts
from cases import gaussian, orthonormal
from helpers import save, save_adapter, some, weights

FP8 = torch.float8_e4m3fn
CPU = torch.device("cpu")
RECIPE = {"top_k": 3, "method": "dense"}


@dataclass(frozen=True)
class Nibbles(Codec):
    """``x.packed``, two numbers of four bits in a byte, times ``x.steps``, one for each row."""

    steps: object = None

    @classmethod
    def claim(cls, stored):
        steps = stored.beside(".steps", of=".packed")
        return cls(stored.info, steps) if steps else None

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


def nibbles(W):
    step = float(W.abs().max()) / 7
    numbers = (W / step + 8).round().clamp(0, 15).to(torch.uint8)
    low, high = numbers.unflatten(1, (-1, 2)).unbind(-1)
    tensors = {"q.packed": low + 16 * high, "q.steps": torch.full((len(W),), step)}
    return tensors, (numbers.float() - 8) * torch.tensor(step)


def block_fp8(W):
    scale = W.abs().max() / 400
    stored = (W / scale).to(torch.float8_e4m3fn)
    return {"q.weight": stored, "q.weight_scale_inv": scale.reshape(1, 1)}, stored.float() * scale


# for a matrix, the tensors of the weight "q.weight" and the numbers that they stand for
STORED = {
    "plain": lambda W: ({"q.weight": W.bfloat16()}, W.bfloat16().float()),
    "block_fp8": block_fp8,
    "nibbles": nibbles,
    "nf4": packing.four_bits,
    "fp4_nested": lambda W: packing.four_bits(W, "fp4", nested=True, block=16),
    "int8": packing.eight_bits,
    "packed_int": packing.packed_int,
    "fp8_rows": packing.scaled,
    "fp8_tensor": lambda W: packing.scaled(W, per_row=False, scales="scale_weight"),
    "fp8_cast": lambda W: ({"q.weight": W.to(FP8)}, W.to(FP8).float()),
}


@pytest.fixture(params=STORED, ids=str)
def stored(request):
    return STORED[request.param]


def test_read_whole_and_by_rows(stored, tmp_path):
    tensors, W = stored(weights(6, 10))
    found = open_checkpoint(save(tmp_path / "x.safetensors", tensors)).weights["q.weight"]
    assert (found.name, found.shape, found.extent(None)) == ("q.weight", (6, 10), (6, 10))
    assert {info.name for info in found.infos} == set(tensors)
    assert found.unreadable is found.no_weight is None
    assert pickle.loads(pickle.dumps(found)) == found  # noqa: S301
    for rows in (None, (0, 6), (2, 5)):
        for transposed in (False, True):
            matrix = StoredMatrix(found, transposed, rows=rows)
            numbers = matrix.read()
            assert numbers.dtype.is_floating_point
            expected = (W.mT if transposed else W)[slice(*rows) if rows else slice(None)]
            torch.testing.assert_close(numbers.float(), expected, rtol=3e-7, atol=1e-8)
            assert matrix.nbytes == matrix.size * found.bits // 8


def test_under_an_adapter_and_against_a_plain_fine_tune(stored, tmp_path):
    tensors, W = stored(weights(6, 10))
    base = save(tmp_path / "b.safetensors", tensors)
    factors = {"q.lora_A.weight": weights(2, 10), "q.lora_B.weight": weights(6, 2)}
    plain = save(tmp_path / "t.safetensors", {"q.weight": W + 1})
    for tuned in (plain, save_adapter(tmp_path / "a", factors)):
        plan = make_plan(base, tuned, Recipe(split={"q.weight": [2, 4]}))
        names = [comparison.base.name for comparison in plan.comparisons]
        assert names == ["q.weight[0:2]", "q.weight[2:6]"]
        for comparison, rows in zip(plan.comparisons, (slice(0, 2), slice(2, 6)), strict=True):
            read = load(comparison, CPU).base.float()
            torch.testing.assert_close(read, W[rows], rtol=3e-7, atol=1e-8)
        assert {row.fate for row in some(plan.tensors)} == {"judged"}
        assert not any(row.lost for row in plan.skipped)


@pytest.mark.parametrize(("value", "doubt"), [(0.0, "vectors"), (float("nan"), "damaged")])
def test_damage_is_seen_where_the_weight_is_left_out(value, doubt, stored, tmp_path):
    """Zeros or NaN in the scales, or in the weight where it has none."""
    W = weights(6, 10)
    rest = {"up.weight": weights(6, 10, seed=1)}
    base = save(tmp_path / "b.safetensors", {"q.weight": W} | rest)
    tensors, _ = stored(W)
    exclude = {"exclude": ["q", "q.*"], "top_k": 2}
    for changed, expected in ((tensors, set()), (spoilt(tensors, value), {doubt})):
        tuned = save(tmp_path / "t.safetensors", changed | {"up.weight": rest["up.weight"] + 1e-3})
        numbers = open_checkpoint(tuned).weights["q.weight"].read(None, None)
        if "nested" in str(list(tensors)) and value == 0 and expected:
            assert numbers.any()  # the offset of its scales lies among its settings
            continue
        assert bool(numbers.any() and numbers.isfinite().all()) is not bool(expected)
        assert set(doubts(bulkedge.audit(base, tuned, recipe=exclude))) == expected


def spoilt(tensors, value):
    """The tensors with one number alone in all that hold scales."""
    scales = [n for n, W in tensors.items() if W.dtype in (torch.float32, torch.bfloat16)
              and "map" not in n] or list(tensors)  # fmt: skip
    return tensors | {n: torch.full_like(tensors[n].float(), value).to(tensors[n].dtype)
                      for n in scales}  # fmt: skip


def test_repaired_or_refused_with_the_reason(stored, tmp_path):
    W0, spike = gaussian(40, 30), 60 * orthonormal(40, 1, 1) @ orthonormal(30, 1, 2).mT
    for name, W in (("b", W0), ("t", W0 + spike)):
        save(tmp_path / f"{name}.safetensors", stored(W.float())[0])
    sides = (tmp_path / "b.safetensors", tmp_path / "t.safetensors")
    record = bulkedge.repair(*sides, tmp_path / "out", method=Scale(0.0), recipe=RECIPE)
    (row,) = record.matrices
    reason = open_checkpoint(sides[1]).weights["q.weight"].read_only
    assert (row.status, row.note) == ("refused" if reason else "repaired", reason)
    assert record.before.matrices[0].read_only == reason
    advice = [step for step in steps(record.before) if "bulkedge repair" in (step.command or "")]
    assert bool(advice) == (reason is None)
    assert (reason or "bulkedge repair") in printed(record.before)
    written = list(tmp_path.glob("out/*.safetensors"))
    if reason:
        assert written == []
        return
    found = open_checkpoint(*written).weights["q.weight"].read(None, None)
    left = float(torch.linalg.matrix_norm(found.double() - W0, 2))
    assert left < 20  # of four bits much is rounding


def printed(record):
    console = Console(file=io.StringIO(), width=9999)
    print_record(record, console)
    return console.file.getvalue()


def test_a_weight_is_listed_by_its_own_name_and_shape(tmp_path):
    tensors, W = nibbles(weights(6, 10))
    opened = open_checkpoint(save(tmp_path / "x.safetensors", tensors | {"k.weight": W}))
    assert {name: found.shape for name, found in opened.weights.items()} == {
        "q.weight": (6, 10), "q.steps": (6,), "k.weight": (6, 10),
    }  # fmt: skip
    assert torch.equal(opened.weights["q.weight"].read(None, (2, 5)), W[2:5])


def test_two_tensors_for_one_weight(tmp_path):
    tensors, W = nibbles(weights(6, 10))
    opened = open_checkpoint(save(tmp_path / "x.safetensors", tensors | {"q.weight": W}))
    with pytest.raises(CheckpointError, match=r"both hold the weight 'q\.weight'; remove one"):
        _ = opened.weights


def test_what_a_codec_reads_is_not_refused_as_packed(tmp_path, monkeypatch):
    tensors, W = nibbles(weights(6, 10))
    stored = {"q.qweight": tensors["q.packed"], "q.steps": tensors["q.steps"]}
    base = save(tmp_path / "b.safetensors", stored)
    tuned = save(tmp_path / "t.safetensors", {"q.qweight": W + 1})

    class Claimed(Nibbles):
        name = Codec.name

        @classmethod
        def claim(cls, stored):
            steps = stored.tensors["q.steps"]
            return cls(stored.info, steps) if stored.info.dtype == "U8" else None

    with pytest.raises(CheckpointError, match="is part of a weight quantised by GPTQ or AWQ"):
        make_plan(base, tuned, Recipe())
    monkeypatch.setattr(codec, "CODECS", (Claimed,))
    opened = open_checkpoint(base)
    refuse_packed(opened)
    assert torch.equal(opened.weights["q.qweight"].read(None, None), W)


def test_what_cannot_be_written_is_refused_with_the_codecs_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(Nibbles, "read_only", property(lambda codec: "its tables are shared"))
    spike = 60 * orthonormal(40, 1, 1) @ orthonormal(30, 1, 2).mT
    for name, W in (("b", gaussian(40, 30)), ("t", gaussian(40, 30) + spike)):
        save(tmp_path / f"{name}.safetensors", nibbles(W.float())[0])
    sides = (tmp_path / "b.safetensors", tmp_path / "t.safetensors")
    (row,) = bulkedge.repair(*sides, None, recipe=RECIPE).matrices
    assert (row.status, row.note) == ("refused", "its tables are shared")


def test_a_codec_that_says_nothing_of_writing_cannot_write(tmp_path):
    class Halved(Plain):
        read_only, write = Codec.read_only, Codec.write

    opened = open_checkpoint(save(tmp_path / "x.safetensors", {"q.weight": weights(2, 2)}))
    found = Halved(opened.tensors["q.weight"])
    assert found.read_only == f"F32: quantised, and would have to be {ANEW}"
    with pytest.raises(NotImplementedError, match="Halved: F32: quantised, and would have to be"):
        found.write(weights(2, 2), None, None, tmp_path / "x.safetensors")
