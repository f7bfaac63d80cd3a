"""A class's prefix for all of a fine-tune is intended; of some alone, or of training, a doubt."""

import re

import pytest
from click.testing import CliRunner

import bulkedge
from bulkedge.cli import cli
from bulkedge.report.doubts import doubts
from helpers import save, weights

FOUND = 1
LAYER = "model.layers.3."
TEXT = [f"model.layers.{i}.{m}" for i in range(5) for m in ("attn.q", "mlp.up", "norm")]
BODY = ["model.embed_tokens", "model.norm", "lm_head", *TEXT]
IMAGES = [f"visual.blocks.{i}.fc" for i in range(2)] + ["visual.proj"]
BERT = [f"encoder.layer.{i}.{m}" for i in range(3) for m in ("q", "k")] + ["embeddings.word"]


def tensors(modules):
    """A weight for each module, a vector for each norm."""
    return {
        f"{name}.weight": weights(*((8,) if name.endswith("norm") else (10, 8)), seed=i)
        for i, name in enumerate(modules)
    }


def doubt(tmp_path, modules, rename):
    """What the audit of a fine-tune with other names says of them; None without a doubt."""
    stored = tensors(modules)
    base = save(tmp_path / "base.safetensors", stored)
    tuned = {rename(name): 1.01 * W for name, W in stored.items()}
    record = bulkedge.audit(base, save(tmp_path / "tuned.safetensors", tuned), recipe={"top_k": 2})
    assert record.summary.lost == 0
    told = doubts(record).get("modules")
    assert record.inputs.tuned.disagreements == ([] if told is None else [told])
    return told


def starting(old, new):
    return lambda name: new + name.removeprefix(old) if name.startswith(old) else name


# the modules, how those of a fine-tune are called, how many tensors stand apart, one of them
MIXED = {
    "a layer": (BODY, starting(LAYER, f"base_model.{LAYER}"), 3,
                "base_model.model.layers.3.attn.q.weight"),
    "most layers": (BODY, lambda name: name if LAYER in name else f"module.{name}", 3,
                    "model.layers.3.attn.q.weight"),
    "a layer's mlp": (BODY, starting(f"{LAYER}mlp", f"base_model.{LAYER}mlp"), 1,
                      "base_model.model.layers.3.mlp.up.weight"),
    "inside a layer": (BODY, starting(LAYER, f"{LAYER}module."), 3,
                       "model.layers.3.module.attn.q.weight"),
    "a wrapper of training": (BODY, starting(LAYER, f"{LAYER}_checkpoint_wrapped_module."), 3,
                              "model.layers.3._checkpoint_wrapped_module.attn.q.weight"),
    "a vector": (BODY, starting("model.norm", "base_model.model.norm"), 1,
                 "base_model.model.norm.weight"),
    "the embedding": (BODY, starting("model.embed", "module.model.embed"), 1,
                      "module.model.embed_tokens.weight"),
    "a prefix lost": (BERT, starting("encoder", "bert.encoder"), 1, "embeddings.word.weight"),
    "one of two lists": (IMAGES + BODY, starting("visual.blocks.1", "model.visual.blocks.1"), 1,
                         "model.visual.blocks.1.fc.weight"),
}  # fmt: skip


@pytest.mark.parametrize(("modules", "rename", "many", "name"), MIXED.values(), ids=MIXED)
def test_tensors_with_another_prefix_are_a_doubt(modules, rename, many, name, tmp_path):
    told = doubt(tmp_path, modules, rename)
    assert told.startswith(f"{many} tensor{'s' * (many > 1)} of the fine-tune")
    assert name in told
    files = [str(tmp_path / f"{side}.safetensors") for side in ("base", "tuned")]
    ended = CliRunner().invoke(cli, ["audit", *files, "-q", "--fail-on", "never"])
    assert (ended.exit_code, f"doubt: {told}" in ended.stdout) == (0, True)
    gates = ["--fail-on-doubt", "--fail-on", "never"]
    ended = CliRunner().invoke(cli, ["audit", *files, "-q", *gates])
    first = told.partition(" judged,")[0].rpartition(". ")[0]
    line = f"exit code 1, --fail-on-doubt: 1 doubt: {first}."
    assert (ended.exit_code, ended.stderr.splitlines()[-1]) == (FOUND, line)


