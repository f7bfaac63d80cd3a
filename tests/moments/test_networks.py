"""Models of transformers on texts: causal, with experts, with adapters; stopped, and gone on."""

import json
import re
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from bulkedge import InputError, OutputError, RecipeError
from bulkedge._moments import collect_moments
from bulkedge.cli import cli
from bulkedge.moments import Moments, _partial, _texts
from bulkedge.moments._curvatures import Curvatures
from helpers import needs, some

transformers = pytest.importorskip("transformers")

WORDS = [f"w{i}" for i in range(40)]
TEXTS = [" ".join(WORDS[i : i + 3 + i % 7]) for i in range(0, 30, 2)]


def tokenizer_of(words):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A small causal model with random weights, and its tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=42, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer_of(WORDS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """The same with layers that store their weights transposed, and a tied output layer."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=42,
        n_embd=24,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder = tmp_path_factory.mktemp("gpt2")
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer_of(WORDS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(TEXTS))
    return path


@pytest.fixture
def small(monkeypatch):
    """Several batches of these texts, and a partial file after each."""
    monkeypatch.setattr(_texts, "BATCH", 12)
    monkeypatch.setattr(_partial, "EVERY", 0.0)
    monkeypatch.setattr(_partial, "SHARE", 0.0)


def command(*arguments):
    return CliRunner().invoke(cli, ["moments", *map(str, arguments)], catch_exceptions=False)


@pytest.mark.parametrize(("kind", "layers", "down", "width"), [
    ("llama", 1 + 2 * 7 + 1, "model.layers.1.mlp.down_proj", 40),
    ("gpt2", 2 + 2 * 4 + 1, "transformer.h.1.mlp.c_proj", 96),
])  # fmt: skip
def test_a_causal_model_from_the_command_line(kind, layers, down, width, texts, tmp_path, request):
    folder, out = request.getfixturevalue(kind), tmp_path / "base.moments"
    result = command(folder, texts, "-o", out, "-q")
    assert result.exit_code == 0
    count = sum(len(text.split()) for text in TEXTS)
    few = rf"had fewer inputs than they are wide, such as \S+: {count} for a width of {width}"
    assert bool(re.search(few, result.output)) is (count < width)
    assert len(result.output.splitlines()) == (count < width)
    assert [path.name for path in tmp_path.iterdir()] == ["base.moments"]
    found = Moments.load(out)
    assert len(found.layers) == layers
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokens = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)(
        TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False
    )
    with Moments(model.eval()) as expected, torch.no_grad():
        model(**tokens)
    positions = "transformer.wpe"  # which all texts of a batch share
    for name, layer in some(found.layers.items()):
        own = expected[name]
        if name != positions:
            assert layer.count == sum(len(text.split()) for text in TEXTS)
            torch.testing.assert_close(layer.moment, own.moment, rtol=1e-4, atol=1e-5)
            assert layer.output == pytest.approx(own.output, rel=1e-4)
    assert found[down].moment.shape == (width, width)


@pytest.mark.parametrize("whose", ["the model", "the fine-tune"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_weight_that_is_not_finite_is_named(name, whose, llama, texts, tmp_path):
    bad = shutil.copytree(llama, tmp_path / "bad")
    tensors = load_file(bad / "model.safetensors")
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    model, more = (bad, []) if whose == "the model" else (llama, ["--tuned", bad])
    told = f"{bad}: {name!r} holds 1 NaN and 0 Inf: save the model again, or download it again"
    with pytest.raises(InputError, match=f"^{re.escape(told)}$"):
        command(model, texts, "-o", tmp_path / "x.moments", *more)


def test_the_fine_tune_is_recognised_by_its_weights(llama, texts, tmp_path):
    tuned = shutil.copytree(llama, tmp_path / "tuned")
    name = "model.layers.1.mlp.down_proj"
    tensors = load_file(tuned / "model.safetensors")
    tensors[f"{name}.weight"] += 0.25
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    command(llama, texts, "-o", tmp_path / "task.moments", "--tuned", tuned)
    layer = Moments.load(tmp_path / "task.moments")[name]
    torch.testing.assert_close(layer.tuned_sample, layer.sample + 0.25)
    command(llama, texts, "-o", tmp_path / "base.moments")
    assert Moments.load(tmp_path / "base.moments")[name].tuned_sample is None


def test_layers_and_ranks_are_chosen_and_losses_are_told(llama, texts, tmp_path):
    out = tmp_path / "base.moments"
    result = command(
        llama, texts, "-o", out, "--include", "*.mlp.*", "--exclude", "*.1.*", "--rank", 8
    )
    assert "3 layers: written to" in result.output
    assert "3 sketches: the most is lost of model.layers.0.mlp" in result.output
    found = Moments.load(out)
    assert found["model.layers.0.mlp.down_proj"].moment.vectors.shape == (40, 8)
    up, gate = (found[f"model.layers.0.mlp.{x}_proj"].moment for x in ("up", "gate"))
    assert up is gate
    streamed = collect_moments(llama, TEXTS, include="*.down_proj", rank=1, exact_width=0)
    assert streamed["model.layers.0.mlp.down_proj"].moment.vectors.shape == (40, 1)


@pytest.mark.parametrize("how", ["interrupted", "killed", "in a backward pass"])
def test_a_run_that_was_stopped_goes_on_to_the_same_moments(
    how, llama, texts, tmp_path, small, monkeypatch
):
    whole, out = tmp_path / "whole.moments", tmp_path / "base.moments"
    partial = tmp_path / "base.moments.partial"
    curvatures = how == "in a backward pass"
    flags = ["--curvatures", "--exact-width", 24] if curvatures else []
    settings = {"curvatures": True, "exact_width": 24} if curvatures else {}
    command(llama, texts, "-o", whole, "-q", *flags)
    run, left = _texts.run_tokens, tmp_path / "left"

    def stopped(*arguments):
        for batch, done in enumerate(run(*arguments)):
            yield done
            if batch == 2:  # the file is of three batches now
                shutil.copy(partial, left)
                if curvatures:
                    monkeypatch.setattr(Curvatures, "_add", stopped_at("0.self_attn.q_proj"))
                else:
                    raise KeyboardInterrupt

    monkeypatch.setattr("bulkedge._moments.run_tokens", stopped)
    if how == "interrupted":
        monkeypatch.setattr(_partial, "EVERY", 1e9)  # it is written at the end alone
        monkeypatch.setattr(shutil, "copy", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        collect_moments(llama, TEXTS, partial=partial, **settings)
    monkeypatch.undo()
    if how == "killed":  # nothing was written after the third batch
        left.replace(partial)
    assert json.loads(metadata_of(partial)["batches"]) == 3
    calls = []

    def counted(*arguments):
        for done in run(*arguments):
            calls.append(done)
            yield done

    monkeypatch.setattr(_texts, "BATCH", 12)
    monkeypatch.setattr("bulkedge._moments.run_tokens", counted)
    assert f"going on from {partial}" in command(llama, texts, "-o", out, *flags).output
    assert metadata_of(out) == metadata_of(whole)
    expected = load_file(whole)
    for name, tensor in some(load_file(out).items()):
        assert torch.equal(tensor, expected[name])
    assert not partial.exists()
    lengths = [len(text.split()) for text in TEXTS]
    assert len(calls) == len(_texts.batches(lengths, 12)) - 3


def stopped_at(layer):
    """A gradient is added as ever until one of a layer comes."""
    add = Curvatures._add

    def stopped(self, name, *more):
        if layer in name:
            raise KeyboardInterrupt
        add(self, name, *more)

    return stopped


def metadata_of(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_curvatures_from_the_command_line(llama, texts, tmp_path):
    out = tmp_path / "base.moments"
    result = command(llama, texts, "-o", out, "--curvatures")
    assert "15 layers with curvatures of their outputs" in result.output  # the vocabulary is small
    known = Moments.load(out).layers
    assert known["model.embed_tokens"].curvature is None
    for name, layer in some({n: x for n, x in known.items() if "embed" not in n}.items()):
        assert layer.gradients == layer.count
        assert layer.curvature.shape == (len(layer.curvature),) * 2, name
        assert float(layer.curvature.diagonal().min()) > 0
    # of logits z the gradient of the loss is p − (one drawn), whose second moment is diag(p) − p pᵀ
    G = known["lm_head"].curvature
    torch.testing.assert_close(G.sum(dim=0), torch.zeros(42, dtype=G.dtype), rtol=0, atol=1e-6)
    assert float(G.trace()) == pytest.approx(1 - 1 / 42, rel=0.05)  # weights are random


def test_a_partial_file_of_another_run_is_refused(llama, tmp_path, small):
    partial = tmp_path / "x.partial"
    collect_moments(llama, TEXTS[:4], partial=partial)
    for change in ({"texts": TEXTS[:5]}, {"rank": 3}, {"curvatures": True}):
        settings = {"texts": TEXTS[:4]} | change
        with pytest.raises(InputError, match=r"x\.partial: was collected on other texts, with"):
            collect_moments(llama, partial=partial, **settings)
    metadata = metadata_of(partial)
    save_file({"sum.0": torch.ones(2)}, partial, metadata)
    with pytest.raises(ValueError, match=r"x\.partial: damaged \('sum.1'\); remove it to"):
        collect_moments(llama, TEXTS[:4], partial=partial)


def test_a_partial_file_that_cannot_be_written_is_an_error(llama, tmp_path, small):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"x\.partial: cannot be written"):
        collect_moments(llama, TEXTS, partial=tmp_path / "file" / "x.partial")


BAD = {
    "no texts": ({"texts": []}, "expected texts, got none that is not empty"),
    "blank": ({"texts": [" "]}, "expected texts, got none that is not empty"),
    "no tokens": ({"max_tokens": 0}, "expected max_tokens ≥ 1, got 0"),
    "number": ({"texts": ["a", 5]}, "texts: expected text, got 5"),
    "surrogate": ({"texts": ["a", "\ud800"]}, "texts: text 2 has half of a surrogate pair"),
    "rank": ({"rank": 0}, "expected rank ≥ 1, got 0"),
    "device": ({"device": "gpu"}, "device: use cpu, cuda or cuda:0, got 'gpu'"),
    "no such device": ({"device": "cuda:77"}, "device 'cuda:77': torch .* sees"),
    "layer": ({"include": "q"}, "'q' matches no layer with a weight"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_settings_are_named(kind, llama):
    settings, message = BAD[kind]
    with pytest.raises((InputError, RecipeError), match=message):
        collect_moments(llama, **{"texts": TEXTS} | settings)


def changed(llama, folder, **files):
    """A copy of the model with some files written anew, or without them."""
    shutil.copytree(llama, folder)
    for name, content in files.items():
        path = next(path for path in folder.iterdir() if path.name.startswith(name))
        path.unlink() if content is None else path.write_bytes(content)
    return folder


def test_weights_that_are_not_stored_are_named(llama, tmp_path):
    folder = changed(llama, tmp_path / "m")
    stored = load_file(folder / "model.safetensors")
    stored.pop("model.layers.1.mlp.up_proj.weight")
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    match = "1 tensor of LlamaForCausalLM is not stored and would be random: 'model.layers.1.mlp"
    with pytest.raises(InputError, match=match):
        collect_moments(folder, TEXTS)


DAMAGED = {
    "weights": {"model": b"damaged"},
    "config": {"config": b"{}"},
    "tokenizer": {"tokenizer.json": b"[]"},
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_of_a_model_are_one_error(kind, llama, tmp_path):
    folder = changed(llama, tmp_path / "m", **DAMAGED[kind])
    with pytest.raises(InputError, match=r"m: cannot be loaded by transformers \("):
        collect_moments(folder, TEXTS)


@needs("transformers", "5.0", "it refuses such files")
def test_weights_without_metadata_are_read(llama, tmp_path):
    folder = changed(llama, tmp_path / "m")
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {})
    assert len(collect_moments(folder, TEXTS).layers) == 16


def test_a_tokenizer_of_another_model_is_named(llama, tmp_path):
    folder = changed(llama, tmp_path / "m")
    tokenizer_of([f"w{i}" for i in range(99)]).save_pretrained(folder)
    with pytest.raises(InputError, match="the tokenizer gives token 100, the model has 42"):
        collect_moments(folder, ["w98"])
    tokenizer = tokenizer_of(WORDS)
    model = transformers.AutoModel.from_pretrained(llama, local_files_only=True)

    def fails(*_, **__):
        raise TypeError("no text")

    with pytest.raises(InputError, match=r"the tokenizer fails at 'w1' \(TypeError: no text\)"):
        _texts.tokens_of(model, fails, ["w1"], None)
    with pytest.raises(InputError, match="the tokenizer gives no tokens for any of the texts"):
        _texts.tokens_of(model, lambda *_, **__: {"input_ids": []}, ["w1"], None)
    assert _texts.tokens_of(model, tokenizer, ["w1", "w2 w3"], 2) == [[3], [4]]


def test_a_model_that_takes_more_than_tokens_is_told(tmp_path):
    config = transformers.T5Config(
        vocab_size=42, d_model=16, d_kv=4, d_ff=20, num_layers=1, num_heads=4
    )
    transformers.T5Model(config).save_pretrained(tmp_path)
    tokenizer_of(WORDS).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"the model cannot be run on texts \(ValueError: "):
        collect_moments(tmp_path, TEXTS)


def test_experts_see_the_tokens_that_are_routed_to_them():
    config = transformers.SwitchTransformersConfig(
        vocab_size=42, d_model=16, d_kv=4, d_ff=20, num_layers=2, num_heads=4, num_experts=3,
        num_sparse_encoder_layers=1, num_decoder_layers=1, num_sparse_decoder_layers=1,
        expert_capacity=64, router_jitter_noise=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = transformers.SwitchTransformersEncoderModel(config).eval()
    sparse = next(m for m in encoder.modules() if type(m).__name__ == "SwitchTransformersSparseMLP")
    inputs = []
    hook = sparse.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with Moments(encoder) as moments, torch.no_grad():
        encoder(input_ids=torch.arange(40)[None])
    hook.remove()
    (x,) = inputs
    chosen = (x @ sparse.router.classifier.weight.mT).argmax(dim=1)
    layers = {n: layer for n, layer in moments.layers.items() if n.endswith(".wi")}
    routed = {n: layer for n, layer in layers.items() if "expert_" in n}
    assert len(routed) == len(chosen.unique()) > 1
    for name, layer in some(routed.items()):
        own = x[chosen == int(name.rpartition("expert_")[2][0])].double()
        assert layer.count == len(own)
        torch.testing.assert_close(layer.moment, own.mT @ own / len(own), rtol=1e-5, atol=1e-6)


@needs("transformers", "5.0", "Mixtral has a module for each expert")
def test_stacked_experts_are_said_not_to_be_measured(texts, tmp_path):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=42, hidden_size=16, intermediate_size=20, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "m")
    tokenizer_of(WORDS).save_pretrained(tmp_path / "m")
    result = command(tmp_path / "m", texts, "-o", tmp_path / "x.moments")
    assert "3 weights of no layer with inputs: model.layers.0.mlp.gate.weight" in result.output
    assert ", model.layers.0.mlp.experts.down_proj\n" in result.output


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers by an old name
def test_a_tuned_causal_model_is_the_one_that_peft_runs(llama, tmp_path):
    """Two adapters on one model, of which the active one is run; and from its folder."""
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, local_files_only=True)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    model.add_adapter("other", config)
    model.set_adapter("other")
    model.eval().save_pretrained(tmp_path)
    found = collect_moments(llama, TEXTS, tuned=tmp_path / "other")
    tokens = tokenizer_of(WORDS)(
        TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False
    )
    with Moments(model) as expected, torch.no_grad():
        model(**tokens)
    assert found.layers.keys() == expected.layers.keys()
    for name, layer in some(found.layers.items()):
        assert layer.count == expected[name].count
        torch.testing.assert_close(layer.moment, expected[name].moment, rtol=1e-4, atol=1e-5)
        assert torch.equal(layer.sample, expected[name].sample)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the name that every version knows
def test_moments_of_what_a_trainer_runs(llama, tmp_path):
    """Gradient checkpointing on: each input of the training counts once."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, local_files_only=True)
    rows = [{"input_ids": list(range(2, 12)), "labels": list(range(2, 12))}] * 6
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=3, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no",
        logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    model.gradient_checkpointing_enable()
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    with Moments(model) as moments:
        trainer.train()
    assert {layer.count for layer in moments.layers.values()} == {2 * 3 * 10}


@pytest.mark.filterwarnings("ignore")  # of PEFT, on layers that store their weights transposed
def test_biases_of_factors_are_part_of_a_fine_tune(gpt2, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=2, target_modules=["c_attn", "c_fc"], init_lora_weights=False, lora_bias=True,
        fan_in_fan_out=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2, local_files_only=True)
    model = peft.get_peft_model(model, settings).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.default.bias"):
            parameter.data = torch.linspace(-1, 1, len(parameter))
    model.save_pretrained(tmp_path)
    found = collect_moments(gpt2, TEXTS[:3], tuned=tmp_path)
    with Moments(model) as expected, torch.no_grad():
        for text in TEXTS[:3]:
            model(**tokenizer_of(WORDS)(text, return_tensors="pt", return_token_type_ids=False))
    for name, layer in some(found.layers.items()):
        if name != "transformer.wpe":
            own = expected[name].moment
            torch.testing.assert_close(layer.moment, own, rtol=1e-4, atol=1e-5)


def lacking(gpt2, folder, kind):
    """A fine-tune of which a part has no place in the model, and how the error names it."""
    stored = {n: 1.01 * W for n, W in load_file(gpt2 / "model.safetensors").items()}
    if kind == "block":
        renamed = {n.replace(".h.0.", ".block.0."): W for n, W in stored.items()}
        return save_tensors(folder, renamed), "block.0.attn.c_attn.weight"
    if kind == "norm":
        renamed = {n.replace("ln_1.weight", "ln_1.gamma"): W for n, W in stored.items()}
        return save_tensors(folder, renamed), r"h.0.ln_1.gamma' \(a vector without a place\)"
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2, local_files_only=True)
    settings = peft.LoraConfig(
        r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True,
        trainable_token_indices={"wte": [0, 3]},
    )  # fmt: skip
    peft.get_peft_model(model, settings).save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["trainable_token_indices"] = None  # which tokens they are is not known any more
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder, "trainable tokens: 2 rows, but the configuration does not name as many"


