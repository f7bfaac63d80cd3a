"""The last line of ``bulkedge inspect`` says what a path is, for every form that is read."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bulkedge.cli import cli
from fuzz.victims import VICTIMS

LINES = {
    "files": ("full model: 4 tensors in one file", "full model: 4 tensors in one file"),
    "shards": ("full model: 4 tensors in 2 shards", "full model: 4 tensors in 2 shards"),
    "bitsandbytes": (
        "bitsandbytes nf4 with double quantisation (1 weight)",
        "LoRA adapter: 2 layers updated by factors of rank 2; trained on org/name",
    ),
    "fp8": ("quantised: fp8 with scales (1 weight)", "quantised: fp8 with scales (1 weight)"),
    "scaled": (
        "quantised: fp8, a scale for each row (1 weight), fp8, a scale for each weight (1 weight)",
        "quantised: fp8 without scales (2 weights)",
    ),
    "mlx": (
        "quantised: MLX 4 bits (1 weight), MLX 8 bits (1 weight)",
        "LoRA adapter by MLX-LM: 1 layer updated by factors of rank 2",
    ),
    "gguf": (
        "full model of type llama: 2 tensors in GGUF; quantised: GGUF Q8_0 (1 weight)",
        "LoRA adapter in GGUF: 2 layers updated by factors of rank 2",
    ),
    "kohya": ("full model: 3 tensors in one file", "LoRA adapter: 3 layers updated by factors of"),
    "closed_form": ("full model", "LoHa adapter: 2 layers updated; trained on org/name"),
    "kronecker": ("full model", "LoKr adapter: 1 layer updated; trained on org/name"),
    "from_the_base": (
        "full model of type llama: 4 tensors",
        "LoRA adapter initialised by PiSSA: 2 layers updated by factors of rank 2; trained on org/",
    ),
    "rotated": ("full model", "OFT adapter: 2 layers updated; trained on org/name"),
    "multiplied": ("full model", "IA3 adapter: 2 layers updated; trained on org/name"),
    "spectrum": ("full model", "FourierFT adapter: 2 layers updated; trained on org/name"),
    "lycoris": ("full model", "LoRA adapter: 2 layers updated"),
    "gptq": ("quantised: GPTQ int4 (1 weight)", "LoRA adapter: 1 layer updated by factors of rank"),
    "awq": ("quantised: AWQ int4 (1 weight)", "LoRA adapter: 1 layer updated by factors of rank"),
    "packed": (
        "quantised: compressed-tensors int4 (1 weight), ",
        "LoRA adapter: 2 layers updated by factors of rank 2",
    ),
    "lora_file": ("full model", "LoRA adapter: "),
    "resized": ("full model", ""),
    "experts": ("full model", ""),
    "half_precision": ("full model of type llama: 4 tensors", "full model of type llama: 4 ten"),
}


@pytest.mark.parametrize("kind", LINES)
def test_what_a_path_is(kind, tmp_path):
    if kind == "gguf":
        pytest.importorskip("gguf")
    victim = VICTIMS[kind]()
    for path, content in victim.files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    for path, line in zip((victim.base, victim.tuned), LINES[kind], strict=True):
        done = CliRunner().invoke(cli, ["inspect", str(tmp_path / path)])
        last = done.stdout.splitlines()[-1]
        assert line in last, (kind, Path(path).name)


def test_a_weight_in_blocks_is_listed_with_the_shape_of_its_numbers(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "b.gguf").write_bytes(VICTIMS["gguf"]().files["b.gguf"])
    told = CliRunner().invoke(cli, ["inspect", "--json", str(tmp_path / "b.gguf")]).stdout
    rows = {row["name"]: (row["dtype"], row["shape"]) for row in json.loads(told)}
    assert rows["model.layers.0.mlp.down_proj.weight"] == ("GGUF Q8_0", [6, 32])
