"""Weights in four and eight bits are read as bitsandbytes reads them; what does not fit is named.

``make test-formats`` runs the tests that ask the library itself.  [dev] leaves it out, because PEFT
imports it wherever it is found, for seconds.
"""

import base64
import json
import re

import pytest
import torch
from safetensors import safe_open

import bulkedge
from bulkedge import CheckpointError, Recipe, Scale
from bulkedge.checkpoint import open_checkpoint
from bulkedge.checkpoint.codec import bitsandbytes_4bit
from bulkedge.cli import cli
from bulkedge.comparison import make_plan
from cases import gaussian, orthonormal
from helpers import MINILM, oracle_scores, save, save_adapter, some, weights
from libraries import library
from packing import as_bytes, eight_bits, four_bits

STATE = "q.weight.quant_state.bitsandbytes__nf4"


def read(path, tensors, rows=None):
    return (
        open_checkpoint(save(path / "x.safetensors", tensors)).weights["q.weight"].read(None, rows)
    )


@pytest.mark.parametrize("method", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
def test_strips_that_begin_and_end_within_a_byte_and_a_block(method, nested, tmp_path, monkeypatch):
    monkeypatch.setattr(bitsandbytes_4bit, "STRIP", 13)
    tensors, W = four_bits(weights(9, 7, dtype=torch.float16), method, nested=nested, block=16)
    for rows in (None, (0, 1), (2, 5), (8, 9)):
        found = read(tmp_path, tensors, rows)
        assert found.dtype is torch.float16
        assert torch.equal(found, W[slice(*rows) if rows else slice(None)])


def test_numbers_packed_in_another_dtype_and_stacked(tmp_path):
    tensors, W = four_bits(weights(2, 8, 6), name="experts.down_proj")
    tensors = {name.replace(".weight", ""): tensor for name, tensor in tensors.items()}
    packed = tensors["experts.down_proj"].flatten().view(torch.bfloat16)
    tensors["experts.down_proj"] = packed[:, None]
    codec = open_checkpoint(save(tmp_path / "x.safetensors", tensors)).weights["experts.down_proj"]
    assert (codec.unreadable, codec.shape) == (None, (2, 8, 6))
    for expert in range(2):
        torch.testing.assert_close(codec.read(expert, (1, 5)), W[expert, 1:5], rtol=3e-7, atol=0)


# made by bitsandbytes 0.50.2: a weight of (4, 10) in blocks of 32, and the numbers that it gives
VECTORS = {
    "nf4": {
        "packed": "BTwyQy6fwnmEJHiDuIeclnYc1wg=",
        "absmax": "yd0TQPgJ+z8=",
        "quant_map": (
            "AACAv7E5Mr8wawa/oDLKvk2ikb4/NT2+cXi6vQAAAAD/+qI948okPt0EfD46A60+uKThPqsHED+zEzk/"
            "AACAPw=="
        ),
        "read": (
            "yd0TwP2S2r59lGm/ElWCP32Uab8BSJu/uzwov32Uab8BSJu/Ts3VP4pevj7J3RNAElWCPwFIm78AAAAA"
            "il6+PqZGPD67PCi/AUibv7s8KL8AAAAApkY8PqZGPD59lGm/fN1HP6ZGPD6mRjw+AAAAAIpevj4SVYI/"
            "il6+PmtpV74AAAAAWts2voHFrr9KRV0/ID2NPwAAAAD4Cfu/cdIfPg=="
        ),
    },
    "fp4": {
        "packed": "vtXN/NJjXRYf3JYcRhllaZ61KbY=",
        "absmax": "yd0TQPgJ+z8=",
        "quant_map": (
            "AAAAAKuqqjurqio/AACAP6uqqj4AAAA/q6oqPgAAgD4AAAAAq6qqu6uqKr8AAIC/q6qqvgAAAL+rqiq+"
            "AACAvg=="
        ),
        "read": (
            "yd0TwLcnxb7J3ZO/yd2TP7cnRb/J3ZO/yd0Tv7cnRb/J3ZO/tyfFP7cnxT7J3RNAyd2TP8ndk7+3J0U8"
            "tyfFPrcnRTzJ3RO/yd2Tv7cnRb+3J0W8tyfFPrcnRTy3J0W/tydFP7cnxT63J0U8tydFvLcnxT7J3ZM/"
            "tyfFPrcnRbz7Wye8+1unvvgJ+7/4CXs/+1unP/tbJ7z4Cfu/+1unPg=="
        ),
    },
}


@pytest.mark.parametrize("method", ["nf4", "fp4"])
def test_what_the_library_has_packed(method, tmp_path):
    stored = VECTORS[method]
    values = {name: base64.b64decode(text) for name, text in stored.items()}

    def numbers(name):
        return torch.frombuffer(bytearray(values[name]), dtype=torch.float32)

    settings = {"quant_type": method, "blocksize": 32, "dtype": "float32", "shape": [4, 10]}
    tensors = {
        "q.weight": torch.frombuffer(bytearray(values["packed"]), dtype=torch.uint8)[:, None],
        "q.weight.absmax": numbers("absmax"),
        "q.weight.quant_map": numbers("quant_map"),
        f"q.weight.quant_state.bitsandbytes__{method}": as_bytes(settings),
    }
    assert torch.equal(read(tmp_path, tensors).flatten(), numbers("read"))


DAMAGE = {
    "no_absmax": ("absmax", None, "no absmax beside it"),
    "absmax_too_short": ("absmax", torch.ones(1), r"absmax is F32 \(1,\), expected 2 numbers"),
    "absmax_in_codes": (
        "absmax",
        torch.ones(2, dtype=torch.uint8),
        r"absmax is U8 \(2,\), expected 2 numbers in BF16",
    ),
    "no_map": ("quant_map", None, "no quant_map beside it"),
    "map_of_nan": ("quant_map", torch.full((16,), torch.nan), "not the table of nf4"),
    "map_of_fp4": ("quant_map", torch.tensor(bitsandbytes_4bit.TABLES["fp4"]), "not the table of"),
    "no_json": ("{{", None, "settings that are no JSON"),
    "a_list": ("[1]", None, "do not say quant_type 'nf4'"),
    "of_fp4": ({"quant_type": "fp4"}, None, "do not say quant_type 'nf4'"),
    "no_shape": ({"shape": None}, None, "settings with shape None"),
    "huge_shape": ({"shape": [2**60, 2]}, None, "settings with shape"),
    "other_shape": ({"shape": [9, 14]}, None, r"50 bytes for 126 numbers \(9, 14\) of four bits"),
    "true_as_a_size": ({"shape": [True, 126]}, None, "settings with shape"),
    "zero_block": ({"blocksize": 0}, None, "settings with blocksize 0, expected 1 to 4096"),
    "huge_block": ({"blocksize": 2**40}, None, "settings with blocksize 1099511627776"),
    "no_block": ({"blocksize": None}, None, "settings with blocksize None"),
    "other_dtype": ({"dtype": "int8"}, None, "settings with dtype 'int8'"),
    "nested_nan": ({"nested_blocksize": 4, "nested_offset": float("nan")}, None, "offset nan"),
    "nested_huge": ({"nested_blocksize": 4, "nested_offset": 10**400}, None, "nested_offset 1000"),
    "nested_alone": ({"nested_blocksize": 4, "nested_offset": 1}, None, "absmax is F32"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_fit_is_lost_by_name(damage, tmp_path):
    what, value, reason = DAMAGE[damage]
    tensors, _ = four_bits(weights(10, 10))
    if isinstance(what, dict):
        settings = json.loads(bytes(tensors[STATE].tolist()))
        tensors[STATE] = as_bytes(settings | what)
    elif what in {"absmax", "quant_map"}:
        tensors[f"q.weight.{what}"] = value
    else:
        tensors[STATE] = torch.tensor(list(what.encode()), dtype=torch.uint8)
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    other = {"k.weight": weights(4, 4)}
    base = save(tmp_path / "b.safetensors", kept | other)
    codec = open_checkpoint(base).weights["q.weight"]
    assert codec.unreadable.startswith("bitsandbytes nf4: ")
    with pytest.raises(CheckpointError, match=f"tensor 'q.weight': bitsandbytes nf4: .*{reason}"):
        codec.read(None, None)
    tuned = save(
        tmp_path / "t.safetensors", {"q.weight": weights(10, 10), "k.weight": weights(4, 4)}
    )
    plan = make_plan(base, tuned, Recipe())
    assert [c.base.name for c in plan.comparisons] == ["k.weight"]
    assert codec.unreadable in {row.reason for row in plan.skipped if row.lost}


def test_settings_of_two_kinds(tmp_path):
    tensors = four_bits(weights(8, 8), "fp4")[0] | four_bits(weights(8, 8))[0]
    codec = open_checkpoint(save(tmp_path / "x.safetensors", tensors)).weights["q.weight"]
    assert "settings of both nf4 and fp4; save the model again" in codec.unreadable


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("q.SCB", torch.ones(3), r"SCB is F32 \(3,\), expected 8 numbers"),
        ("q.SCB", torch.ones(8, dtype=torch.int32), "SCB is I32"),
        ("q.weight_format", torch.tensor(1, dtype=torch.uint8), "the order of one kind of GPU"),
        ("q.weight_format", torch.zeros(2, dtype=torch.uint8), "expected one byte"),
        ("q.weight", torch.ones(8, 2, 2, dtype=torch.int8), "expected a matrix"),
    ],
)
def test_int8_that_does_not_fit(name, value, reason, tmp_path):
    tensors = eight_bits(weights(8, 4))[0] | {name: value}
    codec = open_checkpoint(save(tmp_path / "x.safetensors", tensors)).weights["q.weight"]
    assert re.search(f"bitsandbytes int8: .*{reason}", codec.unreadable)


def test_numbers_that_are_no_numbers_are_not_green(tmp_path):
    tensors, W = four_bits(weights(12, 10))
    tensors["q.weight.absmax"][0] = torch.nan
    tuned = save(tmp_path / "t.safetensors", {"q.weight": W + 1})
    record = bulkedge.audit(save(tmp_path / "b.safetensors", tensors), tuned)
    assert [row.status for row in record.matrices] == ["not_finite"]
    assert not record.summary.complete


def spiked(folder, packed, **model):
    """A quantised base, and a LoRA with a strong new direction."""
    tensors, W = packed
    save(folder / "base" / "model.safetensors", tensors | {"k.weight": weights(4, 4)})
    (folder / "base" / "config.json").write_text(json.dumps(model))
    u, v = orthonormal(W.shape[0], 1, 1), orthonormal(W.shape[1], 1, 2)
    factors = {"q.lora_B.weight": 30 * u.float(), "q.lora_A.weight": v.float().mT}
    return W, save_adapter(folder / "lora", factors, r=1, lora_alpha=2)


@pytest.mark.parametrize("make", [four_bits, eight_bits], ids=["nf4", "int8"])
def test_a_lora_is_judged_against_the_base_that_it_was_trained_on(make, tmp_path, capsys):
    W, adapter = spiked(tmp_path, make(gaussian(48, 36).float()), model_type="llama")
    record = bulkedge.audit(tmp_path / "base", adapter, recipe={"top_k": 3})
    (row,) = record.matrices
    low_rank = 2 * read_tensor_of(adapter, "B").double() @ read_tensor_of(adapter, "A").double()
    exact = oracle_scores(W, W.double() + low_rank, 3)
    for direction, score in some(zip(row.directions, exact, strict=True)):
        assert direction.score == pytest.approx(float(score), abs=1e-4)
    method = "bitsandbytes nf4" if make is four_bits else "bitsandbytes int8"
    assert record.inputs.base.quantised == f"{method} (1 weight)"
    assert record.inputs.tuned.quantised is None
    with pytest.raises(SystemExit) as stop:
        cli(["audit", str(tmp_path / "base"), str(adapter)], standalone_mode=False)
    assert stop.value.code == 1  # new directions
    assert f"base: quantised, {method} (1 weight): judged as it is read back" in " ".join(
        capsys.readouterr().out.split()
    )
    cli(["inspect", str(tmp_path / "base")], standalone_mode=False)
    ended = capsys.readouterr().out.splitlines()[-1]
    assert ended.startswith("full model of type llama: ")
    assert ended.endswith(f" in one file and its configuration; quantised: {method} (1 weight)")


def read_tensor_of(adapter, part):
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return file.get_tensor(f"q.lora_{part}.weight")


def test_what_a_model_keeps_in_out_lies_upright_once_packed(tmp_path):
    """GPT-2's weights are turned before they are packed, also square ones."""
    tensors, W = four_bits(weights(8, 8), name="h.0.attn.c_proj")
    base = tmp_path / "base"
    save(base / "model.safetensors", tensors)
    (base / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    plain = save(tmp_path / "plain" / "model.safetensors", {"h.0.attn.c_proj.weight": W.mT + 1})
    (tmp_path / "plain" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    name = "h.0.attn.c_proj.lora_"
    factors = {f"{name}A.weight": weights(2, 8), f"{name}B.weight": weights(8, 2)}
    for tuned in (plain.parent, save_adapter(tmp_path / "a", factors)):
        (comparison,) = make_plan(base, tuned, Recipe()).comparisons
        assert not comparison.base.transposed
        torch.testing.assert_close(comparison.base.read(), W, rtol=3e-7, atol=0)
        if comparison.tuned is not None:
            torch.testing.assert_close(comparison.tuned.read(), W + 1)


@pytest.fixture(scope="module")
def bitsandbytes():
    return library("bitsandbytes.functional")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
@pytest.mark.parametrize("method", ["nf4", "fp4"])
def test_four_bits_bit_by_bit_as_the_library_reads_them(
    method, nested, dtype, bitsandbytes, tmp_path
):
    for shape, block in (((300, 70), 64), ((7, 9), 64), ((70, 128), 128)):
        packed, state = bitsandbytes.quantize_4bit(
            weights(*shape, dtype=dtype), blocksize=block, quant_type=method,
            compress_statistics=nested,
        )  # fmt: skip
        parts = {f"q.weight.{name}": part for name, part in state.as_dict(packed=True).items()}
        found = read(tmp_path, {"q.weight": packed} | parts)
        expected = bitsandbytes.dequantize_4bit(packed, state)
        assert found.dtype is dtype
        assert torch.equal(found, expected)


def test_eight_bits_bit_by_bit_as_the_library_reads_them(bitsandbytes, tmp_path):
    codes, scales, _ = bitsandbytes.int8_vectorwise_quant(weights(30, 70, dtype=torch.float16))
    found = read(tmp_path, {"q.weight": codes, "q.SCB": scales})
    assert torch.equal(found, bitsandbytes.int8_vectorwise_dequant(codes, scales))


def test_the_library_reads_what_these_tests_pack(bitsandbytes):
    for nested in (False, True):
        tensors, W = four_bits(weights(20, 30), nested=nested)
        parts = {name.removeprefix("q.weight."): part for name, part in tensors.items()}
        state = bitsandbytes.QuantState.from_dict(
            {n: p for n, p in parts.items() if n != "q.weight"}, device=torch.device("cpu")
        )
        found = bitsandbytes.dequantize_4bit(tensors["q.weight"], state)
        torch.testing.assert_close(found, W, rtol=1e-5, atol=1e-7)


def trained(model):
    """A few steps, long ones, so that new directions come about."""
    ids = torch.randint(1000, 30000, (4, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(10):
        mean = model(input_ids=ids).last_hidden_state.mean(dim=1)
        loss = torch.nn.functional.cosine_similarity(mean[0::2], mean[1::2]).mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert min(losses) < losses[0]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_qlora_of_a_real_model_from_audit_to_repair(bitsandbytes, tmp_path):
    """MiniLM in nf4 with double quantisation; stock PEFT trains on it and loads the repair.

    Its rows have 384 and 1536 numbers, multiples of 64: with rows of 32, 96 or 160 bitsandbytes
    0.50.2 multiplies by other numbers on a CPU than those that it dequantises.
    """
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModel, BitsAndBytesConfig

    assert MINILM.is_dir(), "run `make minilm` first"
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = AutoModel.from_pretrained(MINILM, quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path / "base")
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]))
    adapted = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules() if hasattr(layer, "lora_B")
    }  # fmt: skip
    # before a product, for which bitsandbytes packs them anew for the processor
    packed = {name: layer.base_layer.weight for name, layer in adapted.items()}
    exact = {n: bitsandbytes.dequantize_4bit(w.data, w.quant_state) for n, w in packed.items()}
    trained(model)
    for name, layer in adapted.items():
        update = layer.get_delta_weight("default").detach()
        exact[name] = exact[name], exact[name].double() + update.double()
    model.save_pretrained(tmp_path / "lora")
    record = bulkedge.audit(tmp_path / "base", tmp_path / "lora")
    assert record.summary.complete
    assert record.inputs.base.quantised == "bitsandbytes nf4 with double quantisation (37 weights)"
    assert len(record.matrices) == len(exact) == 12
    for row in some(record.matrices):
        W0, W = exact[row.name.removesuffix(".weight")]
        scores = torch.tensor([direction.score for direction in row.directions])
        assert (scores - oracle_scores(W0, W, len(scores))).abs().max() < 1e-4
    assert record.summary.new_directions
    out = tmp_path / "repaired"
    repaired = bulkedge.repair(tmp_path / "base", tmp_path / "lora", out, method=Scale(0.0))
    assert {row.status for row in repaired.matrices} == {"repaired"}
    base = AutoModel.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, out)
    after = bulkedge.audit(tmp_path / "base", out)
    assert after.summary.new_directions < record.summary.new_directions
    for name, layer in some((n, m) for n, m in loaded.named_modules() if hasattr(m, "lora_B")):
        W0, W = exact[name.removeprefix("base_model.model.")]
        found = W0.double() + layer.get_delta_weight("default").detach().double()
        scores = oracle_scores(W0, found, 3)
        assert scores.min() > oracle_scores(W0, W, 3).min()