def of_images_and_text(name):
    """As transformers 4.52 has renamed models of images and text."""
    name = starting("model.", "model.language_model.")(name)
    return starting("visual.", "model.visual.")(name)


WHOLE = {
    "none": (BODY, lambda name: name),
    "another wrapping": (BODY, starting("model.", "model.language_model.")),
    "a head outside of it": (BODY, starting("model.", "language_model.model.")),
    "one less": (BODY, starting("model.", "")),
    "one more": (BERT, lambda name: f"bert.{name}"),
    "images and text": (IMAGES + BODY, of_images_and_text),
    "a list of numbers": (["0", "2"], lambda name: f"model.{name}"),
    "a classifier beside": ([*BERT, "classifier"],
                            lambda n: n if n.startswith("class") else f"bert.{n}"),
}  # fmt: skip


# the modules, how those of a fine-tune are called, how many have a wrapper, and which it is
WRAPPED = {
    "PEFT": (BODY, lambda name: f"base_model.model.{name}", 18, "base_model"),
    "torch.compile": (BODY, lambda name: f"_orig_mod.{name}", 18, "_orig_mod"),
    "several processes": (BODY, lambda name: f"module.{name}", 18, "module"),
    "both": (BODY, lambda name: f"module._orig_mod.{name}", 18, "_orig_mod, module"),
    "inside each layer": (BODY, lambda name: re.sub(r"(s\.\d\.)", r"\1_fsdp_wrapped_module.", name),
                          15, "_fsdp_wrapped_module"),
    "another class, too": (BERT, lambda name: f"module.bert.{name}", 7, "module"),
    "a list of numbers": (["0", "2"], lambda name: f"module.{name}", 2, "module"),
    "a head outside of it": (BODY, starting("model.", "module.model."), 17, "module"),
}  # fmt: skip


@pytest.mark.parametrize(("modules", "rename", "many", "wrapper"), WRAPPED.values(), ids=WRAPPED)
def test_a_wrapper_of_training_is_a_doubt(modules, rename, many, wrapper, tmp_path):
    told = doubt(tmp_path, modules, rename)
    assert told.startswith(f"{many} of {len(modules)} tensors of the fine-tune have a wrapper")
    assert f"({wrapper})" in told
    files = [str(tmp_path / f"{side}.safetensors") for side in ("base", "tuned")]
    command = ["audit", *files, "-q", "--fail-on", "never"]
    ended = CliRunner().invoke(cli, command)
    assert (ended.exit_code, f"doubt: {told}" in ended.stdout) == (0, True)
    ended = CliRunner().invoke(cli, [*command, "--fail-on-doubt", "--exclude", "*0*"])
    assert (ended.exit_code, "have a wrapper of training" in ended.stderr) == (FOUND, True)


def test_a_wrapper_that_the_base_has_too_is_none(tmp_path):
    """Neither one of a file that was saved so, nor a module of such a name."""
    for wrapped in ("_orig_mod.", "base_model.model."):
        stored = {wrapped + name: W for name, W in tensors(BODY).items()}
        base = save(tmp_path / "base.safetensors", stored)
        tuned = save(tmp_path / "tuned.safetensors", {n: 1.01 * W for n, W in stored.items()})
        assert doubts(bulkedge.audit(base, tuned, recipe={"top_k": 2})) == {}
        plain = {name.removeprefix(wrapped): 1.01 * W for name, W in stored.items()}
        tuned = save(tmp_path / "plain.safetensors", plain)
        assert doubts(bulkedge.audit(base, tuned, recipe={"top_k": 2})) == {}


@pytest.mark.parametrize(("modules", "rename"), WHOLE.values(), ids=WHOLE)
def test_one_prefix_for_all_is_no_doubt(modules, rename, tmp_path):
    assert doubt(tmp_path, modules, rename) is None
