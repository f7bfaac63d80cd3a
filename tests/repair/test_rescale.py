"""Updates made weaker as a whole, from files to files; stock PEFT is the judge of adapters."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

import bulkedge
from bulkedge import InputError, RecipeError
from bulkedge.cli import cli
from bulkedge.repairing import Rescale
from bulkedge.update import BaseSpectrum, budget
from helpers import EXAMPLE, MINILM, save, save_adapter, some, weights

peft = pytest.importorskip("peft")
RECIPE = {"top_k": 2}
UPDATED = ("up", "down", "words", "conv")


class Net(nn.Module):
    """A layer of each kind."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(30, 40), nn.Linear(40, 30)
        self.words, self.conv = nn.Embedding(50, 30), nn.Conv2d(5, 40, 3)
        self.other = nn.Linear(30, 30)

    def forward(self, x):
        return x


def net():
    model = Net()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(weights(*parameter.shape, seed=i))
    return model


@pytest.fixture
def base(tmp_path):
    return save(tmp_path / "base.safetensors", dict(net().state_dict()))


def adapter(folder, targets=UPDATED, **settings):
    config = peft.LoraConfig(r=2, lora_alpha=64, target_modules=list(targets),
                             init_lora_weights=False, **settings)  # fmt: skip
    tuned = peft.get_peft_model(net(), config)
    for i, (name, parameter) in enumerate(tuned.named_parameters()):
        if "lora_" in name:
            parameter.data = 0.2 * weights(*parameter.shape, seed=100 + i)
    tuned.save_pretrained(folder)
    return folder


def merged(folder):
    """The weights as stock PEFT merges them."""
    found = peft.PeftModel.from_pretrained(net(), folder).merge_and_unload().state_dict()
    return {name: tensor.double() for name, tensor in found.items()}


def only_configuration_differs(before, after):
    names = {path.name for path in before.iterdir()}
    assert {path.name for path in after.iterdir()} == names | {"repair.json"}
    changed = {n for n in names if (before / n).read_bytes() != (after / n).read_bytes()}
    assert changed == {"adapter_config.json"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"up": 3, "do.*": 200}, "rank_pattern": {"up": 5}},
    ],
)
def test_stock_peft_merges_what_is_meant(base, tmp_path, settings):
    before = adapter(tmp_path / "a", **settings)
    W0 = {name: tensor.double() for name, tensor in net().state_dict().items()}
    W = merged(before)
    for only in ((), ("up", "words")):
        out = tmp_path / f"out{len(only)}"
        record = bulkedge.repair(base, before, out, method=Rescale(uniform=0.7), only=only,
                                 recipe=RECIPE)  # fmt: skip
        only_configuration_differs(before, out)
        found = merged(out)
        for name in some(W0):
            scaled = name.removesuffix(".weight") in (only or UPDATED) and "bias" not in name
            meant = W0[name] + (0.7 if scaled else 1.0) * (W[name] - W0[name])
            torch.testing.assert_close(found[name], meant, rtol=1e-6, atol=1e-5)
        rows = record.matrices
        assert {row.status for row in rows} == {"repaired"}
        assert len(rows) == len(only or UPDATED)
        assert [row.change for row in rows] == pytest.approx([0.3] * len(rows))
        assert [row.energy_removed for row in rows] == pytest.approx([0.51] * len(rows))
    whole = json.loads((tmp_path / "out0/adapter_config.json").read_text())
    assert whole["lora_alpha"] == pytest.approx(0.7 * 64)  # what any server reads


