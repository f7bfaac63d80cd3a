"""A vector that a full fine-tune does not store is started anew by what loads it: a doubt."""

import json

import pytest
import torch

import bulkedge
from bulkedge.report import Gate, render
from bulkedge.report.doubts import doubts
from commands import run
from helpers import save, save_adapter, some, weights

CLEAN, FOUND = 0, 1
LAYER = "encoder.layer.0."
BASE = {
    f"{LAYER}attention.self.key.weight": weights(12, 10),
    f"{LAYER}attention.self.key.bias": weights(12, seed=1),
    f"{LAYER}attention.in_proj_weight": weights(30, 10, seed=2),
    f"{LAYER}attention.in_proj_bias": weights(30, seed=3),
    f"{LAYER}output.LayerNorm.weight": torch.ones(10),
    f"{LAYER}output.LayerNorm.bias": torch.zeros(10),
    f"{LAYER}output.norm.weight": torch.ones(10),
    f"{LAYER}attention.A_log": weights(12, seed=4),
    "logit_scale": torch.tensor(2.6),
    "embeddings.weight": weights(20, 10, seed=5),
}
VECTORS = [name for name, W in BASE.items() if W.ndim < 2]
NOT_NEEDED = {
    "embeddings.position_ids": torch.arange(20),
    f"{LAYER}attention.rotary_emb.inv_freq": weights(5),
    f"{LAYER}attention.masked_bias": torch.tensor(-1e4),
    f"{LAYER}attention.k_scale": torch.tensor(0.5),
    "alphas_cumprod": weights(7),
    "sqrt_one_minus_alphas_cumprod": weights(7),
}


def audited(tmp_path, tuned, base=BASE, config=None, **recipe):
    folders = []
    for side, tensors in (("base", base), ("tuned", tuned)):
        folder = save(tmp_path / side / "model.safetensors", tensors).parent
        settings = {"architectures": ["BertModel"]} | (config or {} if side == "tuned" else {})
        (folder / "config.json").write_text(json.dumps(settings))
        folders.append(folder)
    return bulkedge.audit(*folders, recipe={"top_k": 2} | recipe)


def without(*names, base=BASE):
    return {name: 1.01 * W if W.ndim > 1 else W for name, W in base.items() if name not in names}


def missing(record):
    return [row.name for row in record.skipped if row.missing]


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("names", [[name] for name in VECTORS] + [VECTORS], ids=str)
def test_a_vector_that_is_not_stored_is_a_doubt(names, prefix, tmp_path):
    record = audited(tmp_path, {prefix + n: W for n, W in without(*names).items()})
    assert missing(record) == sorted(names)
    told = doubts(record)["missing"]
    assert told.startswith(f"{min(names)} of the base is not stored in the fine-tune")
    assert (f"and {len(names) - 1} others likewise" in told) is (len(names) > 1)
    assert set(doubts(record)) == {"missing"}
    assert Gate(fail_on=None, fail_on_doubt=True).exit_code(record) == FOUND
    assert bulkedge.Record.from_json(record.to_json()) == record
    for kind in some(("junit", "sarif", "markdown", "html")):
        assert told.partition(":")[0] in render(record, kind).replace("\\_", "_")


def test_the_quiet_command_names_it(tmp_path):
    audited(tmp_path, without(VECTORS[0]))
    command = ["audit", tmp_path / "base", tmp_path / "tuned", "-q", "--fail-on", "never"]
    ended = run(*command)
    assert ended.returncode == CLEAN
    assert f"doubt: {VECTORS[0]} of the base is not stored" in ended.stdout
    assert run(*command, "--fail-on-doubt").returncode == FOUND
    assert run(*command, "--fail-on-doubt", "--partial").returncode == CLEAN


def test_to_leave_vectors_out_accepts_no_missing_one(tmp_path):
    for glob in some(("*.bias", VECTORS[0])):
        record = audited(tmp_path, without(VECTORS[0]), exclude=[glob])
        assert missing(record) == [VECTORS[0]]


def test_what_a_program_computes_is_not_needed(tmp_path):
    assert doubts(audited(tmp_path, without(), BASE | NOT_NEEDED)) == {}


