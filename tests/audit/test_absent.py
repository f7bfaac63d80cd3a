"""What is absent, or has another name, is not taken for unchanged.

The question is always what the program that loads the fine-tune has in that place.
"""

import json
import warnings

import pytest
import torch

import bulkedge
from bulkedge import CheckpointError, Recipe
from bulkedge.checkpoint.model import lacks, ties
from bulkedge.comparison import make_plan
from bulkedge.comparison.leftover import (
    BASE_LACKS_IT,
    EITHER,
    IN_A_BLOCK,
    MAY_BE_SHARED,
    NO_COUNTERPART,
    NOT_STORED,
    NOTHING_BEFORE,
    OF_NO_USE,
    RENAMED,
    STARTED_ANEW,
)
from bulkedge.comparison.pair import load
from bulkedge.report import Gate
from helpers import oracle_scores, save, save_adapter, some, weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

CPU = torch.device("cpu")
CLEAN, FINDINGS, FAILURE = 0, 1, 2
SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "pad_token_id": 0,
}  # fmt: skip
TEXT = SMALL | {"num_key_value_heads": 1, "max_position_embeddings": 32}


def spiked(W, seed=0):
    """A matrix with a strong direction that it did not have."""
    u, v = weights(len(W), seed=seed), weights(W.shape[1], seed=seed + 1)
    return (W + 9 * W.norm() * torch.outer(u / u.norm(), v / v.norm())).contiguous()


def model_folder(folder, tensors, config=None):
    save(folder / "model.safetensors", tensors)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def audited(base, tuned, **recipe):
    return bulkedge.audit(base, tuned, recipe={"top_k": 3} | recipe)


def code(record):
    return Gate().exit_code(record)


def lost(record):
    return {(row.side, row.name): row.reason for row in record.skipped if row.lost}


def counts(record):
    return record.summary.tensors.model_dump()


# ---- wrappers inside names

WRAPPERS = [
    "_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module",
    "_forward_module", "module",
]  # fmt: skip
LAYERS = {f"model.layers.{i}.{n}.weight": weights(50, 50, seed=i) for i in range(2) for n in "qk"}


def wrapped(name, wrapper):
    return name.replace("model.layers", f"model.{wrapper}.layers").replace(
        ".weight", f".{wrapper}.weight"
    )


@pytest.mark.parametrize("form", ["full", "shards", "adapter"])
@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_anywhere_in_a_name(wrapper, side, form, tmp_path):
    tuned = {name: spiked(W, seed=5) for name, W in LAYERS.items()}
    named = {n: n for n in LAYERS} | {wrapped(n, wrapper): n for n in LAYERS}
    change = {"base": lambda n: n, "tuned": lambda n: n, side: lambda n: wrapped(n, wrapper)}
    base = model_folder(tmp_path / "base", {change["base"](n): W for n, W in LAYERS.items()})
    if form == "adapter":
        keys = {}
        for name in LAYERS:
            module = f"base_model.model.{change['tuned'](name).removesuffix('.weight')}"
            keys[f"{module}.lora_A.weight"] = A = weights(2, 50)
            keys[f"{module}.lora_B.weight"] = B = weights(50, 2, seed=3)
            tuned[name] = LAYERS[name] + 2 * B @ A
        other = save_adapter(tmp_path / "tuned", keys)
    else:
        full = {change["tuned"](n): W for n, W in tuned.items()}
        other = model_folder(tmp_path / "tuned", full)
        if form == "shards":
            (other / "model.safetensors").rename(other / "m-1.safetensors")
            index = {"weight_map": dict.fromkeys(full, "m-1.safetensors")}
            (other / "model.safetensors.index.json").write_text(json.dumps(index))
    record = audited(base, other)
    assert sorted(named[m.name] for m in record.matrices) == sorted(LAYERS)
    assert (code(record), lost(record)) == (FINDINGS, {})
    for matrix in some(record.matrices):
        name = named[matrix.name]
        expected = oracle_scores(LAYERS[name], tuned[name], 3)
        scores = torch.tensor([d.score for d in matrix.directions], dtype=torch.float64)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_names_that_differ_in_wrappers_alone(tmp_path):
    both = {"a.q.weight": weights(4, 4), "a._orig_mod.q.weight": weights(4, 4)}
    path = save(tmp_path / "x.safetensors", both)
    message = r"'a\._orig_mod\.q\.weight' are the same but for wrappers.*remove one|remove one"
    with pytest.raises(CheckpointError, match=message):
        make_plan(path, path, Recipe())