@pytest.mark.parametrize("of", ["leading", "edge"])
def test_no_spike_is_left_above_the_level(base, tmp_path, of):
    before, out = adapter(tmp_path / "a"), tmp_path / "out"
    record = bulkedge.repair(base, before, out, method=Rescale(0.8, of=of), recipe=RECIPE)
    only_configuration_differs(before, out)
    assert record.method == {"name": "rescale", "level": 0.8, "of": of}
    W0, W = load_file(base), merged(out)
    reached = 0
    for row in some(record.matrices):
        base_matrix = W0[row.name].double().flatten(1)
        found = budget(BaseSpectrum.of(base_matrix), 1, top_k=2)
        limit = 0.8 * (found.top_k_threshold if of == "leading" else found.threshold)
        spike = float(torch.linalg.matrix_norm(W[row.name].flatten(1) - base_matrix, 2))
        assert spike < limit * (1 + 1e-5)
        if row.status == "repaired":
            reached += 1
            assert spike == pytest.approx(limit, rel=1e-4)
    assert reached
    again = bulkedge.repair(base, out, None, method=Rescale(0.8, of=of), recipe=RECIPE)
    assert {row.status for row in some(again.matrices)} == {"left"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_between_base_and_fine_tune(tmp_path, dtype):
    first = {"a.weight": weights(40, 30), "a.bias": weights(40), "b.weight": weights(30, 30)}
    tuned = first | {"a.weight": first["a.weight"] + weights(40, 30, seed=3), "a.bias": weights(40)}
    base = save(tmp_path / "base.safetensors", {n: t.to(dtype) for n, t in first.items()})
    fine = save(tmp_path / "fine.safetensors", {n: t.to(dtype) for n, t in tuned.items()})
    record = bulkedge.repair(base, fine, tmp_path / "out", method=Rescale(uniform=0.25),
                             recipe=RECIPE)  # fmt: skip
    W0, W, found = (load_file(f) for f in (base, fine, tmp_path / "out/fine.safetensors"))
    meant = W0["a.weight"].double() + 0.25 * (W["a.weight"].double() - W0["a.weight"].double())
    assert torch.equal(found["a.weight"], meant.to(dtype))
    for name in ("a.bias", "b.weight"):
        assert torch.equal(found[name], W[name])
    (row,) = record.matrices
    error = torch.linalg.vector_norm(found["a.weight"].double() - meant)
    size = torch.linalg.vector_norm(W["a.weight"].double() - W0["a.weight"].double())
    assert record.cost.mean == record.cost.most == row.change
    assert record.cost.heavy == "mean"
    assert row.change == pytest.approx(0.75)
    assert row.loss == pytest.approx(float(error / size))


def lora(folder, tensors, **config):
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    return save_adapter(folder, prefixed, **{"r": 2, "lora_alpha": 64} | config)


def factors(seed=0):
    return {"up.lora_A.weight": weights(2, 30, seed=seed), "up.lora_B.weight": weights(40, 2)}


def test_what_alpha_does_not_scale_is_refused_by_name(base, tmp_path):
    dora = factors() | {"up.lora_magnitude_vector": weights(40).abs()}
    full = factors() | {"other.weight": weights(30, 30, seed=99)}
    for name, tensors, config, words in (
        ("d", dora, {"use_dora": True}, "DoRA"),
        ("f", full, {}, "stored in full"),
    ):
        before = lora(tmp_path / name, tensors, **config)
        record = bulkedge.repair(base, before, tmp_path / f"out{name}",
                                 method=Rescale(uniform=0.5), recipe=RECIPE)  # fmt: skip
        (row,) = [row for row in record.matrices if row.status == "refused"]
        assert words in row.note


def test_layers_that_share_an_alpha_are_scaled_together_or_not_at_all(tmp_path):
    parts = {f"h.{n}_proj.weight": weights(20, 30, seed=i) for i, n in enumerate("qkv")}
    base = save(tmp_path / "base.safetensors", parts)
    tensors = {"h.qkv_proj.lora_A.weight": weights(2, 30)}
    tensors["h.qkv_proj.lora_B.weight"] = weights(60, 2, seed=1)
    before = lora(tmp_path / "a", tensors)
    one = bulkedge.repair(base, before, None, method=Rescale(uniform=0.5), recipe=RECIPE,
                          only=["*q_proj*"])  # fmt: skip
    (row,) = one.matrices
    assert row.status == "refused"
    assert "shares its α" in row.note
    all_ = bulkedge.repair(base, before, tmp_path / "out", method=Rescale(0.5), recipe=RECIPE)
    assert len({row.change for row in all_.matrices}) == 1
    assert len(all_.matrices) == 3
    after = bulkedge.audit(base, tmp_path / "out", recipe=RECIPE)
    shares = [
        row.spectral_norm_update
        / budget(BaseSpectrum.of(parts[row.name]), 1, top_k=2).top_k_threshold
        for row in some(after.matrices)
    ]
    assert max(shares) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*invalid shape")  # PEFT takes these biases for factors
@pytest.mark.parametrize("left_out", ["excluded", "not chosen"])
def test_one_alpha_for_all_is_written_where_all_are_scaled_alone(left_out, base, tmp_path):
    layers = ("up", "down", "conv")
    before, out = adapter(tmp_path / "a", layers, lora_bias=True), tmp_path / "out"
    choice = {"recipe": RECIPE | {"exclude": ["conv*"]}}
    if left_out == "not chosen":
        choice = {"only": ["up", "down"], "recipe": RECIPE}
    record = bulkedge.repair(base, before, out, method=Rescale(uniform=0.5), **choice)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 64
    assert len(config["alpha_pattern"]) == len(record.matrices) == 2
    W0, W, found = net().state_dict(), merged(before), merged(out)
    for layer in layers:
        for name in {f"{layer}.weight", f"{layer}.bias"} & W0.keys():
            s = 1.0 if layer == "conv" else 0.5
            meant = W0[name] + s * (W[name] - W0[name])
            torch.testing.assert_close(found[name], meant, rtol=1e-6, atol=1e-5)
    notes = {row.name: row.note for row in record.matrices}
    assert "has the same α, and is scaled with it" in notes["up.weight"]


def test_a_part_of_a_fused_layer_that_is_excluded_has_the_same_factors(tmp_path):
    parts = {f"h.{n}_proj.weight": weights(20, 30, seed=i) for i, n in enumerate("qkv")}
    base = save(tmp_path / "base.safetensors", parts)
    tensors = {"h.qkv_proj.lora_A.weight": weights(2, 30)}
    tensors["h.qkv_proj.lora_B.weight"] = weights(60, 2, seed=1)
    before = lora(tmp_path / "a", tensors)
    model = nn.ModuleDict({f"{n}_proj": nn.Linear(30, 20, bias=False) for n in "qkv"})
    model.load_state_dict({name.removeprefix("h."): W for name, W in parts.items()})
    with bulkedge.Moments(model) as moments, torch.no_grad():
        for layer in model.values():
            layer(weights(50, 30))
    for method in (Rescale(uniform=0.5), bulkedge.Protect(moments)):
        record = bulkedge.repair(base, before, None, method=method,
                                 recipe=RECIPE | {"exclude": ["*q_proj*"]})  # fmt: skip
        assert [row.status for row in record.matrices] == ["refused"] * 2
        assert all("with a matrix that is " in row.note for row in record.matrices)


def test_a_base_without_a_limit_is_refused(tmp_path):
    base = save(tmp_path / "base.safetensors", {"up.weight": weights(6, 8)})
    fine = save(tmp_path / "fine.safetensors", {"up.weight": weights(6, 8, seed=1)})
    record = bulkedge.repair(base, fine, None, method=Rescale(level=1), recipe=RECIPE)
    assert "no limit; use uniform instead" in record.matrices[0].note


def written(folder):
    (found,) = folder.glob("*.safetensors")
    return found


@pytest.mark.parametrize("shape", [(120, 90), (800, 780)])
@pytest.mark.parametrize("spread", [1e-4, 1e-2])
def test_no_spike_of_a_flat_update_is_left_above_the_level(shape, spread, tmp_path):
    p = min(shape)
    left, right = (torch.linalg.qr(weights(n, p, seed=n).double()).Q for n in shape)
    flat = 5 * (1 - spread * torch.rand(p, generator=torch.Generator().manual_seed(0)))
    W0 = 0.05 * weights(*shape, seed=3).double()
    base = save(tmp_path / "base.safetensors", {"w": W0})
    fine = save(tmp_path / "fine.safetensors", {"w": W0 + left * flat.double() @ right.mT})
    out = tmp_path / "out"
    record = bulkedge.repair(base, fine, out, method=Rescale(level=1), recipe=RECIPE)
    spike = float(torch.linalg.matrix_norm(load_file(written(out))["w"] - W0, 2))
    limit = record.before.matrices[0].top_k_threshold
    assert 0.99 * limit < spike <= limit
    assert record.after.matrices[0].beyond_top_k_threshold in {None, 0}


def test_rounding_that_leads_beyond_the_level_is_told(tmp_path):
    W0 = weights(60, 50).bfloat16()
    W = (W0.double() + 30 * weights(60, 1, seed=1) @ weights(1, 50, seed=2) / 50).bfloat16()
    base = save(tmp_path / "base.safetensors", {"w": W0})
    fine = save(tmp_path / "fine.safetensors", {"w": W})
    notes = []
    for level in (0.003, 0.01, 0.03, 0.1, 0.3, 1):
        out = tmp_path / f"at-{level}"
        record = bulkedge.repair(base, fine, out, method=Rescale(level=level), recipe=RECIPE)
        spike = torch.linalg.matrix_norm(load_file(written(out))["w"].double() - W0.double(), 2)
        limit = level * (record.before.matrices[0].top_k_threshold or 0.0)
        times = float(spike) / limit
        told = f"rounding to bfloat16 leaves the strongest spike at {times:.4g} times the limit"
        notes.append(record.matrices[0].note)
        assert notes[-1] == (told if times > 1.0001 else None)
    assert None in notes
    assert set(notes) != {None}


def test_an_adapter_without_a_configuration_is_refused(tmp_path):
    base = save(tmp_path / "base.safetensors", {"unet.up.weight": weights(30, 40)})
    tensors = {"lora_unet_up.lora_down.weight": weights(2, 40), "lora_unet_up.alpha": weights(1)[0]}
    tensors["lora_unet_up.lora_up.weight"] = weights(30, 2)
    fine = save(tmp_path / "kohya.safetensors", tensors)
    with pytest.raises(InputError, match="expected a PEFT adapter with its adapter_config"):
        bulkedge.repair(base, fine, None, method=Rescale(uniform=0.5), recipe=RECIPE)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "expected a level or one factor for all of Rescale"),
        ({"level": 1, "uniform": 0.5}, "expected a level or one factor .*give one of them"),
        ({"uniform": 0.5, "of": "edge"}, "expected no of= with uniform"),
        ({"uniform": 1.5}, "expected uniform between 0, excluded, and 1"),
        ({"level": 0}, "expected level to be positive"),
        ({"level": 1, "of": "middle"}, "expected of to be"),
    ],
)
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(InputError, match=words):
        Rescale(**settings)


