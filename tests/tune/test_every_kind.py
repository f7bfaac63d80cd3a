"""Every kind of adapter under every holder: the audit of what was saved shows the limit, or it is
refused by name; and what the monitor saw last is what the audit says."""

import re
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bulkedge
from bulkedge import InputError
from bulkedge.moments import Moments
from bulkedge.tune import (
    DriftClip,
    IntruderPenalty,
    Monitor,
    OrthonormalFactors,
    RankController,
    SpikeClip,
)

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, of odd targets

from bulkedge.tune.peft import SpectralConfig, export_lora  # noqa: E402
from helpers import some  # noqa: E402

LIMIT = 0.002  # of drift
K = 5


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 40, 30) / 6)

    def forward(self, x):
        return torch.einsum("eoi,bi->beo", self.gate_up_proj, x)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(30, 40)
        self.turned = transformers.pytorch_utils.Conv1D(40, 30)
        nn.init.normal_(self.turned.weight, std=0.2)
        self.table = nn.Embedding(50, 30)
        self.kernel = nn.Conv2d(3, 24, 3)
        self.line = nn.Conv1d(6, 24, 5)
        self.experts = Experts()
        self.gate = nn.Linear(30, 1)

    def forward(self, x, tokens):
        """The outputs of all layers, of inputs that are made from one."""
        images, rows = x[:, :27].view(-1, 3, 3, 3), x.view(-1, 6, 5)
        outputs = self.linear(x), self.turned(x), self.table(tokens), self.kernel(images)
        parts = [*outputs, self.line(rows), self.experts(x), self.gate(x)]
        return [part.flatten(1) for part in parts]


def make_network():
    torch.manual_seed(0)
    return Network()


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 30, generator=generator), torch.randint(
        0, 50, (16,), generator=generator
    )


def lora(targets, **options):
    defaults = {"r": 3, "lora_alpha": 12, "target_modules": targets}
    return lambda model: peft.get_peft_model(model, peft.LoraConfig(**(defaults | options)))


def several(model):
    model = lora(["linear"])(model)
    other = peft.LoraConfig(r=2, lora_alpha=-6, target_modules=["linear"])
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    return model


def in_full(model):
    model.requires_grad_(False)
    model.linear.weight.requires_grad_(True)
    model.table.weight.requires_grad_(True)
    return model


def saved_beside(model):
    return lora(["turned"], modules_to_save=["linear"], fan_in_fan_out=True)(model)


KINDS = {
    "linear": lora(["linear"]),
    "rslora": lora(["linear"], use_rslora=True),
    "rank pattern": lora(["linear"], rank_pattern={"linear": 2}, alpha_pattern={"linear": 9}),
    "Conv1D": lora(["turned"], fan_in_fan_out=True),
    "embedding": lora(["table"]),
    "convolution": lora(["kernel"]),
    "1d convolution": lora(["line"]),
    "experts": lora([], target_parameters=["experts.gate_up_proj"]),
    "DoRA": lora(["linear"], use_dora=True),
    "DoRA of a convolution": lora(["kernel"], use_dora=True),
    "DoRA of an embedding": lora(["table"], use_dora=True),
    "several adapters": several,
    "in full": in_full,
    "beside LoRA": saved_beside,
    "spectral": lambda model: peft.get_peft_model(
        model, SpectralConfig(r=4, target_modules=["linear"])
    ),
    "AdaLoRA": lambda model: peft.get_peft_model(
        model, peft.AdaLoraConfig(total_step=9, target_modules=["linear"])
    ),
    "OFT": lambda model: peft.get_peft_model(
        model, peft.OFTConfig(oft_block_size=5, target_modules=["linear"])
    ),
}
"""A kind of adapter, and what puts it on the network."""
EDGE = {"level": 0.5}
FULL = {"full": True}
HOLDERS = {
    "edge": lambda model, _, more: SpikeClip(model, **EDGE, **more),
    "leading": lambda model, _, more: SpikeClip(model, of="leading", **EDGE, **more),
    "ranks": lambda model, _, more: RankController(model, every=2, **EDGE),
    "drift": lambda model, moments, more: DriftClip(model, moments, LIMIT),
    "orthonormal": lambda model, _, more: OrthonormalFactors(model),
}
NO_FACTORS = r"its adapters are {}, whose updates have no factors that could be held"
DORA = r"W0 \+ s·B·A.*got DoRA"
REFUSED = {
    **{
        (kind, holder): DORA
        for kind in ("DoRA", "DoRA of a convolution", "DoRA of an embedding")
        for holder in ("ranks", "drift", "orthonormal")
    },
    ("several adapters", "ranks"): "got several active adapters; leave it out",
    ("several adapters", "orthonormal"): "got several active adapters; leave it out",
    ("experts", "drift"): r"experts.gate_up_proj\[0\]: expected moments of its inputs, got none",
    **{("in full", holder): "found none that match" for holder in ("drift", "orthonormal")},
    ("in full", "ranks"): "got a weight that is trained in full; leave it out",
    **{("spectral", x): NO_FACTORS.format("SpectralLayer") for x in HOLDERS},
    **{("AdaLoRA", x): r"linear: expected W0 \+ s·B·A, got AdaLoRA" for x in HOLDERS},
    **{("OFT", x): NO_FACTORS.format("Linear") for x in HOLDERS},
}
"""What says so by name, and what it says."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The network in a file, and the moments of its inputs in another."""
    folder = tmp_path_factory.mktemp("base")
    network = make_network()
    save(network, "in full", folder / "base")
    with Moments(network) as moments, torch.no_grad():
        for seed in range(20):
            network(*batch(seed))
    moments.save(folder / "base.moments")
    return folder


