"""GGUF: bases, fine-tunes and LoRA adapters, against the library and transformers' own loader."""

import contextlib
import pickle
import struct

import pytest
import torch

import bulkedge
from bulkedge import AdapterError, CheckpointError
from bulkedge.checkpoint import open_checkpoint, open_path
from bulkedge.checkpoint.gguf import TYPES, read_gguf
from bulkedge.checkpoint.gguf_names import heads_of, model_names
from helpers import MINILM, needs, oracle_scores, save, save_adapter, some, weights

gguf = pytest.importorskip("gguf")

from ggufs import HEADS, KV_HEADS, llama, lora, to_llama_cpp, write  # noqa: E402

RECIPE = {"top_k": 4, "method": "dense"}
Q, K, DOWN = "blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.ffn_down.weight"
LAYER = "model.layers.0."
NAMES = {
    "model.embed_tokens.weight": ("token_embd.weight", 0, (40, 64)),
    f"{LAYER}self_attn.q_proj.weight": (Q, HEADS, (64, 64)),
    f"{LAYER}self_attn.k_proj.weight": (K, KV_HEADS, (32, 64)),
    f"{LAYER}self_attn.v_proj.weight": ("blk.0.attn_v.weight", 0, (32, 64)),
    f"{LAYER}self_attn.o_proj.weight": ("blk.0.attn_output.weight", 0, (64, 64)),
    f"{LAYER}mlp.gate_proj.weight": ("blk.0.ffn_gate.weight", 0, (96, 64)),
    f"{LAYER}mlp.up_proj.weight": ("blk.0.ffn_up.weight", 0, (96, 64)),
    f"{LAYER}mlp.down_proj.weight": (DOWN, 0, (64, 96)),
    f"{LAYER}input_layernorm.weight": ("blk.0.attn_norm.weight", 0, (64,)),
    f"{LAYER}post_attention_layernorm.weight": ("blk.0.ffn_norm.weight", 0, (64,)),
    "model.norm.weight": ("output_norm.weight", 0, (64,)),
    "lm_head.weight": ("output.weight", 0, (40, 64)),
}


def model(seed=0):
    """A llama's weights by transformers' names."""
    return {n: weights(*shape, seed=seed + i) for i, (n, (*_, shape)) in enumerate(NAMES.items())}