def test_the_command(base, tmp_path):
    before = adapter(tmp_path / "a")
    command = ["repair", str(base), str(before), "-k", "2", "--method", "rescale"]
    done = CliRunner().invoke(cli, [*command, "-o", str(tmp_path / "o"), "--uniform", "0.7"])
    assert done.exit_code in (0, 1), done.output
    assert "rescale:" in done.output
    assert "changed 30% of each update on average, at most 30%" in done.output
    assert "evaluate before you ship" in done.output
    assert "WARNING" not in done.output
    strong = CliRunner().invoke(cli, [*command, "--dry-run", "--uniform", "0.4"])
    assert "WARNING: more than half of the update is gone" in strong.output
    only_configuration_differs(before, tmp_path / "o")
    done = CliRunner().invoke(cli, [*command, "--dry-run", "--level", "1", "--of", "edge"])
    assert done.exit_code in (0, 1), done.output
    wrong = CliRunner().invoke(cli, [*command, "--dry-run", "--keep", "0.5"])
    assert isinstance(wrong.exception, RecipeError)
    assert "--keep is no setting" in str(wrong.exception)
    with pytest.raises(InputError, match="with Rescale"):
        bulkedge.repair(base, before, None, method=Rescale(uniform=0.5), max_rank=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora-r1", "lora-r8"])
def test_of_the_shipped_adapters_only_the_configuration_changes(name, tmp_path):
    before = EXAMPLE / name
    for i, method in enumerate((Rescale(uniform=0.7), Rescale(level=1.0))):
        record = bulkedge.repair(MINILM, before, tmp_path / str(i), method=method)
        only_configuration_differs(before, tmp_path / str(i))
        assert record.after.summary.new_directions <= record.before.summary.new_directions
