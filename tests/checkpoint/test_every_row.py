"""Each row of the table of formats has a test, a judge, and a line of ``inspect``."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import save_file

from bulkedge.cli import cli
from fuzz.victims import VICTIMS
from helpers import save, save_adapter, some, weights
from hub_server import SHA

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/audit.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("| format | read | tested against |\n|---|---|---|\n")[2]
CELLS = {
    what: tested
    for what, _, tested in (
        (cell.strip() for cell in line.strip("|").split(" | "))
        for line in TABLE.partition("\n\n")[0].splitlines()
    )
}
PAIR = {"base_model.model.q.lora_A.weight": weights(2, 6), "base_model.model.q.lora_B.weight":
        weights(6, 2)}  # fmt: skip


def victim(kind, side="base"):
    """One of the inputs that the fuzzer damages, whole."""

    def make(folder):
        found = VICTIMS[kind]()
        for path, content in found.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return folder / getattr(found, side)

    return make


def tensors(stored, **config):
    def make(folder):
        save(folder / "model.safetensors", stored)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def peft(**settings):
    return lambda folder: save_adapter(folder / "a", PAIR, **settings)


def in_the_cache(folder):
    name = folder / "models--org--name"
    tensors({"q.weight": weights(4, 3)}, transformers_version="5.24.0")(name / "snapshots" / SHA)
    (name / "refs").mkdir()
    (name / "refs/main").write_text(SHA)
    return "org/name"


def overlay(folder):
    save(folder / "1.safetensors", {"q.weight": weights(4, 3), "k.weight": weights(4, 3)})
    save(folder / "2.safetensors", {"q.weight": weights(4, 3, seed=1)})
    index = {"weight_map": {"q.weight": "2.safetensors", "k.weight": "1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def touched(name):
    def make(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        return folder

    return make


@dataclass(frozen=True)
class Row:
    """Which modules the tests of a row ask, and what inspect says of an example."""

    judges: tuple[str, ...]
    examples: tuple[tuple, ...]


ROWS = {
    "4-bit and 8-bit bitsandbytes bases": Row(("bitsandbytes",), (
        (victim("bitsandbytes"), "bitsandbytes nf4 with double quantisation (1 weight)"),
        (victim("bitsandbytes", "tuned"), "LoRA adapter by PEFT 0.21.2: 2 layers updated by fact"),
    )),
    "LoRA files of ComfyUI, ai-toolkit, SimpleTuner, kohya's scripts, diffusers": Row(
        ("diffusers",), (
            (victim("kohya", "tuned"), "LoRA adapter in kohya's names: 3 layers updated"),
            (victim("lora_file", "tuned"), "LoRA adapter in diffusers' names: 3 layers updated"),
        )
    ),
    # what a program does with rows that it does not know is a matter of definition
    "a resized vocabulary": Row((), ((victim("resized", "tuned"), "full model of type llama: 3"),)),
    "fp8 and int8 with a scale per tensor or row, plain fp8": Row(("compressed_tensors",), (
        (victim("scaled"), "quantised: fp8, a scale for each row (1 weight), fp8, a scale for ea"),
        (victim("scaled", "tuned"), "quantised: fp8 without scales (2 weights)"),
        (victim("fp8"), "quantised: fp8 with scales (1 weight)"),
    )),
    "MXFP4 of gpt-oss; int4, int8, MXFP4 and NVFP4 of compressed-tensors": Row(
        ("transformers", "compressed_tensors"),
        ((victim("packed"), "quantised: compressed-tensors int4 (1 weight), MXFP4 (1 weight)"),),
    ),
    "GPTQ, AWQ, AutoRound's exports to them": Row(("auto_round_extension", "awq"), (
        (victim("gptq"), "quantised: GPTQ int4 (1 weight)"),
        (victim("awq"), "quantised: AWQ int4 (1 weight)"),
    )),
    # refused: no numbers to compare
    "HQQ, torchao": Row((), (
        (tensors({"q.W_q": weights(4, 4).byte()}), "quantised by HQQ, which is NOT read"),
        (tensors({"q._weight_qdata": weights(4, 4).byte()}), "quantised by torchao, which is NOT"),
    )),
    "GGUF bases, fine-tunes, LoRA adapters": Row(("gguf", "transformers"), (
        (victim("gguf"), "full model of type llama: 2 tensors in GGUF; quantised: GGUF Q8_0 (1 "),
        (victim("gguf", "tuned"), "LoRA adapter in GGUF: 2 layers updated by factors of rank 2"),
    )),
    "MLX-LM adapters, bases in 2, 4 and 8 bits": Row(("mlx",), (
        (victim("mlx"), "quantised: MLX 4 bits (1 weight), MLX 8 bits (1 weight)"),
        (victim("mlx", "tuned"), "LoRA adapter by MLX-LM: 1 layer updated"),
    )),
    "a hub id": Row(("hub_server",), (
        (in_the_cache, "full model by transformers 5.24.0: 1 tensor in one file and its config"),
    )),
    "PiSSA, OLoRA, unconverted": Row(("peft",), (
        (victim("from_the_base", "tuned"), "LoRA adapter by PEFT 0.21.2, initialised by PiSSA: 2"),
    )),
    "`pissa_niter_…`, CorDA, LoRA-GA, LoftQ, unconverted": Row(("peft",), tuple(
        (peft(init_lora_weights=kind), f"initialised by '{kind}'", 2)
        for kind in ("pissa_niter_4", "corda", "lora_ga", "loftq")
    )),
    "LoHa, LoKr, AdaLoRA, VeRA": Row(("peft",), (
        (victim("closed_form", "tuned"), "LoHa adapter by PEFT 0.21.2: 2 layers updated; trained"),
        (victim("kronecker", "tuned"), "LoKr adapter by PEFT 0.21.2: 1 layer updated; trained on"),
    )),
    "IA³, OFT, BOFT, HRA, FourierFT, trainable tokens, `modules_to_save` beside them": Row(
        ("peft",), (
            (victim("rotated", "tuned"), "OFT adapter by PEFT 0.21.2: 2 layers updated"),
            (victim("multiplied", "tuned"), "IA3 adapter by PEFT 0.21.2: 2 layers updated"),
            (victim("spectrum", "tuned"), "FourierFT adapter by PEFT 0.21.2: 2 layers updated"),
        )
    ),
    "LoRA, LoHa, LoKr and full differences in a file of LyCORIS": Row(("lycoris",), (
        (victim("lycoris", "tuned"), "LoRA adapter in LyCORIS's names: 2 layers updated"),
    )),
    "VB-LoRA, C3A, RoAd, LN tuning, other PEFT methods": Row((), tuple(
        (peft(peft_type=kind), f"a '{kind}' adapter; it is not handled", 2)
        for kind in ("VBLORA", "C3A", "ROAD", "LN_TUNING")
    )),
    "a tensor stored in two shards": Row((), (
        (overlay, "full model: 2 tensors in 2 shards, 1 superseded copy"),
    )),
    "`cls_token`, position embeddings, probes": Row((), (
        (tensors({"vit.cls_token": weights(1, 1, 4)}, model_type="vit"), "full model of type vit"),
    )),
    "DeepSpeed and FSDP states, pickles, the hub's cache folder": Row((), (
        (touched("global_step10/x.pt"), "zero_to_fp32.py of DeepSpeed", 2),
        (touched("__0_0.distcp"), "accelerate merge-weights", 2),
        (touched("pytorch_model.bin"), r"safetensors\.torch\.save_file", 2),
        (touched("models--org--a/refs/main"), "by its id, such as org/a", 2),
    )),
}  # fmt: skip


def test_every_row_of_the_page_is_here():
    assert list(ROWS) == list(CELLS)


@pytest.mark.parametrize("what", ROWS)
def test_the_named_tests_ask_the_library_that_owns_the_format(what):
    files = re.findall(r"`(tests/[\w/]+\.py)`", CELLS[what])
    assert files
    text = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in files)
    asked = r'(import|from) {0}\b|\b(library|importorskip)\("{0}\b'
    assert [j for j in ROWS[what].judges if not re.search(asked.format(j), text)] == []


@pytest.mark.parametrize("what", ROWS)
def test_inspect_says_in_one_line_what_it_is(what, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "0"))
    for number, (make, words, *code) in some(enumerate(ROWS[what].examples)):
        if what.startswith("GGUF"):
            pytest.importorskip("gguf")
        folder = tmp_path / str(number)
        folder.mkdir()
        done = CliRunner().invoke(cli, ["inspect", str(make(folder))])
        told = str(done.exception) if code else done.stdout.splitlines()[-1]
        assert re.search(words if code else re.escape(words), told), (told, done.output)
        assert done.exit_code == 0 or code


def test_a_weight_in_blocks_is_listed_with_the_shape_of_its_numbers(tmp_path):
    pytest.importorskip("gguf")
    told = CliRunner().invoke(cli, ["inspect", "--json", str(victim("gguf")(tmp_path))]).stdout
    rows = {row["name"]: (row["dtype"], row["shape"]) for row in json.loads(told)}
    assert rows["model.layers.0.mlp.down_proj.weight"] == ("GGUF Q8_0", [6, 32])


AI_TOOLKIT = json.dumps({"name": "ai-toolkit", "version": "0.5.1"})


@pytest.mark.parametrize(
    ("metadata", "line"),
    [
        ({"ss_network_module": "networks.lora"}, "LoRA adapter by kohya's scripts: 1 layer"),
        ({"ss_network_module": "lycoris.kohya"}, "LoRA adapter by LyCORIS: 1 layer"),
        ({"software": AI_TOOLKIT}, "LoRA adapter by ai-toolkit 0.5.1: 1 layer"),
        ({"software": "{"}, "LoRA adapter in PEFT's names: 1 layer"),
        ({"software": '{"name": "\u001b[31m"}'}, "LoRA adapter in PEFT's names: 1 layer"),
        ({"software": '["x"]'}, "LoRA adapter in PEFT's names: 1 layer"),
    ],
)
def test_a_file_that_says_who_wrote_it(metadata, line, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file(PAIR, file, metadata)
    done = CliRunner().invoke(cli, ["inspect", str(file)])
    assert done.stdout.splitlines()[-1].startswith(line)


@pytest.mark.parametrize("version", ["", "0.21\x1b[31m", "9" * 99])
def test_a_version_that_is_none_is_left_out(version, tmp_path):
    done = CliRunner().invoke(cli, ["inspect", str(peft(peft_version=version)(tmp_path))])
    assert done.stdout.splitlines()[-1].startswith("LoRA adapter by PEFT: 1 layer")