HEAD = {
    "cls.predictions.transform.dense.weight": weights(10, 10, seed=6),
    "cls.predictions.transform.dense.bias": weights(10, seed=7),
    "cls.predictions.transform.LayerNorm.weight": torch.ones(10),
    "cls.predictions.bias": weights(20, seed=8),
    "pooler.dense.weight": weights(10, 10, seed=9),
    "pooler.dense.bias": weights(10, seed=9),
}


@pytest.mark.parametrize(
    ("config", "recipe"),
    [
        ({"architectures": ["BertForTokenClassification"]}, {}),
        ({"architectures": ["BertForMaskedLM"]}, {"exclude": ["cls.*.weight", "pooler.*"]}),
        ({"architectures": ["BertForMaskedLM"]}, {"partial": True}),
    ],
    ids=["no such layer", "left out", "partial"],
)
def test_a_module_that_is_not_there_has_no_vectors(config, recipe, tmp_path):
    assert doubts(audited(tmp_path, without(), BASE | HEAD, config, **recipe)) == {}


def test_a_vector_of_a_module_that_is_there_is_missing(tmp_path):
    base = BASE | HEAD
    names = ["cls.predictions.transform.LayerNorm.weight", "cls.predictions.bias"]
    tuned = without(*names, base=base)
    record = audited(tmp_path, tuned, base, {"architectures": ["BertForMaskedLM"]})
    assert missing(record) == sorted(names)


def test_one_bias_under_two_names_is_stored_once(tmp_path):
    bias = {"cls.predictions.bias": weights(20), "cls.predictions.decoder.bias": weights(20)}
    base = BASE | HEAD | bias
    config = {"architectures": ["BertForMaskedLM"]}
    for name in some(bias):
        assert doubts(audited(tmp_path, without(name, base=base), base, config)) == {}
    assert missing(audited(tmp_path, without(*bias, base=base), base, config)) == list(bias)


PIECES = {f"layers.0.{x}_proj.{end}": weights(*shape, seed=i)
          for i, x in enumerate("qkv") for end, shape in (("weight", (6, 10)), ("bias", (6,)))
          }  # fmt: skip
FUSED = {
    f"layers.0.qkv_proj.{end}": torch.cat([PIECES[f"layers.0.{x}_proj.{end}"] for x in "qkv"])
    for end in ("weight", "bias")
}


@pytest.mark.parametrize(("base", "tuned"), [(PIECES, FUSED), (FUSED, PIECES)])
def test_a_bias_of_fused_layers_is_stored_with_others(base, tuned, tmp_path):
    record = audited(tmp_path, {n: 1.01 * W for n, W in tuned.items()}, base)
    assert record.summary.lost == 0
    assert doubts(record) == {}


@pytest.mark.parametrize("split", [None, [6, 6, 6]])
def test_a_bias_of_a_layer_in_blocks_is_needed(split, tmp_path):
    recipe = {"split": {"*qkv_proj.weight": split}} if split else {}
    tuned = {n: 1.01 * W for n, W in FUSED.items() if n.endswith("weight")}
    assert missing(audited(tmp_path, tuned, FUSED, **recipe)) == ["layers.0.qkv_proj.bias"]


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("old", ["base", "tuned"])
def test_the_first_names_of_norms_are_those_of_today(old, prefix, tmp_path):
    """The checkpoints of BERT have gamma and beta, which transformers reads and never writes."""
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def renamed(tensors):
        for new, first in names.items():
            tensors = {name.replace(new, first): W for name, W in tensors.items()}
        return tensors

    base, tuned = BASE, {prefix + name: W for name, W in without().items()}
    base, tuned = (renamed(base), tuned) if old == "base" else (base, renamed(tuned))
    assert doubts(audited(tmp_path, tuned, base)) == {}
    norm = next(name for name in tuned if ".LayerNorm." in name)
    record = audited(tmp_path, tuned | {norm: torch.zeros(10)}, base)
    assert [row.name for row in record.skipped if row.zeroed] == [norm]


def test_an_adapter_needs_none(tmp_path):
    base = save(tmp_path / "base.safetensors", BASE)
    stem = f"base_model.model.{LAYER}attention.self.key"
    factors = {f"{stem}.lora_A.weight": 0.01 * weights(2, 10),
               f"{stem}.lora_B.weight": 0.01 * weights(12, 2)}  # fmt: skip
    assert missing(bulkedge.audit(base, save_adapter(tmp_path / "a", factors))) == []