def test_globs_know_names_with_and_without_wrappers(tmp_path):
    base = save(tmp_path / "b.safetensors", LAYERS)
    full = {wrapped(name, "_orig_mod"): W for name, W in LAYERS.items()}
    tuned = save(tmp_path / "t.safetensors", full)
    for glob in ("model.layers.*.q", "model._orig_mod.layers.*.q._orig_mod.weight"):
        record = audited(base, tuned, exclude=[glob])
        assert [m.name[-8:] for m in record.matrices] == ["k.weight"] * 2
        assert counts(record)["excluded"] == 4


# ---- fused and split projections


def phi3():
    torch.manual_seed(0)
    config = transformers.Phi3Config(**TEXT, tie_word_embeddings=False, rms_norm_eps=1e-5)
    return transformers.Phi3ForCausalLM(config).eval()


def split_rows(tensors, kv=8):
    """Phi-3's weights in Llama's layout: rows of q, k, v, and of gate and up."""
    out = {}
    for name, W in tensors.items():
        if name.endswith("qkv_proj.weight"):
            sizes, names = (W.shape[0] - 2 * kv, kv, kv), ("q_proj", "k_proj", "v_proj")
            old = "qkv_proj"
        elif name.endswith("gate_up_proj.weight"):
            sizes, names, old = (len(W) // 2,) * 2, ("gate_proj", "up_proj"), "gate_up_proj"
        else:
            out[name] = W
            continue
        for new, rows in zip(names, W.split(sizes), strict=True):
            out[name.replace(old, new)] = rows.contiguous()
    return out


def test_the_rows_are_those_that_llama_would_compute_with():
    """The layout by the models themselves: the same weights, the same outputs."""
    model = phi3()
    config = transformers.LlamaConfig(**TEXT, tie_word_embeddings=False, rms_norm_eps=1e-5)
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.load_state_dict(split_rows(model.state_dict()))
    ids = torch.arange(1, 12)[None]
    torch.testing.assert_close(llama(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", ["base", "tuned"])
def test_fused_and_split_are_paired_by_rows(fused, tmp_path):
    W0 = {name: W.clone() for name, W in phi3().state_dict().items()}
    W = {
        name: spiked(x, seed=i) if x.ndim == 2 and "layers" in name else x
        for i, (name, x) in enumerate(W0.items())
    }
    before, after = (W0, split_rows(W)) if fused == "base" else (split_rows(W0), W)
    record = audited(
        model_folder(tmp_path / "base", before), model_folder(tmp_path / "tuned", after)
    )
    pieces, tuned = split_rows(W0), split_rows(W)
    assert len(record.matrices) == len([n for n, x in pieces.items() if x.ndim == 2])
    plan = make_plan(tmp_path / "base", tmp_path / "tuned", Recipe())
    found = []
    for comparison in some(plan.comparisons):
        pair = load(comparison, CPU)
        (name,) = [n for n, x in pieces.items() if torch.equal(x, pair.base)]
        found.append(name)
        assert torch.equal(pair.dense_part, tuned[name])
    assert sorted(found) == sorted(n for n, x in pieces.items() if x.ndim == 2)
    expected = sum(
        int((oracle_scores(pieces[n], tuned[n], 3) < 0.5).sum()) for n in found if "layers" in n
    )
    assert record.summary.new_directions == expected > 0
    assert (code(record), lost(record)) == (FINDINGS, {})
    assert counts(record)["equal"] == 4  # embeddings and heads of both sides


@pytest.mark.parametrize("fused", ["base", "adapter"])
def test_an_adapter_of_the_other_layout(fused, tmp_path):
    W0 = {name: W.clone() for name, W in phi3().state_dict().items()}
    keys, updates = {}, {}
    for i, (name, W) in enumerate(split_rows(W0).items() if fused == "base" else W0.items()):
        if "proj" in name:
            A, B = weights(2, W.shape[1], seed=i), weights(len(W), 2, seed=i + 99)
            module = f"base_model.model.{name.removesuffix('.weight')}"
            keys |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
            updates[name] = 2 * B.double() @ A.double()
    merged = {n: W0n.double() + split_rows(updates, kv=8).get(n, torch.zeros(()))
              for n, W0n in split_rows(W0).items()}  # fmt: skip
    base = model_folder(tmp_path / "base", W0 if fused == "base" else split_rows(W0))
    plan = make_plan(base, save_adapter(tmp_path / "a", keys), Recipe())
    assert plan.skipped == ()
    assert len(plan.comparisons) == 2 * 7
    for comparison in some(plan.comparisons):
        pair = load(comparison, CPU)
        (name,) = [n for n, x in split_rows(W0).items() if torch.equal(x, pair.base)]
        torch.testing.assert_close(pair.tuned_map(torch.float64).to_dense(), merged[name])


@pytest.mark.parametrize("missing", ["q_proj", "k_proj", "up_proj"])
def test_a_piece_that_is_not_there_is_lost(missing, tmp_path):
    W0 = {name: W.clone() for name, W in phi3().state_dict().items()}
    after = {n: W for n, W in split_rows(W0).items() if f"0.self_attn.{missing}" not in n}
    after = {n: W for n, W in after.items() if f"0.mlp.{missing}" not in n}
    record = audited(model_folder(tmp_path / "b", W0), model_folder(tmp_path / "t", after))
    assert code(record) == FAILURE
    (reason,) = lost(record).values()
    assert reason.startswith("only ")
    assert reason.endswith("numbers have a counterpart")


@pytest.mark.parametrize("change", ["fewer rows", "more rows"])
def test_pieces_that_do_not_add_up(change, tmp_path):
    W0 = {name: W.clone() for name, W in phi3().state_dict().items()}
    after = split_rows(W0)
    name = "model.layers.0.self_attn.q_proj.weight"
    after[name] = after[name][:-2] if change == "fewer rows" else weights(18, 16)
    record = audited(model_folder(tmp_path / "b", W0), model_folder(tmp_path / "t", after))
    assert code(record) == FAILURE
    assert any("qkv_proj" in name for side, name in lost(record) if side == "base")


def test_interleaved_heads_are_not_guessed(tmp_path):
    """GPT-NeoX, BLOOM and Falcon keep q, k and v of a head together: rows are not blocks."""
    torch.manual_seed(0)
    base = {
        "h.0.attention.query_key_value.weight": weights(48, 16),
        "h.0.attention.dense.weight": weights(16, 16),
    }
    q, k, v = (spiked(W) for W in base["h.0.attention.query_key_value.weight"].split(16))
    tuned = {"h.0.attention.dense.weight": weights(16, 16)}
    tuned |= {f"h.0.attention.{n}_proj.weight": W for n, W in zip("qkv", (q, k, v), strict=True)}
    record = audited(
        save(tmp_path / "b.safetensors", base), save(tmp_path / "t.safetensors", tuned)
    )
    assert code(record) == FAILURE
    assert lost(record) == {
        ("base", "h.0.attention.query_key_value.weight"): NOT_STORED,
        **{("tuned", f"h.0.attention.{n}_proj.weight"): RENAMED for n in "qkv"},
    }


# ---- a side that stores only some tensors

BODY = {f"model.layers.{i}.q.weight": weights(12, 12, seed=i) for i in range(3)}
BODY["model.embed_tokens.weight"] = weights(20, 12, seed=9)


def test_a_fine_tune_that_stores_some_weights(tmp_path):
    base = model_folder(tmp_path / "b", BODY)
    some = {"model.layers.1.q.weight": BODY["model.layers.1.q.weight"] * 1.01}
    tuned = model_folder(tmp_path / "t", some)
    record = audited(base, tuned)
    assert code(record) == FAILURE
    rest = {("base", name): NOT_STORED for name in BODY if name not in some}
    assert lost(record) == rest
    assert counts(record) == {
        "base": 4, "tuned": 1, "compared": 2, "equal": 0, "lost": 3, "excluded": 0, "apart": 0,
    }  # fmt: skip
    for accepted in ({"partial": True}, {"exclude": ["model.layers.[02].q", "*embed*"]}):
        record = audited(base, tuned, **accepted)
        assert (code(record), lost(record)) == (CLEAN, {})
        assert counts(record)["excluded"] == 3


def test_partial_accepts_no_renamed_layer(tmp_path):
    base = model_folder(tmp_path / "b", BODY)
    tuned = {
        "model.layers.0.q.weight": BODY["model.layers.0.q.weight"] * 1.01,
        "model.layers.1.query.weight": spiked(BODY["model.layers.1.q.weight"]),
    }
    record = audited(base, model_folder(tmp_path / "t", tuned), partial=True)
    assert lost(record) == {("tuned", "model.layers.1.query.weight"): RENAMED}
    assert code(record) == FAILURE


def test_a_base_that_stores_only_some_weights(tmp_path):
    """The first shard of a model as the base: the layers of the others are no heads."""
    base = {name: BODY[name] for name in ("model.layers.0.q.weight", "model.embed_tokens.weight")}
    tuned = {name: W * 1.01 for name, W in BODY.items()}
    record = audited(model_folder(tmp_path / "b", base), model_folder(tmp_path / "t", tuned))
    assert lost(record) == {("tuned", f"model.layers.{i}.q.weight"): IN_A_BLOCK for i in (1, 2)}
    assert code(record) == FAILURE


NEW = {
    "classifier.weight": True,
    "classifier.dense.weight": True,
    "classifier.0.weight": True,
    "score.weight": True,
    "v_head.summary.weight": True,
    "model.layers.0.adapter.down.weight": False,
    "model.layers.3.q.weight": False,
    "vision.layers.0.q.weight": False,
}


@pytest.mark.parametrize(("name", "head"), NEW.items(), ids=NEW)
def test_a_new_head_alone_is_harmless(name, head, tmp_path):
    tuned = {n: W * 1.01 for n, W in BODY.items()} | {name: weights(3, 12)}
    base = model_folder(tmp_path / "b", BODY)
    record = audited(base, model_folder(tmp_path / "t", tuned))
    assert code(record) == (CLEAN if head else FAILURE)
    assert counts(record)["apart" if head else "lost"] == 1
    keys = {"base_model.model.model.layers.0.q.lora_A.weight": weights(2, 12)}
    keys |= {"base_model.model.model.layers.0.q.lora_B.weight": weights(12, 2) / 99}
    keys |= {f"base_model.model.{name}": weights(3, 12)}
    record = audited(base, save_adapter(tmp_path / "a", keys))
    assert code(record) == (CLEAN if head else FAILURE)
    assert counts(record)["equal"] == 3  # what the adapter leaves as it is


def test_a_new_head_beside_weights_that_are_missing(tmp_path):
    """A renamed layer looks the same."""
    tuned = {n: W * 1.01 for n, W in BODY.items() if "layers.2" not in n}
    tuned["classifier.weight"] = weights(12, 12)
    record = audited(model_folder(tmp_path / "b", BODY), model_folder(tmp_path / "t", tuned))
    assert lost(record) == {
        ("tuned", "classifier.weight"): RENAMED,
        ("base", "model.layers.2.q.weight"): NOT_STORED,
    }


# ---- what the model's class has no use for

FAMILIES = ["Bert", "Roberta", "XLMRoberta", "Camembert", "DistilBert", "Llama", "GPT2", "ViT"]
CLASSES = [
    "Model", "ForMaskedLM", "ForCausalLM", "LMHeadModel", "ForPreTraining",
    "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
    "ForMultipleChoice",
]  # fmt: skip


def built(family, kind):
    cls = getattr(transformers, family + kind, None)
    if cls is None or cls.config_class is None:
        return None
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
             "num_attention_heads": 2, "n_embd": 16, "n_layer": 1, "n_head": 2, "dim": 16,
             "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "image_size": 8, "patch_size": 4,
             "pad_token_id": 0}  # fmt: skip
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(cls.config_class(**sizes))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_class_lacks_by_the_class_itself(family):
    models = {kind: model for kind in CLASSES if (model := built(family, kind)) is not None}
    names = {n for model in models.values() for n in model.state_dict()}
    said = 0
    for kind, model in some(models.items()):
        config = {"architectures": [family + kind], "model_type": model.config.model_type}
        has = set(model.state_dict())
        for name in some(names):
            if lacks(config, name):
                said += 1
                assert name not in has, (kind, name)
    assert said > 0 or family in ("Llama", "GPT2", "ViT", "DistilBert")


def test_a_dropped_output_layer_and_a_new_head(tmp_path):
    body = {f"bert.encoder.layer.{i}.q.weight": weights(12, 12, seed=i) for i in range(2)}
    base = body | {"cls.predictions.transform.dense.weight": weights(12, 12, seed=7)}
    tuned = {n: W * 1.01 for n, W in body.items()} | {"classifier.weight": weights(3, 12)}
    of = {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
    base = model_folder(tmp_path / "b", base, of)
    as_classifier = of | {"architectures": ["BertForSequenceClassification"]}
    record = audited(base, model_folder(tmp_path / "t", tuned, as_classifier))
    reasons = {row.name: row.reason for row in record.skipped}
    assert reasons == {
        "classifier.weight": NO_COUNTERPART,
        "cls.predictions.transform.dense.weight": OF_NO_USE,
    }
    assert code(record) == CLEAN
    # of the same class, it is started anew
    record = audited(base, model_folder(tmp_path / "u", tuned, of))
    assert code(record) == FAILURE
    assert set(lost(record).values()) == {NOT_STORED, RENAMED}


# ---- tying: what stands for the embedding and the output layer, by transformers itself

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STORED = {"embedding": (EMBED,), "head": (HEAD,), "both": (EMBED, HEAD)}


def llama_folder(folder, tied, stored, seed):
    """A checkpoint that stores some of embedding and output layer; and what a program has."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TEXT, tie_word_embeddings=False, rms_norm_eps=1e-5)
    model = transformers.LlamaForCausalLM(config)
    tensors = {n: W.detach().clone() for n, W in model.state_dict().items()}
    tensors[EMBED] = weights(40, 16, seed=seed)
    tensors[HEAD] = weights(40, 16, seed=seed + 50)
    for name in (EMBED, HEAD):
        if name not in STORED[stored]:
            del tensors[name]
    settings = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    model_folder(folder, tensors, settings | {"tie_word_embeddings": tied})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded, told = transformers.LlamaForCausalLM.from_pretrained(
            folder, output_loading_info=True
        )
    missing = set(told["missing_keys"])
    return {
        EMBED: None if EMBED in missing else loaded.get_input_embeddings().weight.detach(),
        HEAD: None if HEAD in missing else loaded.get_output_embeddings().weight.detach(),
    }


@pytest.mark.parametrize("tuned_stores", STORED)
@pytest.mark.parametrize("base_stores", STORED)
@pytest.mark.parametrize("tuned_ties", [True, False])
@pytest.mark.parametrize("base_ties", [True, False])
def test_what_is_in_use_is_compared(base_ties, tuned_ties, base_stores, tuned_stores, tmp_path):
    before = llama_folder(tmp_path / "b", base_ties, base_stores, seed=1)
    after = llama_folder(tmp_path / "t", tuned_ties, tuned_stores, seed=2)
    record = audited(tmp_path / "b", tmp_path / "t")
    plan = make_plan(tmp_path / "b", tmp_path / "t", Recipe())
    pairs = [load(comparison, CPU) for comparison in plan.comparisons]
    missing = [name for name in (EMBED, HEAD) if before[name] is None or after[name] is None]
    for name in {EMBED, HEAD} - set(missing):
        W0, W = before[name], after[name]
        assert any(
            torch.equal(pair.base, W0) and torch.equal(pair.dense_part, W) for pair in pairs
        ), name
    one_sided = [n for n in missing if (before[n] is None) != (after[n] is None)]
    # where both are stored though tied, versions of transformers differ
    in_doubt = tuned_ties and not base_ties and tuned_stores == base_stores == "both"
    assert bool(lost(record)) == bool(one_sided or in_doubt)
    assert code(record) == (FAILURE if one_sided or in_doubt else FINDINGS)


def test_an_output_layer_that_became_the_embedding(tmp_path):
    """Nothing changed but the configuration: the output layer in use is another."""
    tensors = {EMBED: weights(40, 16), HEAD: weights(40, 16, seed=1), "q.weight": weights(9, 9)}
    of = {"architectures": ["LlamaForCausalLM"]}
    base = model_folder(tmp_path / "b", tensors, of | {"tie_word_embeddings": False})
    tied = of | {"tie_word_embeddings": True}
    tuned = model_folder(tmp_path / "t", {n: tensors[n] for n in (EMBED, "q.weight")}, tied)
    record = audited(base, tuned, top_k=10)
    (row,) = [m for m in record.matrices if m.name == HEAD]
    assert row.tuned_name == f"{EMBED}[as lm_head]"
    expected = int((oracle_scores(tensors[HEAD], tensors[EMBED], 10) < 0.5).sum())
    assert row.new_directions == expected > 0
    assert code(record) == FINDINGS
    done = bulkedge.repair(base, tuned, tmp_path / "out", recipe={"top_k": 10})
    assert [r.note for r in done.matrices] == [f"shares its tensor with {EMBED}"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, None),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": "yes"}, None),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
        ({"text_config": None, "decoder": {"tie_word_embeddings": False}}, False),
    ],
)
def test_where_a_configuration_says_it(config, tied):
    assert ties(config) is tied


DOUBTS = {
    STARTED_ANEW: (("embedding", True), ("embedding", False)),
    NOTHING_BEFORE: (("embedding", False), ("embedding", True)),
    BASE_LACKS_IT: (("embedding", False), ("both", False)),
    EITHER: (("both", False), ("both", True)),
    MAY_BE_SHARED: (("embedding", None), ("both", False)),
}


@pytest.mark.parametrize(("reason", "sides"), DOUBTS.items(), ids=range(len(DOUBTS)))
def test_an_output_layer_in_doubt_is_lost(reason, sides, tmp_path):
    folders = []
    for place, (stored, tied) in zip("bt", sides, strict=True):
        tensors = {n: weights(40, 16, seed=len(n)) for n in STORED[stored]}
        config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied}
        every = tensors | {"q.weight": weights(9, 9)}
        folders.append(model_folder(tmp_path / place, every, None if tied is None else config))
    record = audited(*folders)
    assert lost(record) == {("tuned", HEAD): reason}
    record = audited(*folders, exclude=[HEAD])
    assert lost(record) == {}


@pytest.mark.parametrize("stored", ["embedding", "head"])
def test_an_adapter_of_a_tied_model_that_stores_the_other_name(stored, tmp_path):
    name, other = (EMBED, HEAD) if stored == "embedding" else (HEAD, EMBED)
    tied = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    W0 = weights(40, 16)
    base = model_folder(tmp_path / "b", {name: W0, "q.weight": weights(9, 9)}, tied)
    W = spiked(W0)
    keys = {"base_model.model.q.lora_A.weight": weights(2, 9)}
    keys |= {"base_model.model.q.lora_B.weight": weights(9, 2) / 99}
    adapter = save_adapter(tmp_path / "a", keys | {f"base_model.model.{other}": W})
    record = audited(base, adapter)
    assert [m.name for m in record.matrices if m.new_directions] == [
        f"{name}[as {other.removesuffix('.weight')}]"
    ]
    assert (code(record), lost(record)) == (FINDINGS, {})


# ---- other ways to be absent


@pytest.mark.parametrize("empty", [torch.zeros(0), torch.zeros(0, 12)], ids=["1-D", "2-D"])
def test_a_weight_that_was_saved_empty(empty, tmp_path):
    tuned = {n: W * 1.01 for n, W in BODY.items()} | {"model.layers.1.q.weight": empty}
    record = audited(model_folder(tmp_path / "b", BODY), model_folder(tmp_path / "t", tuned))
    ((key, reason),) = lost(record).items()
    assert key == ("tuned", "model.layers.1.q.weight")
    assert "empty tensor: a damaged save" in reason
    assert code(record) == FAILURE


def test_a_flat_parameter_holds_what_is_not_stored(tmp_path):
    """FSDP's flat vectors are no matrices: those that they hold are lost."""
    tuned = {"model.embed_tokens.weight": BODY["model.embed_tokens.weight"] * 1.01}
    tuned["model.layers._fsdp_wrapped_module._flat_param"] = weights(432)
    record = audited(model_folder(tmp_path / "b", BODY), model_folder(tmp_path / "t", tuned))
    assert set(lost(record)) == {("base", f"model.layers.{i}.q.weight") for i in range(3)}


def test_an_expert_that_is_missing_from_a_stack(tmp_path):
    stack = weights(4, 12, 8)
    base = model_folder(tmp_path / "b", {"m.mlp.experts.down_proj": stack})
    some = {f"m.mlp.experts.{e}.down_proj.weight": stack[e] * 1.01 for e in range(3)}
    record = audited(base, model_folder(tmp_path / "t", some))
    assert lost(record) == {
        ("base", "m.mlp.experts.down_proj"): "only 288 of its 384 numbers have a counterpart"
    }
    assert code(record) == FAILURE


def test_one_packed_weight_loses_both_sides(tmp_path):
    tuned = {n: W * 1.01 for n, W in BODY.items()}
    tuned["model.layers.1.q.weight"] = torch.zeros(12, 12, dtype=torch.uint8)
    record = audited(model_folder(tmp_path / "b", BODY), model_folder(tmp_path / "t", tuned))
    assert counts(record)["lost"] == 2
    assert code(record) == FAILURE


PAIR = {"q.lora_A.weight": weights(2, 6), "q.lora_B.weight": weights(6, 2)}


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"k.lora_B.weight": weights(6, 2)}, "found lora_B: lora_A is missing beside it; save the"),
        ({"k.lora_A.weight": weights(2, 6)}, "found lora_A: lora_B is missing beside it; save the"),
        (
            {"k.lora_A.weight": weights(1, 6), "k.lora_B.weight": weights(6, 1)},
            "rank 1 where adapter_config.json says 2: their scale is in doubt; correct r there, or",
        ),
        ({"k.hada_w1_a": weights(6, 2)}, "a part of an unknown adapter method"),
        ({"v_proj.lora_A.weight": weights(2, 6)}, "lora_B is missing"),
    ],
    ids=["no_A", "no_B", "rank", "method", "fused"],
)
def test_a_weight_whose_update_cannot_be_used_is_not_equal(broken, reason, tmp_path):
    fused = "qkv_proj" if "v_proj.lora_A.weight" in broken else "k"
    tensors = {"q.weight": weights(6, 6), "o.weight": weights(6, 6)}
    base = save(tmp_path / "b.safetensors", tensors | {f"{fused}.weight": weights(18, 6)})
    adapter = save_adapter(tmp_path / "a", PAIR | broken)
    record = audited(base, adapter)
    fates = {row.name: row.fate for row in record.tensors if row.side == "base"}
    assert fates == {"q.weight": "judged", f"{fused}.weight": "lost", "o.weight": "kept"}
    assert counts(record)["equal"] == 1
    assert all(reason in said for said in some(lost(record).values()))
    accepted = audited(base, adapter, exclude=["[kv]*"])
    fates = {row.name: row.fate for row in accepted.tensors if row.side == "base"}
    assert fates[f"{fused}.weight"] == "excluded"
    assert not lost(accepted)


