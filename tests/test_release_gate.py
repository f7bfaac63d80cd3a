"""The release gate of the page on CI passes what is healthy, and nothing that is damaged."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import practice
from bulkedge._moments import collect_moments
from commands import run
from helpers import save_adapter, weights

PAGE = (Path(__file__).parents[1] / "docs/ci.md").read_text()
PASSED, FOUND, UNKNOWN = 0, 1, 2
KEY, INDEX = "encoder.layer.1.attention.self.key.", "model.safetensors"
TEXTS = [
    " ".join(practice.WORDS[(3 * i + j * (i % 7 + 1)) % 20] for j in range(6)) for i in range(60)
]
"""More than a layer is wide."""
NORM = "encoder.layer.0.output.LayerNorm.weight"


def gate(folder):
    """The exit code of the audit in the block of the page, and what it says."""
    (block,) = re.findall(r"^## A release gate$.*?^```sh\n(.*?)^```$", PAGE, re.M | re.S)
    (command,) = (words for words in practice.commands(block) if words[-2:] == ["-o", "release"])
    assert command[:4] == ["bulkedge", "audit", "BASE", "TUNED"]
    places = {"BASE": "BASE", "TUNED": "NEW", "base.moments": "base.moments"}
    given = {word: folder / place for word, place in places.items()}
    words = [given.get(word, word) for word in command[1 : command.index("-o")]]
    ended = run(*words, "-q")
    return ended.returncode, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base with its moments: the names of BERT, and values that are not those of noise."""
    folder = practice.fill(tmp_path_factory.mktemp("release"))
    file = folder / "BASE/model.safetensors"
    state = load_file(file)
    for i, (name, W) in enumerate(state.items()):
        if W.ndim == 2:
            u, v = (weights(n, seed=i + n) for n in W.shape)
            state[name] = W + 2 * torch.linalg.matrix_norm(W, 2) * torch.outer(
                u / u.norm(), v / v.norm()
            )
        elif name.endswith("bias"):
            state[name] = 0.1 * weights(*W.shape, seed=i)
    save_file(state, file, metadata={"format": "pt"})
    collect_moments(folder / "BASE", TEXTS).save(folder / "base.moments")
    return folder


@pytest.fixture
def folder(models, tmp_path):
    for name in ("BASE", "base.moments"):
        (tmp_path / name).symlink_to(models / name)
    return tmp_path


def factors(folder, strength=1e-3):
    """A LoRA of some layers, weak beside the base."""
    base = load_file(folder / "BASE/model.safetensors")
    return {
        f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight": strength * found
        for i, (name, W) in enumerate(base.items())
        if name.endswith(("query.weight", "dense.weight"))
        for x, found in {
            "A": weights(2, W.shape[1], seed=i), "B": weights(W.shape[0], 2, seed=i + 1)
        }.items()
    }  # fmt: skip


def full(folder, dtype=torch.bfloat16):
    """Every tensor trained a little, saved by the folder's own layout."""
    base = load_file(folder / "BASE/model.safetensors")
    return {
        n: (W + 1e-3 * weights(*W.shape, seed=i)).to(dtype) for i, (n, W) in enumerate(base.items())
    }


def merged(folder, dtype=torch.bfloat16):
    """The same LoRA added to the weights."""
    base, lora = load_file(folder / "BASE/model.safetensors"), factors(folder)
    for name, W in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{stem}A.weight" in lora:
            base[name] = W + 2 * lora[f"{stem}B.weight"] @ lora[f"{stem}A.weight"]
    return {name: W.to(dtype) for name, W in base.items()}


def release(folder, tensors, **config):
    """A folder as transformers saves it."""
    new = folder / "NEW"
    new.mkdir()
    save_file({n: W.contiguous() for n, W in tensors.items()}, new / INDEX)
    settings = json.loads((folder / "BASE/config.json").read_text())
    (new / "config.json").write_text(json.dumps(settings | {"dtype": "bfloat16"} | config))


HEALTHY = {
    "a full fine-tune in bf16": full,
    "a full fine-tune in fp16": lambda folder: full(folder, torch.float16),
    "a full fine-tune in fp32": lambda folder: full(folder, torch.float32),
    "a merged LoRA in bf16": merged,
    "a merged LoRA in fp16": lambda folder: merged(folder, torch.float16),
}