def train(model, holder=None, steps=6):
    """Some steps towards outputs that are far away; how often the holder lowered something."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.1)
    if holder is not None:
        holder.attach(optimizer)
    lowered = 0
    for step in range(steps):
        optimizer.zero_grad()
        loss = sum((out - 9).square().mean() for out in model(*batch(step)))
        loss.backward()
        optimizer.step()
        lowered += getattr(holder, "clipped", 1)
    return lowered


def save(model, kind, folder):
    """What is saved of a model, as a user would save it."""
    if kind == "spectral":
        export_lora(model, folder)
    elif kind == "several adapters":
        model = model.merge_and_unload()
    if kind in ("several adapters", "in full"):
        folder.mkdir()
        state = {name: x.contiguous() for name, x in model.state_dict().items()}
        save_file(state, folder / "m.safetensors")
    elif kind != "spectral":
        model.save_pretrained(folder)
    return folder


def audit(base, tuned, **options):
    recipe, moments = {"top_k": K, **options}, base / "base.moments"
    record = bulkedge.audit(base / "base/m.safetensors", tuned, recipe=recipe, moments=moments)
    return [row for row in record.matrices if row.status == "audited"]


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_held(kind, holder, base, tmp_path):
    model = KINDS[kind](make_network())
    make = lambda: HOLDERS[holder](  # noqa: E731
        model, Moments.load(base / "base.moments"), FULL if kind == "beside LoRA" else {}
    )
    if message := REFUSED.get((kind, holder)):
        with pytest.raises(InputError) as caught:
            make()
        assert re.search(message, str(caught.value))
        return
    held = make()
    assert train(model, held) > 0
    rows = audit(base, save(model, kind, tmp_path / "tuned"))
    beside = kind == "beside LoRA" and holder in ("drift", "ranks", "orthonormal")
    rows = [row for row in rows if not (beside and row.name == "linear.weight")]
    for row in some(rows):
        if holder == "drift":
            assert row.drift <= LIMIT * (1 + 1e-5)
        elif holder == "orthonormal":
            assert row.spectral_norm_update == pytest.approx(abs(row.scale), rel=1e-5)
        else:
            line = row.top_k_threshold if holder == "leading" else row.threshold
            assert row.spectral_norm_update <= 0.5 * line * (1 + 1e-5)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("holder", ["edge", "leading"])
def test_experts_are_held_whether_gate_and_up_are_stored_apart_or_not(holder, apart, tmp_path):
    network = make_network()
    with torch.no_grad():  # the threshold of the half is lower than that of the whole
        network.experts.gate_up_proj[:, 20:] /= 4
    state = {name: x.clone() for name, x in network.state_dict().items()}
    if apart:
        for i, whole in enumerate(state.pop("experts.gate_up_proj")):
            for name, rows in zip(("gate", "up"), whole.chunk(2), strict=True):
                state[f"experts.{i}.{name}_proj.weight"] = rows.contiguous()
    save_file(state, tmp_path / "m.safetensors")
    model = KINDS["experts"](network)
    assert train(model, HOLDERS[holder](model, None, {})) > 0
    model.save_pretrained(tmp_path / "tuned")
    record = bulkedge.audit(tmp_path / "m.safetensors", tmp_path / "tuned")
    rows = [row for row in record.matrices if row.status == "audited"]
    assert len(rows) == (6 if apart else 3)
    line = {"edge": "threshold", "leading": "top_k_threshold"}[holder]
    found = [row.spectral_norm_update / getattr(row, line) for row in rows]
    assert max(found) <= 0.5 * (1 + 1e-5)
    assert not apart or max(found) > 0.25  # and not far below it


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("AdaLoRA", "OFT")])
def test_the_last_figures_are_those_of_the_audit(kind, base, tmp_path):
    model = KINDS[kind](make_network())
    monitor = Monitor(model, top_k=K, full=True if kind == "beside LoRA" else None)
    train(model)
    monitor.check()
    rows = audit(base, save(model, kind, tmp_path / "tuned"))
    assert len(rows) == len(monitor.figures)
    seen = {plain(name): figures for name, figures in monitor.figures.items()}
    for row in some(rows):
        figures = seen[row.name.removesuffix(".weight")]
        assert figures.undecided == 0
        assert figures.new_directions == row.new_directions
        assert figures.worst == pytest.approx(min(d.score for d in row.directions), abs=2e-2)
        assert figures.strongest * row.threshold == pytest.approx(
            row.spectral_norm_update, rel=1e-3
        )
    assert monitor.metrics()["bulkedge/new_directions"] == sum(row.new_directions for row in rows)


def plain(name):
    for part in ("base_model.model.", ".modules_to_save.default"):
        name = name.replace(part, "." if part.endswith("default") and name.endswith(part) else "")
    return name.removesuffix(".weight")


def test_the_spikes_without_a_holder_are_beyond_the_limit(base, tmp_path):
    """Or the tests above would show nothing."""
    for kind in ("linear", "embedding", "convolution", "experts", "DoRA", "several adapters"):
        model = KINDS[kind](make_network())
        train(model)
        for row in some(audit(base, save(model, kind, tmp_path / kind))):
            assert row.spectral_norm_update > row.threshold, kind


def test_a_layer_without_a_bulk_is_left_alone_with_one_note(base, tmp_path):
    model = lora(["linear", "gate"])(make_network())
    with pytest.warns(UserWarning, match="left alone: 1 layer without a bulk .*: .*gate"):
        clip = SpikeClip(model)
    assert [matrix.name for matrix in clip.matrices] == ["base_model.model.linear"]
    monitor = Monitor(model, top_k=K)
    train(model, clip)
    monitor.check()
    rows = {row.name: row for row in audit(base, save(model, "linear", tmp_path / "tuned"))}
    seen = monitor.figures["base_model.model.gate"]
    assert (seen.strongest, seen.new_directions) == (None, rows["gate.weight"].new_directions)


def test_patterns_are_those_of_the_audit():
    model = lora(["linear", "turned"], fan_in_fan_out=False)(make_network())
    chosen = [("linear", "linear"), ("linear.weight", "linear"), ("*.turned", "turned")]
    for pattern, name in chosen:
        (matrix,) = SpikeClip(model, include=pattern).matrices
        assert matrix.name == f"base_model.model.{name}"
    assert len(SpikeClip(model, exclude=["linear.weight"]).matrices) == 1


def test_one_note_names_what_is_trained_beside_and_not_held():
    model = saved_beside(make_network())
    with pytest.warns(UserWarning, match=r"1 weight is trained in full beside .* full=True"):
        clip = SpikeClip(model)
    assert len(clip.matrices) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(SpikeClip(model, full=True).matrices) == 2
        assert len(SpikeClip(model, full=False).matrices) == 1
    # PEFT keeps what it was: no copy is made
    beside = SpikeClip(model, full=True).matrices[1]
    kept = model.base_model.model.linear.original_module.weight
    assert beside.base.data_ptr() == kept.data_ptr()


def test_adapters_of_which_one_is_frozen_are_refused():
    model = several(make_network())
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.requires_grad_(False)
    with pytest.raises(InputError, match=r"linear: .* all trained, got 'other' frozen"):
        SpikeClip(model)
    assert SpikeClip(model, adapter="default").matrices[0].rank == 3


def test_adapters_that_are_switched_are_noticed():
    model = several(make_network())
    clip = SpikeClip(model)
    model.set_adapter("other")
    with pytest.raises(InputError, match="expected the adapters default, other to be active"):
        clip.step()


def test_the_sum_of_adapters_is_what_peft_computes():
    model = several(make_network())
    train(model)
    (matrix,) = SpikeClip(model).matrices
    layer = model.base_model.model.linear
    total = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    torch.testing.assert_close(matrix.update_map().to_dense(), total)
    matrix.update_map().to_dense().square().sum().backward()  # differentiable in all factors
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("target", ["linear", "kernel", "table"])
def test_the_update_of_a_dora_is_what_peft_merges(target):
    model = lora([target], use_dora=True)(make_network())
    before = model.base_model.model.get_submodule(target).get_base_layer().weight.detach().clone()
    train(model)
    (matrix,) = SpikeClip(model).matrices
    difference = matrix.difference_map().to_dense()
    merged = model.merge_and_unload().get_submodule(target).weight.detach()
    expected = merged - before
    expected = expected.T if target == "table" else expected.flatten(1)
    torch.testing.assert_close(difference, expected, atol=1e-5, rtol=1e-4)


def test_a_dora_whose_magnitude_alone_is_too_strong_is_brought_back():
    model = lora(["linear"], use_dora=True)(make_network())
    (layer,) = [m for m in model.modules() if hasattr(m, "lora_magnitude_vector")]
    clip = SpikeClip(model)
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(4)
    assert clip.step() == 1
    strongest = float(torch.linalg.matrix_norm(clip.matrices[0].difference_map().to_dense(), 2))
    assert strongest == pytest.approx(clip.limits[0], rel=1e-3)
    assert strongest <= clip.limits[0] * (1 + 1e-6)


def test_a_weight_in_full_keeps_what_does_not_exceed_the_limit():
    """Its singular values are lowered one by one, as those of a LoRA are."""
    model = in_full(make_network())
    clip = SpikeClip(model, level=0.5, include="linear")
    base = model.linear.weight.detach().clone()
    U, _, Vt = torch.linalg.svd(torch.randn(40, 30), full_matrices=False)
    sigma = clip.limits[0] * torch.linspace(3, 0.1, 30)
    with torch.no_grad():
        model.linear.weight.add_(U * sigma @ Vt)
    assert clip.step() == 1
    found = torch.linalg.svdvals(model.linear.weight.detach() - base)
    torch.testing.assert_close(found, sigma.clamp_max(clip.limits[0]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["in full", "DoRA", "experts", "several adapters"])
def test_the_stored_numbers_obey_in_half_precision(kind, dtype):
    model = KINDS[kind](make_network())
    train(model)
    model.to(dtype)
    clip = SpikeClip(model, level=0.5)
    if kind == "in full":
        with torch.no_grad():
            model.linear.weight.add_(torch.randn(40, 30).to(dtype))
    assert clip.step() > 0
    for matrix, limit in some(zip(clip.matrices, clip.limits, strict=True)):
        update = (
            matrix.difference_map() if hasattr(matrix, "difference_map") else matrix.update_map()
        )
        found = torch.linalg.matrix_norm(update.to_dense().double(), 2)
        assert float(found) <= limit * (1 + 1e-5)


def test_a_penalty_names_what_it_does_not_take():
    with pytest.raises(InputError, match="which IntruderPenalty needs, got DoRA"):
        IntruderPenalty(KINDS["DoRA"](make_network()))