def test_a_flattened_layer_whose_update_cannot_be_used_is_not_equal(tmp_path):
    names = ("mid.to_q.weight", "mid.to_k.weight", "mid.to_v.weight")
    base = save(tmp_path / "b.safetensors", {name: weights(6, 6) for name in names})
    stored = {
        "lora_unet_mid_to_q.lora_down.weight": weights(2, 6),
        "lora_unet_mid_to_q.lora_up.weight": weights(6, 2),
        "lora_unet_mid_to_k.lora_down.weight": weights(2, 6),
    }
    record = audited(base, save(tmp_path / "t.safetensors", stored))
    fates = {row.name: row.fate for row in record.tensors if row.side == "base"}
    assert fates == dict(zip(names, ("judged", "lost", "kept"), strict=True))


def test_experts_whose_updates_cannot_be_told_apart_are_not_equal(tmp_path):
    stacks = {f"mlp.experts.{name}": weights(2, 6, 6) for name in ("gate_proj", "down_proj")}
    base = save(tmp_path / "b.safetensors", stacks | {"q.weight": weights(6, 6)})
    targets = {"target_parameters": ["experts.gate_proj", "experts.down_proj"]}
    factors = {
        "mlp.experts.lora_A.weight": weights(4, 6),
        "mlp.experts.lora_B.weight": weights(6, 4),
    }
    record = audited(base, save_adapter(tmp_path / "a", PAIR | factors, **targets))
    fates = {row.name: row.fate for row in record.tensors if row.side == "base"}
    assert fates == dict.fromkeys(stacks, "lost") | {"q.weight": "judged"}


