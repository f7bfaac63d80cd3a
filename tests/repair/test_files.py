"""What a repair reads and writes: every kind of file, and nothing lost."""

import json
import os
from xml.etree import ElementTree

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bulkedge
from bulkedge import (
    Clip,
    InputError,
    OutputError,
    Project,
    RecipeError,
    RepairRecord,
    Rescale,
    Scale,
)
from bulkedge.checkpoint import read_header
from bulkedge.report import render
from cases import gaussian, orthonormal
from helpers import save, save_adapter, some, weights

RECIPE = {"top_k": 3, "method": "dense"}


def spike(m, n, theta=40.0, seed=1):
    return theta * orthonormal(m, 1, seed) @ orthonormal(n, 1, seed + 1).mT


def files(folder):
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    found.pop("repair.json", None)
    return found


def intruded(W0, theta=40.0, seed=1):
    return (W0.double() + spike(*W0.shape, theta, seed)).to(W0.dtype)


@pytest.fixture
def shards(tmp_path):
    """A sharded bf16 base and fine-tune: two matrices with intruders, biases, a tokenizer."""
    base, tuned = {}, {}
    for i in range(4):
        base[f"h.{i}.q.weight"] = gaussian(40, 30).bfloat16()
        base[f"h.{i}.q.bias"] = weights(40).bfloat16()
        tuned[f"h.{i}.q.weight"] = intruded(base[f"h.{i}.q.weight"], 40.0 if i % 2 else 0.01)
        tuned[f"h.{i}.q.bias"] = weights(40, seed=1).bfloat16()
    for folder, tensors in (("base", base), ("tuned", tuned)):
        place = {name: f"model-{int(name[2]) // 2}.safetensors" for name in tensors}
        for shard in set(place.values()):
            mine = {name: t for name, t in tensors.items() if place[name] == shard}
            save(tmp_path / folder / shard, mine)
        index = {"metadata": {"total_size": 1}, "weight_map": place}
        (tmp_path / folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (tmp_path / folder / "config.json").write_text('{"model_type": "x"}')
    (tmp_path / "tuned/tokenizer.json").write_text("{}")
    (tmp_path / "tuned/1_Pooling").mkdir()
    (tmp_path / "tuned/1_Pooling/config.json").write_text("{}")
    (tmp_path / "tuned/optimizer.pt").write_bytes(b"a pickle")
    return tmp_path / "base", tmp_path / "tuned"


def test_a_sharded_checkpoint(shards, tmp_path):
    base, tuned = shards
    out = tmp_path / "out"
    record = bulkedge.repair(base, tuned, out, method=Scale(0.0), recipe=RECIPE)
    assert [row.name for row in record.matrices] == ["h.1.q.weight", "h.3.q.weight"]
    assert (record.before.summary.new_directions, record.after.summary.new_directions) == (2, 0)
    assert record.left_behind == ["optimizer.pt"]
    before, after = files(tuned), files(out)
    assert set(before) - set(after) == {"optimizer.pt"}
    changed = {name for name in after if before[name] != after[name]}
    assert changed == {"model-0.safetensors", "model-1.safetensors"}
    for shard in some(changed):
        assert read_header(tuned / shard)[1] == read_header(out / shard)[1]
        old, new, W0 = load_file(tuned / shard), load_file(out / shard), load_file(base / shard)
        for name, W in some(old.items()):
            if name not in ("h.1.q.weight", "h.3.q.weight"):
                assert torch.equal(W, new[name])
                continue
            U, S, Vt = torch.linalg.svd(W.double())
            meant = W.double() - S[0] * torch.outer(U[:, 0], Vt[0])
            assert torch.equal(new[name], meant.bfloat16())
            (row,) = (row for row in record.matrices if row.name == name)
            assert row.rank_before is row.rank_after is None
            loss = (new[name].double() - meant).norm() / (W.double() - W0[name].double()).norm()
            assert row.loss == pytest.approx(float(loss), rel=1e-3)
            assert 0 < row.loss < 0.1


def test_an_index_stands_for_its_folder(shards, tmp_path):
    base, tuned = shards
    index = tuned / "model.safetensors.index.json"
    record = bulkedge.repair(base, index, tmp_path / "out", recipe=RECIPE)
    assert record.after.summary.new_directions == 0
    assert record.after.inputs.tuned.path == str(tmp_path / "out/model.safetensors.index.json")
    assert (tmp_path / "out/tokenizer.json").exists()


def test_one_file(tmp_path):
    W0 = gaussian(40, 30).float()
    base = save(tmp_path / "b.safetensors", {"q.weight": W0, "norm.weight": weights(30)})
    tuned = tmp_path / "t.safetensors"
    stored = {"q.weight": intruded(W0), "norm.weight": weights(30, seed=2)}
    save_file(stored, tuned, metadata={"format": "pt"})
    record = bulkedge.repair(base, tuned, tmp_path / "out", recipe=RECIPE)
    assert record.after.inputs.tuned.path == str(tmp_path / "out/t.safetensors")
    assert record == RepairRecord.from_json(tmp_path / "out/repair.json")
    with safe_open(tmp_path / "out/t.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_tensor("norm.weight"), stored["norm.weight"])


def test_parts_of_a_tensor(tmp_path):
    """Stacked experts, stored as (in, out), fused blocks of rows: only the part changes."""
    stack = torch.stack([gaussian(24, 40) + i for i in range(3)]).float()
    fused = gaussian(120, 24).float()
    conv1d = gaussian(24, 120).float()
    base = {
        "h.0.experts.down_proj": stack, "h.0.qkv_proj.weight": fused, "h.0.c_attn.weight": conv1d
    }  # fmt: skip
    tuned = {name: W.clone() for name, W in base.items()}
    tuned["h.0.experts.down_proj"][1] += spike(24, 40).float()
    tuned["h.0.qkv_proj.weight"][40:80] += spike(40, 24).float()
    tuned["h.0.c_attn.weight"][:, 40:80] += spike(24, 40).float()
    for folder, tensors in (("base", base), ("tuned", tuned)):
        save(tmp_path / folder / "model.safetensors", tensors)
        (tmp_path / folder / "config.json").write_text('{"model_type": "gpt2"}')
    split = {"*qkv_proj.weight": [40, 40, 40], "*c_attn.weight": [40, 40, 40]}
    record = bulkedge.repair(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "out",
        method=Project(), recipe=RECIPE | {"split": split},
    )  # fmt: skip
    assert {row.name for row in record.matrices} == {
        "h.0.experts.down_proj[1]", "h.0.qkv_proj.weight[40:80]", "h.0.c_attn.weight[40:80]"
    }  # fmt: skip
    assert record.after.summary.new_directions == 0
    new = load_file(tmp_path / "out/model.safetensors")
    for name, where in {
        "h.0.experts.down_proj": (1, slice(None), slice(None)),
        "h.0.qkv_proj.weight": (slice(40, 80), slice(None)),
        "h.0.c_attn.weight": (slice(None), slice(40, 80)),
    }.items():
        changed = (new[name] != tuned[name]).nonzero()
        inside = torch.zeros_like(new[name], dtype=torch.bool)
        inside[where] = True
        assert len(changed) > 100
        assert bool(inside[tuple(changed.mT)].all()), name


def test_fused_blocks_of_an_adapter_share_their_factors(tmp_path):
    W0 = gaussian(60, 24).float()
    base = save(tmp_path / "b.safetensors", {"qkv_proj.weight": W0})
    B = torch.cat([orthonormal(20, 2, i) * 30 for i in range(3)])
    A = orthonormal(24, 2, 9).mT
    tensors = {"qkv_proj.lora_A.weight": A.float(), "qkv_proj.lora_B.weight": B.float()}
    adapter = save_adapter(tmp_path / "tuned", tensors, r=2, lora_alpha=2)
    recipe = RECIPE | {"split": {"qkv_proj.weight": [20, 20, 20]}}
    record = bulkedge.repair(base, adapter, tmp_path / "out", method=Scale(0.0), recipe=recipe)
    assert len(record.matrices) == 3
    new = load_file(tmp_path / "out/adapter_model.safetensors")
    update = new["qkv_proj.lora_B.weight"].double() @ new["qkv_proj.lora_A.weight"].double()
    for i, row in some(enumerate(record.matrices)):
        block = slice(20 * i, 20 * i + 20)
        W = W0[block].double() + B[block].float().double() @ A.float().double()
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        index = sorted(found.index for found in row.directions)
        meant = W - (U[:, index] * S[index]) @ Vt[index] - W0[block].double()
        torch.testing.assert_close(update[block], meant, rtol=1e-5, atol=1e-5)
    assert record.after.summary.new_directions < record.before.summary.new_directions


# ---- LoRA files of image models

UNET = {"down.0.attn.to_q.weight": (30, 24), "down.0.attn.to_v.weight": (30, 24)}


def unet(tmp_path):
    base = {name: gaussian(*shape).float() for name, shape in UNET.items()}
    base["mid.conv.weight"] = gaussian(20, 8 * 9).float().reshape(20, 8, 3, 3)
    return base, save(tmp_path / "base/model.safetensors", base).parent


def factors(m, n, theta):
    A, B = orthonormal(n, 2, 2).mT, theta * orthonormal(m, 2, 1)
    return A.float().contiguous(), B.float().contiguous()


@pytest.mark.parametrize(
    "alpha", [None, torch.tensor(1.0), torch.tensor(3), torch.tensor(1.0).half()]
)
def test_kohyas_keys_and_alphas(alpha, tmp_path):
    weights0, base = unet(tmp_path)
    stored = {}
    for name, W in weights0.items():
        flat = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        A, B = factors(W.shape[0], W[0].numel(), 60.0)
        stored[f"{flat}.lora_down.weight"] = A.reshape(2, *W.shape[1:])
        stored[f"{flat}.lora_up.weight"] = B.reshape(*B.shape, *[1] * (W.ndim - 2))
        if alpha is not None:
            stored[f"{flat}.alpha"] = alpha.clone()
    save_file(stored, tmp_path / "lora.safetensors", metadata={"ss_network_dim": "2"})
    record = bulkedge.repair(
        base, tmp_path / "lora.safetensors", tmp_path / "out", method=Scale(0.25), recipe=RECIPE
    )
    assert len(record.matrices) == 3
    with safe_open(tmp_path / "out/lora.safetensors", "pt") as file:
        assert file.metadata() == {"ss_network_dim": "2"}
    new = load_file(tmp_path / "out/lora.safetensors")
    assert set(new) == set(stored)
    scale = 1.0 if alpha is None else float(alpha) / 2
    for name, W in some(weights0.items()):
        flat = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        A, B = (new[f"{flat}.lora_{end}.weight"].double().flatten(1) for end in ("down", "up"))
        now = 1.0 if alpha is None else float(new[f"{flat}.alpha"]) / len(A)
        assert now == pytest.approx(scale, rel=1e-7)
        assert new[f"{flat}.lora_down.weight"].shape[1:] == W.shape[1:]
        oldA, oldB = (stored[f"{flat}.lora_{e}.weight"].double().flatten(1) for e in ("down", "up"))
        tuned = W.double().flatten(1) + scale * oldB @ oldA
        U, S, Vt = torch.linalg.svd(tuned, full_matrices=False)
        (row,) = (row for row in record.matrices if row.name == name)
        index = sorted(found.index for found in row.directions)
        meant = tuned - 0.75 * (U[:, index] * S[index]) @ Vt[index]
        torch.testing.assert_close(W.double().flatten(1) + now * B @ A, meant, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_diffusers_metadata(rslora, tmp_path):
    _, base = unet(tmp_path)
    stored = {}
    for name in UNET:
        module = f"unet.{name.removesuffix('.weight')}"
        stored[f"{module}.lora_A.weight"], stored[f"{module}.lora_B.weight"] = factors(30, 24, 60)
    told = {"unet.r": 2, "unet.lora_alpha": 3, "unet.use_rslora": rslora, "text_encoder.r": 4}
    told["unet.alpha_pattern"] = {"to_v": 5}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(told)}
    save_file(stored, tmp_path / "lora.safetensors", metadata=metadata)
    before = bulkedge.checkpoint.open_lora_file(
        bulkedge.checkpoint.open_checkpoint(tmp_path / "lora.safetensors")
    )
    record = bulkedge.repair(
        base, tmp_path / "lora.safetensors", tmp_path / "out", method=Scale(0.25), recipe=RECIPE
    )
    assert all(row.rank_after > 2 for row in record.matrices)
    after = bulkedge.checkpoint.open_lora_file(
        bulkedge.checkpoint.open_checkpoint(tmp_path / "out/lora.safetensors")
    )
    assert after.unhandled == ()
    for name, update in some(before.factors.items()):
        assert after.factors[name].scale == pytest.approx(update.scale, rel=1e-14)
    _, kept = read_header(tmp_path / "out/lora.safetensors")
    assert kept["format"] == "pt"
    assert json.loads(kept["lora_adapter_metadata"])["text_encoder.r"] == 4


# ---- refusals


def repair_of_scaled_blocks(tmp_path):
    """A repair that refuses its only matrix."""
    W0 = gaussian(32, 32).float()
    config = {"quantization_config": {"weight_block_size": [16, 16]}}
    for folder, W in (("base", W0), ("tuned", intruded(W0, 60.0))):
        stored = (W / 4).to(torch.float8_e4m3fn)
        tensors = {"q.weight": stored, "q.weight_scale_inv": torch.full((2, 2), 4.0)}
        save(tmp_path / folder / "model.safetensors", tensors)
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    return bulkedge.repair(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", recipe=RECIPE)


def test_scaled_blocks_are_refused_by_name(tmp_path):
    (row,) = repair_of_scaled_blocks(tmp_path).matrices
    assert row.status == "refused"
    assert row.note.startswith("F8_E4M3 with scales: its blocks would have to be quantised anew")
    assert row.intruders_after is None
    assert row.intruders_before > 0
    assert not (tmp_path / "out").exists()


def test_a_refused_matrix_is_an_error_in_ci(tmp_path):
    record = repair_of_scaled_blocks(tmp_path)
    (row,) = record.matrices
    suite = ElementTree.fromstring(render(record, "junit").encode())  # noqa: S314 — our own
    assert suite.get("errors") == "1"
    (case,) = [c for c in suite if c.get("classname") == "bulkedge.repair"]
    assert case.get("name") == row.name
    assert case.find("error").get("message") == f"NOT repaired: {row.note}"
    (run,) = json.loads(render(record, "sarif"))["runs"]
    (result,) = [r for r in run["results"] if r["ruleId"] == "not-repaired"]
    assert result["level"] == "error"
    assert result["message"]["text"] == f"{row.name}: NOT repaired: {row.note}"
    assert not run["invocations"][0]["executionSuccessful"]
    assert "not-repaired" not in {r["ruleId"] for r in _results(record.before)}


def _results(record):
    return json.loads(render(record, "sarif"))["runs"][0]["results"]


def test_multihead_attention_is_refused_by_name(tmp_path):
    W0 = gaussian(48, 16).float()
    base = save(tmp_path / "b.safetensors", {"mha.in_proj_weight": W0})
    A, B = factors(48, 16, 60.0)
    tensors = {"mha.lora_A.weight": A, "mha.lora_B.weight": B}
    adapter = save_adapter(tmp_path / "tuned", tensors, r=2, lora_alpha=2)
    record = bulkedge.repair(base, adapter, tmp_path / "out", recipe=RECIPE)
    (row,) = record.matrices
    assert row.status == "refused"
    assert row.note.startswith("MultiheadAttention: PEFT keeps one rank")


@pytest.fixture
def pair(tmp_path):
    W0 = {f"l{i}.weight": gaussian(40, 30).float() for i in range(2)}
    base = save(tmp_path / "b.safetensors", W0)
    return base, save(tmp_path / "t.safetensors", {n: intruded(W) for n, W in W0.items()})


def test_only_some(pair, tmp_path):
    record = bulkedge.repair(*pair, tmp_path / "out", only=["l1.*"], recipe=RECIPE)
    assert [row.name for row in record.matrices] == ["l1.weight"]
    assert record.after.summary.new_directions == 1
    before, after = load_file(pair[1]), load_file(tmp_path / "out/t.safetensors")
    assert torch.equal(before["l0.weight"], after["l0.weight"])
    with pytest.raises(RecipeError, match=r"'l9\*' matches no tensor"):
        bulkedge.repair(*pair, tmp_path / "again", only=["l9*"], recipe=RECIPE)
    assert not (tmp_path / "again").exists()


def test_only_the_significant(tmp_path):
    """What stands in the bulk may be called new, but any noise could be that strong."""
    W0 = gaussian(60, 60).float()
    base = save(tmp_path / "b.safetensors", {"q.weight": W0})
    tuned = save(tmp_path / "t.safetensors", {"q.weight": intruded(W0, 14.0)})
    every = bulkedge.repair(base, tuned, None, recipe=RECIPE)
    assert [row.status for row in every.matrices] == ["repaired"]
    some = bulkedge.repair(base, tuned, None, recipe=RECIPE, significance=1e-12)
    assert [row.status for row in some.matrices] == ["left"]
    strong = save(tmp_path / "s.safetensors", {"q.weight": intruded(W0, 60.0)})
    some = bulkedge.repair(base, strong, None, recipe=RECIPE, significance=1e-12)
    assert [row.status for row in some.matrices] == ["repaired"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select": "aligned"}, r"expected select 'rotated' or 'intruder', got 'aligned'"),
        ({"significance": 0.0}, r"expected significance between 0, excluded, and 1, got 0.0"),
        ({"level": 0.01}, r"repair\(\): expected significance=, got level=, which is its old name"),
        ({"max_rank": 0}, r"max_rank ≥ 1, got 0"),
    ],
)
def test_settings_that_make_no_sense(settings, message, pair, tmp_path):
    with pytest.raises(InputError, match=message):
        bulkedge.repair(*pair, tmp_path / "out", recipe=RECIPE, **settings)


# ---- writing


def test_a_dry_run_writes_nothing(pair, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    record = bulkedge.repair(*pair, None, method=Clip(), recipe=RECIPE)
    assert sorted(tmp_path.rglob("*")) == before
    assert record.output is record.after is None
    assert [(row.intruders_before, row.intruders_after) for row in record.matrices] == [
        (1, None)
    ] * 2
    assert all(row.change > 0 for row in record.matrices)


def test_never_over_anything(pair, tmp_path):
    for make in (
        lambda p: p.mkdir(),
        lambda p: p.write_text("x"),
        lambda p: p.symlink_to("nowhere"),
    ):
        out = tmp_path / "out"
        make(out)
        with pytest.raises(OutputError, match=r"exists; a repair is never written over anything"):
            bulkedge.repair(*pair, out, recipe=RECIPE)
        out.rmdir() if out.is_dir() and not out.is_symlink() else out.unlink()


def test_not_inside_an_input(shards, tmp_path):
    base, tuned = shards
    for inside in (base / "x", tuned / "a/b"):
        with pytest.raises(OutputError, match=r"lies inside the input"):
            bulkedge.repair(base, tuned, inside, recipe=RECIPE)


def test_room_is_looked_for_before_anything_is_computed(pair, tmp_path, monkeypatch):
    import bulkedge._repair as module

    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(module, "run_plan", None)
    with pytest.raises(OutputError, match=r"10 bytes free, the copy needs about \d+; make room"):
        bulkedge.repair(*pair, tmp_path / "out", recipe=RECIPE)


def test_nothing_half_written(pair, tmp_path, monkeypatch):
    """Whatever goes wrong, the folder is not there, and nothing is left beside it."""
    import bulkedge._repair as module

    def fault(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_audit_again", fault)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        bulkedge.repair(*pair, tmp_path / "out", recipe=RECIPE)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(pair, tmp_path):
    place = tmp_path / "closed"
    place.mkdir(mode=0o500)
    with pytest.raises(OutputError, match=r"cannot be made"):
        bulkedge.repair(*pair, place / "out", recipe=RECIPE)


def test_links_of_the_hub_cache_are_followed_and_no_others(pair, tmp_path):
    base, tuned = pair
    cache = tmp_path / "models--x--y"
    snapshot = cache / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs/123").write_bytes(tuned.read_bytes())
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    (snapshot / "elsewhere").symlink_to(tmp_path)
    record = bulkedge.repair(base, snapshot, tmp_path / "out", recipe=RECIPE)
    assert record.left_behind == ["elsewhere"]
    written = tmp_path / "out/model.safetensors"
    assert written.is_file()
    assert not written.is_symlink()
    assert (cache / "blobs/123").read_bytes() == tuned.read_bytes()
    (snapshot / "notes.txt").symlink_to("/etc/passwd")
    with pytest.raises(bulkedge.CheckpointError, match=r"is a link that leaves"):
        bulkedge.repair(base, snapshot, tmp_path / "again", recipe=RECIPE)
    assert not (tmp_path / "again").exists()


def test_a_record_of_something_else(tmp_path):
    (tmp_path / "x.json").write_text('{"schema_version": "9"}')
    with pytest.raises(bulkedge.CheckpointError, match=r"not a repair record of schema 2"):
        RepairRecord.from_json(tmp_path / "x.json")
    with pytest.raises(bulkedge.CheckpointError, match=r"missing\.json: cannot be read"):
        RepairRecord.from_json(tmp_path / "missing.json")


def test_the_same_from_a_repaired_copy(pair, tmp_path):
    """An older record in the input is not taken for the new one's."""
    base, tuned = pair
    first = bulkedge.repair(base, tuned, tmp_path / "out", only=["l0.*"], recipe=RECIPE)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((tmp_path / "out/t.safetensors").read_bytes())
    (folder / "repair.json").write_text(first.to_json())
    second = bulkedge.repair(base, folder, tmp_path / "again", recipe=RECIPE)
    assert [row.name for row in second.matrices] == ["l1.weight"]
    assert RepairRecord.from_json(tmp_path / "again/repair.json") == second


def test_new_ranks_are_those_of_one_module_alone(tmp_path):
    """A module called proj, and another one's proj."""
    W0 = gaussian(40, 30).float()
    base = save(tmp_path / "b.safetensors", {"proj.weight": W0, "att.proj.weight": W0})
    A, B = factors(40, 30, 60.0)
    tensors = {"proj.lora_A.weight": A, "proj.lora_B.weight": B}
    tensors |= {"att.proj.lora_A.weight": A, "att.proj.lora_B.weight": 1e-3 * B}
    adapter = save_adapter(tmp_path / "tuned", tensors, r=2, lora_alpha=2)
    record = bulkedge.repair(base, adapter, tmp_path / "out", method=Scale(0.0), recipe=RECIPE)
    assert record.after.summary.complete
    assert [row.rank_after for row in record.matrices] == [4]
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["rank_pattern"] == {"^proj": 4}


@pytest.mark.parametrize("method", [Scale(0.0), Rescale(level=0.5)])
def test_a_bare_parameter_called_weight_is_known_by_its_own_name(method, tmp_path):
    """PEFT asks its patterns for router.weight then, not for router."""
    base = save(tmp_path / "b.safetensors", {"router.weight": gaussian(40, 30).float()})
    A, B = factors(40, 30, 60.0)
    tensors = {"router.lora_A.weight": A, "router.lora_B.weight": B}
    config = {"target_parameters": ["router.weight"], "rank_pattern": {"router": 5}}
    adapter = save_adapter(tmp_path / "tuned", tensors, r=2, lora_alpha=2, **config)
    record = bulkedge.repair(base, adapter, tmp_path / "out", method=method, recipe=RECIPE)
    assert record.before.summary.new_directions > record.after.summary.new_directions == 0
    assert record.after.summary.complete
    (row,) = record.after.matrices
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert set(written["alpha_pattern"]) == {r"^router\.weight"}
    assert written["rank_pattern"].get(r"^router\.weight", 2) == row.rank
    if isinstance(method, Rescale):
        assert row.spectral_norm_update <= 0.5 * row.top_k_threshold


def test_an_initialisation_that_wants_even_ranks_gets_them(tmp_path):
    W0 = gaussian(40, 30).float()
    base = save(tmp_path / "b.safetensors", {"q.weight": W0})
    A, B = factors(40, 30, 60.0)
    B[:, 1] *= 0.01  # of two spikes one makes an intruder
    tensors = {"q.lora_A.weight": A, "q.lora_B.weight": B}
    for init, rank in (("orthogonal", 4), (True, 3)):
        place = tmp_path / str(init)
        adapter = save_adapter(place, tensors, r=2, lora_alpha=2, init_lora_weights=init)
        out = place.with_suffix(".out")
        record = bulkedge.repair(base, adapter, out, method=Scale(0.5), recipe=RECIPE, only=["q.*"])
        assert record.matrices[0].rank_after == rank


def test_a_checkpoint_has_no_ranks(pair, tmp_path):
    with pytest.raises(InputError, match=r"expected an adapter for max_rank, got a checkpoint"):
        bulkedge.repair(*pair, tmp_path / "out", recipe=RECIPE, max_rank=3)


def test_what_could_not_be_stored_is_not_treated(tmp_path):
    """Along Z nothing is left after one round: the others find nothing to do."""
    W0 = gaussian(40, 30).float()
    base = save(tmp_path / "b.safetensors", {"q.weight": W0})
    A, B = factors(40, 30, 60.0)
    adapter = save_adapter(tmp_path / "t", {"q.lora_A.weight": A, "q.lora_B.weight": B}, r=2)
    first = bulkedge.repair(base, adapter, tmp_path / "1", method=Project(), recipe=RECIPE)
    again = bulkedge.repair(base, tmp_path / "1", tmp_path / "2", method=Project(), recipe=RECIPE)
    assert first.matrices[0].rounds >= 1
    assert all(row.status == "left" for row in again.matrices)
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_a_file_brings_the_configuration_that_tells_how_to_read_it(tmp_path):
    W0 = gaussian(24, 24).float()
    base = save(tmp_path / "b/model.safetensors", {"h.0.c_proj.weight": W0})
    tuned = save(tmp_path / "t/model.safetensors", {"h.0.c_proj.weight": intruded(W0, 60.0)})
    (tuned.parent / "config.json").write_text('{"model_type": "gpt2"}')
    record = bulkedge.repair(base, tuned, tmp_path / "out", method=Scale(0.9), recipe=RECIPE)
    assert record.before.matrices[0].transposed
    assert record.after.matrices[0].transposed
    assert (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize("name", ["a\0b", "..", "new/.."])
def test_names_that_name_no_folder(name, pair, tmp_path):
    with pytest.raises(OutputError, match=r"names no folder that could be made"):
        bulkedge.repair(*pair, f"{tmp_path}/{name}", recipe=RECIPE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "scale"}, r"expected a method such as Clip\(\), got 'scale'"),
        ({"max_rank": 1.5}, r"max_rank ≥ 1, got 1.5"),
        ({"significance": "x"}, r"expected significance between 0, excluded, and 1, got 'x'"),
    ],
)
def test_arguments_of_another_kind(settings, message, pair, tmp_path):
    with pytest.raises(InputError, match=message):
        bulkedge.repair(*pair, tmp_path / "out", recipe=RECIPE, **settings)


def test_untreated_experts_leave_room_for_the_others(tmp_path):
    stack = torch.stack([gaussian(30, 24) + i for i in range(3)]).float()
    base = save(tmp_path / "b.safetensors", {"experts.down_proj": stack})
    B = torch.zeros(30, 2, 3)
    B[:, :, 1] = 60 * orthonormal(30, 2, 1).float()
    tensors = {"experts.lora_A.weight": orthonormal(24, 2, 2).mT.repeat(3, 1).float()}
    tensors["experts.lora_B.weight"] = B.flatten(1)
    config = {"r": 2, "lora_alpha": 2, "target_parameters": ["experts.down_proj"]}
    adapter = save_adapter(tmp_path / "t", tensors, **config, peft_version="0.21.2")
    record = bulkedge.repair(base, adapter, tmp_path / "out", recipe=RECIPE, max_rank=1)
    (row,) = record.matrices
    assert (row.rank_after, row.loss < 1e-6) == (2, True)