def converted(tensors):
    """The same as llama.cpp's converter has them."""
    return {
        NAMES[name][0]: to_llama_cpp(W, heads) if (heads := NAMES[name][1]) else W
        for name, W in tensors.items()
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base in Q8_0, and its weights as transformers loads them."""
    from transformers import AutoModelForCausalLM

    file = llama(converted(model()), tmp_path_factory.mktemp("gguf") / "base.gguf", "Q8_0")
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    return file, loaded.state_dict()


def test_every_weight_is_the_one_that_transformers_loads(base):
    file, loaded = base
    opened = open_checkpoint(file)
    assert set(opened.weights) == set(loaded) == set(NAMES)
    for name, codec in some(opened.weights.items()):
        W, read = loaded[name].float(), codec.read(None, None)
        assert torch.equal(read.reshape(W.shape).float(), W), name
        assert codec.shape == tuple(W.shape)
        assert pickle.loads(pickle.dumps(codec)) == codec  # noqa: S301
        if W.ndim == 2:
            assert torch.equal(codec.read(None, (5, 17)).float(), W[5:17])
    assert opened.quantised == "GGUF Q8_0 (9 weights)"


FACTORS = {
    f"{LAYER}self_attn.q_proj": (weights(2, 64, seed=1), 2 * weights(64, 2, seed=2)),
    f"{LAYER}self_attn.k_proj": (weights(2, 64, seed=3), 2 * weights(32, 2, seed=4)),
    f"{LAYER}mlp.down_proj": (weights(2, 96, seed=5), 2 * weights(64, 2, seed=6)),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """One LoRA, by PEFT and in GGUF; α/r = 2."""
    folder = tmp_path_factory.mktemp("lora")
    tensors = {}
    for name, (A, B) in FACTORS.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
    inside = {NAMES[f"{n}.weight"][0]: (A, B, NAMES[f"{n}.weight"][1])
              for n, (A, B) in FACTORS.items()}  # fmt: skip
    peft = save_adapter(folder / "peft", tensors)
    return {"peft": peft, "gguf": lora(inside, folder / "lora.gguf", alpha=4.0)}


@pytest.mark.parametrize("kind", ["peft", "gguf"])
def test_an_adapter_is_judged_against_what_transformers_loads(kind, base, adapters, tmp_path):
    file, loaded = base
    whole = save(tmp_path / "whole.safetensors", dict(loaded))
    for against in (file, whole):
        record = bulkedge.audit(against, adapters[kind], recipe=RECIPE)
        assert len(record.matrices) == len(FACTORS)
        for row in some(record.matrices):
            name = row.name.removesuffix(".weight")
            W0, (A, B) = loaded[f"{name}.weight"].double(), FACTORS[name]
            expected = oracle_scores(W0, W0 + 2 * B.double() @ A.double(), 4)
            found = torch.tensor([d.score for d in row.directions], dtype=torch.float64)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
            assert (row.rank, row.scale) == (2, 2.0)


def test_the_order_of_rows_matters_to_an_adapter(base, adapters, tmp_path):
    """Without undoing it, q would have other scores."""
    _, loaded = base
    name = f"{LAYER}self_attn.q_proj"
    W0, (A, B) = loaded[f"{name}.weight"].double(), FACTORS[name]
    right = oracle_scores(W0, W0 + 2 * B.double() @ A.double(), 4)
    wrong = to_llama_cpp(W0, HEADS)
    assert (oracle_scores(wrong, wrong + 2 * B.double() @ A.double(), 4) - right).abs().max() > 0.01


def test_a_full_fine_tune_in_either_form(base, tmp_path):
    file, loaded = base
    tuned = {n: W + 0.5 * weights(*W.shape, seed=70 + i) if W.ndim > 1 else W
             for i, (n, W) in enumerate(loaded.items())}  # fmt: skip
    forms = [
        llama(converted(tuned), tmp_path / "tuned.gguf"),
        save(tmp_path / "tuned.safetensors", tuned),
    ]
    first, second = (bulkedge.audit(file, form, recipe=RECIPE) for form in forms)
    assert [m.directions for m in first.matrices] == [m.directions for m in second.matrices]
    assert first.summary.lost == second.summary.lost == 0
    assert first.summary.audited == 9
    row = next(m for m in first.matrices if "q_proj" in m.name)
    W0, W = (side[f"{LAYER}self_attn.q_proj.weight"] for side in (loaded, tuned))
    found = torch.tensor([d.score for d in row.directions], dtype=torch.float64)
    torch.testing.assert_close(found, oracle_scores(W0, W, 4), atol=1e-4, rtol=0)


def blocks(kind, rows, columns):
    """Rows of random blocks; what is a scale in them is kept small enough for half precision."""
    _, block, size = next(t for t in TYPES.values() if t[0] == kind)
    generator = torch.Generator().manual_seed(3)
    packed = torch.randint(0, 60, (rows, columns // block * size), generator=generator)
    return packed.to(torch.uint8)


@pytest.mark.parametrize(
    "kind",
    ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
     "IQ4_XS", "IQ3_S", "IQ2_S", "TQ1_0", "TQ2_0", "BF16", "F16",
     pytest.param("MXFP4", marks=needs("gguf", "0.18", "it does not know this format"))],
)  # fmt: skip
def test_the_numbers_of_a_block_are_those_of_the_library(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("bulkedge.checkpoint.codec.base.STRIP", 1024)
    packed = blocks(kind, 9, 512)
    file = write({DOWN: (packed, kind)}, tmp_path / "x.gguf")
    expected = gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[kind])
    (codec,) = open_checkpoint(file).weights.values()
    assert torch.equal(codec.read(None, None).float(), torch.from_numpy(expected.copy()))
    assert torch.equal(codec.read(None, (4, 8)).float(), torch.from_numpy(expected[4:8].copy()))
    assert codec.bits >= 1


def test_sizes_of_blocks_are_those_of_the_library():
    ours = {name: sizes for name, *sizes in some(TYPES.values())}
    for kind, sizes in some(gguf.GGML_QUANT_SIZES.items()):
        if kind.name in ours:
            assert ours[kind.name] == list(sizes)
            assert TYPES[kind.value][0] == kind.name


def test_names_of_an_encoder_are_those_of_the_real_model():
    stored = [n for n, i in open_checkpoint(MINILM).tensors.items() if len(i.shape) == 2]
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, 6)
    theirs = {n: table.get_name(n, (".weight",)) for n in stored if "encoder" in n or ".word" in n}
    assert len(theirs) == 37
    assert model_names("bert", list(theirs.values())) == {v: k for k, v in theirs.items()}


@pytest.mark.parametrize("arch", ["qwen2", "gemma3", "phi3", "gpt2"])
def test_names_of_other_models_are_transformers(arch):
    found = model_names(
        arch, ["blk.3.ffn_up.weight", "blk.3.attn_output.bias", "token_embd.weight"]
    )
    root = "transformer.h.3." if arch == "gpt2" else "model.layers.3."
    ends = ("mlp.c_fc.weight", "attn.c_proj.bias") if arch == "gpt2" else (
        "mlp.up_proj.weight", "self_attn.o_proj.bias"
    )  # fmt: skip
    assert list(found.values())[:2] == [root + end for end in ends]


def test_heads_are_told_or_asked_for():
    told = {"general.architecture": "llama", "llama.attention.head_count": [4, 8]}
    assert [heads_of(f"blk.{i}.attn_q.weight", told) for i in (0, 1, 2)] == [4, 8, -1]
    assert heads_of(Q, {"general.architecture": "qwen2"}) == 0
    assert heads_of(DOWN, told) == 0


def test_heads_that_are_not_told_are_lost_not_guessed(tmp_path):
    file = write({Q: (weights(64, 64), None)}, tmp_path / "x.gguf")
    (codec,) = open_checkpoint(file).weights.values()
    assert "does not say how many heads" in codec.unreadable
    with pytest.raises(CheckpointError, match="does not say how many heads"):
        codec.read(None, None)


def test_parts_of_a_split_model_are_read_together(tmp_path):
    for i, (name, W) in enumerate(
        {DOWN: weights(64, 96), "output.weight": weights(40, 64)}.items()
    ):
        writer = gguf.GGUFWriter(tmp_path / f"m-{i + 1:05d}-of-00002.gguf", "qwen2")
        writer.add_uint16("split.count", 2)
        writer.add_tensor(name, W.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    for path in (tmp_path, tmp_path / "m-00002-of-00002.gguf"):
        opened = open_checkpoint(path)
        assert set(opened.tensors) == {f"{LAYER}mlp.down_proj.weight", "lm_head.weight"}
        assert len(opened.files) == 2
    (tmp_path / "m-00001-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"'m-00001-of-00002\.gguf' is missing beside it"):
        open_checkpoint(tmp_path / "m-00002-of-00002.gguf")


def test_a_folder_with_one_file_and_with_several(tmp_path):
    write({DOWN: (weights(64, 96), None)}, tmp_path / "a.gguf")
    assert open_checkpoint(tmp_path).path == tmp_path
    write({DOWN: (weights(64, 96), None)}, tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match="several GGUF files, and nothing says which to read"):
        open_checkpoint(tmp_path)


ADAPTERS = {
    "no pair": ({"blk.0.ffn_up.weight.lora_a": (weights(2, 64), None)}, "no pair of factors"),
    "shapes": (
        {f"{DOWN}.lora_a": (weights(2, 96), None), f"{DOWN}.lora_b": (weights(64, 3), None)},
        "do not fit together",
    ),
    "experts": (
        {f"{DOWN}.lora_a": (weights(2, 2, 96), None), f"{DOWN}.lora_b": (weights(2, 64, 2), None)},
        "not those of one matrix",
    ),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_parts_of_an_adapter_that_cannot_be_used_are_told(case, tmp_path):
    tensors, message = ADAPTERS[case]
    file = write(tensors, tmp_path / "l.gguf", general_type="adapter", adapter_type="lora")
    opened = open_path(file)
    assert not opened.factors
    assert {message in row.reason for row in some(opened.unhandled)} == {True}


def test_another_kind_of_adapter_is_refused(tmp_path):
    file = write({DOWN: (weights(4, 4), None)}, tmp_path / "l.gguf",
                 general_type="adapter", adapter_type="control_vector")  # fmt: skip
    with pytest.raises(AdapterError, match="an adapter of type 'control_vector'"):
        open_path(file)


def test_an_update_of_the_embedding_and_one_without_alpha(tmp_path):
    A, B = weights(40, 2, seed=1), weights(64, 2, seed=2)
    parts = {"token_embd.weight.lora_a": (A, None), "token_embd.weight.lora_b": (B, None)}
    file = write(parts, tmp_path / "l.gguf", general_type="adapter", adapter_type="lora")
    (update,) = open_path(file).factors.values()
    left, right, scale = update.read()
    assert scale == 1
    torch.testing.assert_close(scale * left @ right, (A @ B.mT).double())
    assert (update.shape, update.embedding) == ((40, 64), True)


def test_a_damaged_byte_or_a_short_file_is_a_clean_error(tmp_path):
    good = write({DOWN: (weights(4, 32), "Q8_0")}, tmp_path / "x.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"
    end = max(t.start + t.nbytes for t in read_gguf(tmp_path / "x.gguf")[1].values())
    for length in range(0, end, 7):
        bad.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match="the file is damaged or hostile, fetch it again"):
            read_gguf(bad)
    for at in range(200):
        bad.write_bytes(good[:at] + bytes([good[at] ^ 0x80]) + good[at + 1 :])
        with contextlib.suppress(CheckpointError):  # and nothing else
            open_checkpoint(bad)


HUGE = {
    "tensors": (8, "entries in"),
    "settings": (16, "entries in"),
    "a name": (24, "entries in"),
    "a version": (0, "do not begin with GGUF"),
}


@pytest.mark.parametrize("case", HUGE)
def test_nothing_is_allocated_by_a_number_in_the_file(case, tmp_path):
    at, message = HUGE[case]
    good = bytearray(write({DOWN: (weights(4, 32), None)}, tmp_path / "x.gguf").read_bytes())
    good[at : at + 8] = struct.pack("<Q", 2**62)
    (tmp_path / "x.gguf").write_bytes(good)
    with pytest.raises(CheckpointError, match=message):
        read_gguf(tmp_path / "x.gguf")


def test_without_the_library(tmp_path, monkeypatch):
    import sys

    file = write({DOWN: (weights(4, 32), None)}, tmp_path / "x.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"to read GGUF: .*pip install 'bulkedge\[gguf\]'"):
        open_checkpoint(file)


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def number(key, value):
    return text(key) + struct.pack("<II", 4, value)


def entry(name="a.weight", shape=(4, 3), kind=0, offset=0):
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def header(pairs=(), entries=(), version=3, data=bytes(512)):
    counts = struct.pack("<IQQ", version, len(entries), len(pairs))
    return b"GGUF" + counts + b"".join(pairs) + b"".join(entries) + data


HOSTILE = {
    "alignment": (header([number("general.alignment", 0)]), r"general\.alignment 0; the file"),
    "setting twice": (header([number("a", 1)] * 2), "setting 'a' is there twice, or has a huge"),
    "huge key": (header([text("x" * 2**17) + bytes(8)]), "setting None is there twice, or has a"),
    "kind of setting": (header([text("a") + struct.pack("<I", 99)]), "a setting of type 99"),
    "nested lists": (
        header([text("a") + struct.pack("<IIQIQ", 9, 9, 1, 9, 1) + struct.pack("<IQ", 9, 1) * 9]),
        "a setting of type 9",
    ),
    "version": (header(version=9), "GGUF version 9, expected 2 or 3 in little endian"),
    "tensor twice": (header(entries=[entry()] * 2), r"tensor 'a\.weight' is there twice"),
    "overlap": (
        header(entries=[entry(), entry("b.weight")]), r"'b\.weight' overlaps another, or leaves the"
    ),
    "beyond the end": (header(entries=[entry(offset=4096)]), "another, or leaves the file"),
    "type": (header(entries=[entry(kind=77)]), "type number 77, which is unknown"),
    "no dimension": (header(entries=[entry(shape=())]), r"tensor 'a\.weight': 0 dimensions"),
    "many dimensions": (header(entries=[entry(shape=[1] * 5)]), "weight': 5 dimensions"),
    "half a block": (header(entries=[entry(kind=8)]), r"bad shape \(3, 4\) of Q8_0"),
    "empty": (header(entries=[entry(shape=(0, 4))]), r"bad shape \(4, 0\) of F32"),
    "huge": (header(entries=[entry(shape=(2**40, 2**40))]), "bad shape"),
    "name": (header(entries=[entry("x" * 2000)]), "a tensor's name is no text or too long"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(case, tmp_path):
    content, message = HOSTILE[case]
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "x.gguf")


def test_a_header_beyond_the_cap(tmp_path, monkeypatch):
    monkeypatch.setenv("BULKEDGE_MAX_HEADER_MB", "1")
    message = r"the header exceeds 1048576 bytes \(BULKEDGE_MAX_HEADER_MB raises that\)"
    long = text("a") + struct.pack("<IIQ", 9, 0, 2**21) + bytes(2**21)
    for pairs in ([long], [number(f"{i:0100}", 1) for i in range(10_000)]):
        (tmp_path / "x.gguf").write_bytes(header(pairs))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / "x.gguf")


def test_two_tensors_of_one_name_in_the_model(tmp_path):
    both = {DOWN: (weights(4, 4), None), f"{LAYER}mlp.down_proj.weight": (weights(4, 4), None)}
    file = write(both, tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="two tensors of it have one name in the model"):
        open_checkpoint(file)


def test_an_alpha_that_is_no_number_and_a_part_of_another_name(tmp_path):
    file = write({DOWN: (weights(4, 4), None)}, tmp_path / "l.gguf",
                 general_type="adapter", adapter_type="lora", adapter_lora_alpha="x")  # fmt: skip
    with pytest.raises(AdapterError, match=r"adapter\.lora\.alpha is 'x'; convert it again"):
        open_path(file)
    (tmp_path / "part.gguf").write_bytes(header([number("split.count", 3)]))
    with pytest.raises(CheckpointError, match="one of 3 parts; give it the name it was split with"):
        open_checkpoint(tmp_path / "part.gguf")