@pytest.mark.parametrize("made", HEALTHY.values(), ids=HEALTHY)
def test_a_healthy_model_passes(made, folder):
    release(folder, made(folder))
    code, told = gate(folder)
    assert code == PASSED, told
    assert "doubt:" not in told


def test_a_healthy_adapter_of_the_hub_passes(folder):
    save_adapter(folder / "NEW", factors(folder), base_model_name_or_path="org/small-bert")
    code, told = gate(folder)
    assert code == PASSED, told
    assert "doubt:" not in told


def with_(name, change):
    return lambda tensors: tensors | {name: change(tensors[name])}


def spoilt(W):
    W = W.clone()
    W.view(-1)[3] = float("nan")
    return W


def without(name):
    return lambda tensors: {n: W for n, W in tensors.items() if n != name}


def prefixed(prefix):
    return lambda tensors: {prefix + n: W for n, W in tensors.items()}


# what happens to the tensors of a healthy full fine-tune, the exit code, and what is said
DAMAGE = {
    "NaN in a weight": (with_(f"{KEY}weight", spoilt), UNKNOWN, "1 NaN"),
    "NaN in a bias": (with_(f"{KEY}bias", spoilt), UNKNOWN, "1 NaN"),
    "NaN in a norm": (with_(NORM, spoilt), FOUND, f"{NORM} is left out, but holds 1 NaN"),
    "zeros in a norm": (with_(NORM, torch.zeros_like), FOUND, f"{NORM} of the fine-tune is all"),
    "zeros in a bias": (with_(f"{KEY}bias", torch.zeros_like), FOUND, "is all zeros"),
    "a norm 8 times": (with_(NORM, lambda w: 8 * w), FOUND, f"{NORM} has changed by"),
    "a bias of another scale": (with_(f"{KEY}bias", lambda b: b + 100), FOUND, "changed biases"),
    "a weight twice": (with_(f"{KEY}weight", lambda w: 2.5 * w), FOUND, "larger than the base"),
    "no bias": (without(f"{KEY}bias"), FOUND, f"{KEY}bias of the base is not stored"),
    "no norm": (without(NORM), FOUND, f"{NORM} of the base is not stored"),
    "no weight": (without(f"{KEY}weight"), UNKNOWN, "NOT judged"),
    "torch.compile": (prefixed("_orig_mod."), FOUND, "a wrapper of training"),
    "PEFT": (prefixed("base_model.model."), FOUND, "a wrapper of training"),
    "several processes": (prefixed("module."), FOUND, "a wrapper of training"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "code", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_model_does_not(damage, code, words, folder):
    release(folder, damage(full(folder)))
    found, told = gate(folder)
    assert found == code, told
    assert words in told


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers 1 (2 in"),
        ({"hidden_act": "relu"}, "hidden_act relu (gelu in"),
        (None, "has no config.json"),
    ],
    ids=str,
)
def test_a_configuration_of_another_model_does_not(config, words, folder):
    release(folder, full(folder), **(config or {}))
    if config is None:
        (folder / "NEW/config.json").unlink()
    code, told = gate(folder)
    assert code == FOUND
    assert words in told


def test_a_damaged_merged_model_and_adapter_do_not(folder):
    release(folder, with_(f"{KEY}bias", spoilt)(merged(folder)))
    assert gate(folder)[0] == UNKNOWN
    shutil.rmtree(folder / "NEW")
    broken = {n: spoilt(W) if "layer.0" in n else W for n, W in factors(folder).items()}
    save_adapter(folder / "NEW", broken)
    assert gate(folder)[0] == UNKNOWN
    shutil.rmtree(folder / "NEW")
    save_adapter(folder / "NEW", factors(folder, strength=1.0))
    assert gate(folder)[0] == FOUND


def test_the_list_of_doubts_is_counted_right():
    words = {"fourteen": 14, "fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18}
    ((number, bullets),) = re.findall(
        r"^There are (\w+) doubts:\n\n(.*?)^In JUnit", PAGE, re.M | re.S
    )
    assert words[number] == len(re.findall(r"^- \*\*", bullets, re.M))
