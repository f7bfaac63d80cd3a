"""Moments of MiniLM on texts from files."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from bulkedge import InputError, MissingExtraError, OutputError
from bulkedge._moments import collect_moments
from bulkedge.cli import cli
from bulkedge.cli import moments as command_of_moments
from bulkedge.moments import Moments, read_texts
from bulkedge.moments._texts import batches
from helpers import EXAMPLE, MINILM, some

TEXTS = ["to be or not to be", "a small furry animal", "run", "the act of measuring something"]


def test_texts_of_every_form(tmp_path):
    plain, lines, table = (tmp_path / f"x.{end}" for end in ("txt", "jsonl", "parquet"))
    plain.write_text("\n".join(["", *TEXTS, ""]))
    lines.write_text("\n".join(json.dumps({"text": text, "n": 1}) for text in TEXTS) + "\n\n")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"gloss": TEXTS}), table)
    assert read_texts(plain) == read_texts(lines) == read_texts(table, "gloss") == TEXTS


def test_endings_in_capitals_lists_and_byte_order_marks(tmp_path):
    mark = b"\xef\xbb\xbf"
    objects = [{"gloss": text} for text in TEXTS]
    files = {
        "a.TXT": "\n".join(TEXTS),
        "a.JSONL": "\n".join(map(json.dumps, objects)),
        "b.ndjson": "\n".join(map(json.dumps, objects)),
        "a.JSON": json.dumps(objects),
        "b.json": json.dumps(TEXTS),
        "c.json": "\n".join(map(json.dumps, objects)),
    }
    for name, content in files.items():
        for start in (b"", mark):
            (tmp_path / name).write_bytes(start + content.encode())
            assert read_texts(tmp_path / name, "gloss") == TEXTS


BAD = {
    "absent": (None, "cannot be read .No such file"),
    "empty": (b"\n \n", "no text in it"),
    "latin": ("é\n".encode("latin-1"), "expected text in UTF-8"),
    "broken.jsonl": (b'{"text": 1\n', "line 1: expected an object with a field 'text'"),
    "other.jsonl": (b'{"gloss": "x"}\n', "line 1: expected an object with a field 'text'"),
    "number.jsonl": (b'{"text": 5}\n', "expected text in 'text', got 5"),
    "item.json": (b'[{"a": "b"}]', "item 1: expected an object with a field 'text'"),
    "half.jsonl": (b'{"text": "\\ud800"}\n', "text 1 has half of a surrogate pair"),
    "no.parquet": (b"x", "column 'text' cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_without_texts_is_an_error_that_names_it(name, tmp_path):
    content, message = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_texts(tmp_path / name)
    assert name in str(caught.value)


def test_a_batch_has_texts_of_like_length():
    lengths = [3, 50, 4, 3, 200, 49]
    found = batches(lengths, tokens=100)
    assert sorted(i for batch in found for i in batch) == list(range(6))
    for batch in some(found):
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= 100


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers by an old name
def test_moments_of_a_fine_tune_are_those_that_peft_sees():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    found = collect_moments(MINILM, TEXTS, tuned=EXAMPLE / "lora-r8")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        MINILM, num_labels=25, local_files_only=True
    )
    model = peft.PeftModel.from_pretrained(model, EXAMPLE / "lora-r8").eval()
    tokens = transformers.AutoTokenizer.from_pretrained(MINILM, local_files_only=True)(
        TEXTS, padding=True, return_tensors="pt"
    )
    with Moments(model) as expected, torch.no_grad():
        model(**tokens)
    for name, layer in some(found.layers.items()):
        own = expected[f"bert.{name}"]
        assert layer.count == own.count
        torch.testing.assert_close(layer.moment, own.moment, rtol=1e-3, atol=1e-4)


def test_the_command(tmp_path):
    texts, out = tmp_path / "texts.txt", tmp_path / "base.moments"
    texts.write_text("\n".join(TEXTS))
    command = ["moments", str(MINILM), str(texts), "-o", str(out)]
    result = CliRunner().invoke(cli, [*command, "--max-tokens", "12"])
    assert result.exit_code == 0, result.output
    assert "4 texts, 12 tokens" in result.output
    found = Moments.load(out)
    assert found["encoder.layer.0.attention.self.query"].count == 12
    query, key = (found[f"encoder.layer.0.attention.self.{x}"] for x in ("query", "key"))
    assert query.moment is key.moment
    with pytest.raises(OutputError, match="exists; give another file, or --force to replace it"):
        CliRunner().invoke(cli, command, catch_exceptions=False)


def test_what_is_no_model_is_an_error(tmp_path):
    with pytest.raises(InputError, match="expected the folder of a model"):
        collect_moments(tmp_path / "none", TEXTS)
    with pytest.raises(InputError, match="cannot be loaded by transformers"):
        collect_moments(tmp_path, TEXTS)


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match="expected transformers to run a model, found none"):
        collect_moments(MINILM, TEXTS)


def test_the_output_never_replaces_an_input(tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    for output in (texts, MINILM / "model.safetensors"):
        command = ["moments", str(MINILM), str(texts), "-o", str(output), "--force"]
        with pytest.raises(OutputError, match=r"lies inside the input .*; write elsewhere"):
            CliRunner().invoke(cli, command, catch_exceptions=False)
    assert read_texts(texts) == TEXTS


def test_nulls_are_no_texts_and_numbers_are_none_either(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": null}\n{"text": "to be"}\n')
    assert read_texts(path) == ["to be"]
    path.write_text('{"text": 0}\n')
    with pytest.raises(InputError, match="expected text in 'text', got 0"):
        read_texts(path)


def test_norms_and_biases_of_a_fine_tune_are_put_on_as_well(tmp_path):
    stored = load_file(MINILM / "model.safetensors")
    name = "encoder.layer.0.attention.output.LayerNorm.weight"
    changed = stored | {name: 2 * stored[name]}
    # a full fine-tune changes at least one matrix, too
    name = "encoder.layer.5.output.dense.weight"
    folder = tmp_path / "tuned"
    folder.mkdir()
    save_file(changed | {name: 1.01 * stored[name]}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((MINILM / "config.json").read_bytes())
    base, tuned = (collect_moments(MINILM, TEXTS, tuned=t) for t in (None, folder))
    layer = "encoder.layer.0.intermediate.dense"
    change = (tuned[layer].moment - base[layer].moment).norm() / base[layer].moment.norm()
    assert change > 0.5
    assert torch.equal(tuned[layer].sample, base[layer].sample)


def test_every_option_is_on_the_page():
    page = (EXAMPLE.parents[1] / "docs/moments.md").read_text()
    for option in some(command_of_moments.params):
        if option.param_type_name == "option":
            assert all(f"`{name}`" in page for name in option.opts if name != "-q"), option.name
