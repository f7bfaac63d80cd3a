"""A configuration that builds another model than the tensors belong to is a doubt."""

import json

import pytest

import bulkedge
from bulkedge.report import Gate, render
from bulkedge.report.doubts import doubts
from commands import run
from helpers import save, save_adapter, some, weights

CLEAN, FOUND = 0, 1
LAYERS = {f"encoder.layer.{i}.q.weight": weights(12, 10, seed=i) for i in range(2)}
BERT = {
    "architectures": ["BertModel"], "model_type": "bert", "num_hidden_layers": 2,
    "hidden_size": 10, "num_attention_heads": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    "intermediate_size": 20, "vocab_size": 30,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 10, "n_head": 2, "n_inner": 40,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}  # fmt: skip
MIXED = {"model_type": "gemma3", "text_config": LLAMA | {"model_type": "gemma3_text"},
         "vision_config": {"num_hidden_layers": 3, "hidden_act": "gelu"}}  # fmt: skip


def folder(path, config, strength=1.0):
    save(path / "model.safetensors", {n: strength * W for n, W in LAYERS.items()})
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def audited(tmp_path, base, tuned):
    return bulkedge.audit(
        folder(tmp_path / "base", base), folder(tmp_path / "tuned", tuned, 1.01),
        recipe={"top_k": 2},
    )  # fmt: skip


# the base's configuration, what the fine-tune has otherwise, and what is said of it
OTHER = {
    "layers": (BERT, {"num_hidden_layers": 1}, "num_hidden_layers 1 (2 in that of the base)"),
    "width": (BERT, {"hidden_size": 20}, "hidden_size 20 (10 in"),
    "heads": (BERT, {"num_attention_heads": 5}, "num_attention_heads 5 (2 in"),
    "activation": (BERT, {"hidden_act": "relu"}, "hidden_act relu (gelu in"),
    "eps": (BERT, {"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05 (1e-12 in"),
    "inner": (BERT, {"intermediate_size": 40}, "intermediate_size 40 (20 in"),
    "kind": (BERT, {"model_type": "roberta"}, "model_type roberta (bert in"),
    "keys": (LLAMA, {"num_key_value_heads": 4}, "num_key_value_heads 4 (2 in"),
    "head": (LLAMA, {"head_dim": 8}, "head_dim 8 (16 in"),
    "rms": (LLAMA, {"rms_norm_eps": 1e-6}, "rms_norm_eps 1e-06 (1e-05 in"),
    "n_layer": (GPT2, {"n_layer": 3}, "n_layer 3 (2 in"),
    "n_inner": (GPT2, {"n_inner": 20}, "n_inner 20 (40 in"),
    "spelling": (GPT2, {"n_layer": None, "num_hidden_layers": 3}, "num_hidden_layers 3 (2 in"),
    "text": (MIXED, {"text_config": {"num_hidden_layers": 1}},
             "text_config.num_hidden_layers 1 (2 in"),
    "images": (MIXED, {"vision_config": {"hidden_act": "relu"}},
               "vision_config.hidden_act relu (gelu in"),
    "text alone": (MIXED, LLAMA | {"model_type": "gemma3_text", "head_dim": 8,
                                   "text_config": None, "vision_config": None}, "head_dim 8 (16"),
}  # fmt: skip


@pytest.mark.parametrize(("base", "changed", "words"), OTHER.values(), ids=OTHER)
def test_a_structure_that_differs_is_named_with_both_values(base, changed, words, tmp_path):
    record = audited(tmp_path, base, base | changed)
    told = doubts(record)["config"]
    assert told.startswith("config.json of the fine-tune says ")
    assert words in told
    assert told.count("in that of the base") == 1
    assert record.inputs.tuned.contradictions == [told]
    assert Gate(fail_on=None, fail_on_doubt=True).exit_code(record) == FOUND
    assert bulkedge.Record.from_json(record.to_json()) == record
    for kind in some(("junit", "sarif", "markdown", "html")):
        assert words in render(record, kind).replace("\\_", "_")


HARMLESS = {
    "nothing": (BERT, {}),
    "dtype and version": (BERT, {"dtype": "bfloat16", "torch_dtype": "float16",
                                 "transformers_version": "9", "_name_or_path": "x/y"}),
    "vocabulary": (BERT, {"vocab_size": 33, "pad_token_id": 3}),
    "labels": (BERT, {"num_labels": 3, "id2label": {"0": "a"},
                      "architectures": ["BertForSequenceClassification"]}),
    "rope": (LLAMA, {"rope_scaling": {"factor": 8.0}, "rope_theta": 5e5,
                     "max_position_embeddings": 99}),
    "quantised": (LLAMA, {"quantization_config": {"num_layers": 3, "bits": 4}}),
    "dropout": (BERT, {"hidden_dropout_prob": 0.3}),
    "an output layer of its own": (LLAMA, {"tie_word_embeddings": True}),
    "left out": (LLAMA, {"head_dim": None, "num_key_value_heads": None}),
    "two names of one activation": (LLAMA, {"hidden_act": "swish"}),
    "another spelling": (GPT2, {"n_layer": None, "num_hidden_layers": 2}),
    "text alone": (MIXED, LLAMA | {"model_type": "gemma3_text", "text_config": None,
                                   "vision_config": None}),
    "no base": (None, BERT),
}  # fmt: skip


@pytest.mark.parametrize(("base", "changed"), HARMLESS.values(), ids=HARMLESS)
def test_what_changes_no_structure_is_no_doubt(base, changed, tmp_path):
    record = audited(tmp_path, base, (base or {}) | changed)
    assert doubts(record) == {}
    assert record.inputs.tuned.contradictions == []


def test_a_folder_without_a_configuration_is_a_doubt(tmp_path):
    record = audited(tmp_path, BERT, None)
    told = doubts(record)["config"]
    assert told.startswith(f"{tmp_path / 'tuned'} has no config.json, the base has one")
    base, tuned = (tmp_path / side / "model.safetensors" for side in ("base", "tuned"))
    assert doubts(bulkedge.audit(base.parent, tuned, recipe={"top_k": 2})) == {}  # a lone file
    assert "config" in doubts(bulkedge.audit(base, tuned.parent, recipe={"top_k": 2}))


def test_an_adapter_has_none_of_its_own(tmp_path):
    stem = "base_model.model.encoder.layer.0.q"
    factors = {f"{stem}.lora_A.weight": 0.01 * weights(2, 10),
               f"{stem}.lora_B.weight": 0.01 * weights(12, 2)}  # fmt: skip
    adapter = save_adapter(tmp_path / "a", factors)
    assert doubts(bulkedge.audit(folder(tmp_path / "base", BERT), adapter)) == {}


def test_the_quiet_command_names_it(tmp_path):
    audited(tmp_path, BERT, BERT | {"num_hidden_layers": 1})
    command = ["audit", tmp_path / "base", tmp_path / "tuned", "-q", "--fail-on", "never"]
    ended = run(*command)
    assert ended.returncode == CLEAN
    assert "doubt: config.json of the fine-tune says num_hidden_layers 1" in ended.stdout
    ended = run(*command, "--fail-on-doubt")
    assert ended.returncode == FOUND
    assert "num_hidden_layers 1 (2 in that of the base)" in ended.stderr