def test_what_is_no_weight_is_counted_apart(tmp_path):
    """Causal masks of GPT-2's old files, indices, biases of stacks."""
    more = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "ids": torch.arange(9)[None]}
    base = model_folder(tmp_path / "b", BODY | more)
    record = audited(base, model_folder(tmp_path / "t", {n: W * 1.01 for n, W in BODY.items()}))
    assert counts(record)["apart"] == 2
    assert code(record) == CLEAN


def test_a_matrix_that_is_not_finite_is_lost_in_the_counts(tmp_path):
    tuned = {n: W * 1.01 for n, W in BODY.items()}
    tuned["model.layers.1.q.weight"] = torch.full((12, 12), torch.nan)
    tuned["model.layers.2.q.weight"] = BODY["model.layers.2.q.weight"]
    record = audited(model_folder(tmp_path / "b", BODY), model_folder(tmp_path / "t", tuned))
    assert counts(record) == {
        "base": 4, "tuned": 4, "compared": 4, "equal": 2, "lost": 2, "excluded": 0, "apart": 0,
    }  # fmt: skip


def test_a_weight_of_zeros_is_no_clean_one(tmp_path):
    """It has no directions that could be judged."""
    g = torch.Generator().manual_seed(0)
    weights = {f"layer.{i}.weight": torch.randn(24, 20, generator=g) for i in range(2)}
    base = save(tmp_path / "base.safetensors", weights)
    tuned = save(tmp_path / "tuned.safetensors", weights | {"layer.1.weight": torch.zeros(24, 20)})
    record = bulkedge.audit(base, tuned)
    (row,) = [row for row in record.matrices if row.status == "failed"]
    assert (row.name, "all entries of the tuned matrix are zero" in row.note) == (
        "layer.1.weight",
        True,
    )
    assert record.summary.tensors.lost == 2
    assert not record.summary.complete