def save_tensors(folder, tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["block", "norm", "tokens"])
@pytest.mark.filterwarnings("ignore")
def test_a_part_of_a_fine_tune_without_a_place_is_an_error_that_names_it(kind, gpt2, tmp_path):
    folder, named = lacking(gpt2, tmp_path / "tuned", kind)
    with pytest.raises(InputError, match=f"of the fine-tune .*{named}.* cannot be put on"):
        collect_moments(gpt2, TEXTS[:3], tuned=folder)


@pytest.mark.filterwarnings("ignore")
def test_updates_that_are_made_of_the_base_are_put_on_with_their_biases(gpt2, tmp_path):
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2, local_files_only=True)
    settings = peft.IA3Config(
        target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"], fan_in_fan_out=True
    )
    tuned = peft.get_peft_model(model, settings)
    for parameter in (p for p in tuned.parameters() if p.requires_grad):
        parameter.data += torch.rand_like(parameter)
    tuned.save_pretrained(tmp_path / "tuned")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer_of(WORDS).save_pretrained(tmp_path / "merged")
    ours, whole, base = (
        collect_moments(gpt2, TEXTS[:3], tuned=tmp_path / "tuned"),
        collect_moments(tmp_path / "merged", TEXTS[:3]),
        collect_moments(gpt2, TEXTS[:3]),
    )
    for name in some(ours.layers):
        torch.testing.assert_close(ours[name].moment, whole[name].moment, rtol=1e-4, atol=1e-5)
    last = [name for name in ours.layers if ".h.1." in name][-1]  # behind what was changed
    assert not torch.allclose(ours[last].moment, base[last].moment, rtol=1e-2)


def test_a_partial_file_of_another_configuration_is_refused(llama, tmp_path, small):
    partial = tmp_path / "x.partial"
    collect_moments(llama, TEXTS[:4], partial=partial)
    same = shutil.copytree(llama, tmp_path / "same")
    collect_moments(same, TEXTS[:4], partial=partial)  # wherever it lies
    config = json.loads((same / "config.json").read_text()) | {"rms_norm_eps": 0.1}
    (same / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="was collected on other texts, with another model or"):
        collect_moments(same, TEXTS[:4], partial=partial)


def test_an_adapter_in_the_place_of_the_model_is_told(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="is an adapter; give the base as MODEL and this as --tun"):
        collect_moments(tmp_path, TEXTS)
