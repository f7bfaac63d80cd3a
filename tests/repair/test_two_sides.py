"""Fine-tunes protected on both sides, from files to files, against the dense equation."""

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

import bulkedge
from bulkedge import InputError
from bulkedge._linmap import LowRank
from bulkedge.cli import cli
from bulkedge.moments import Moments
from bulkedge.repairing import Protect, Sides
from bulkedge.repairing.solve import protected
from helpers import save, save_adapter, some

RIDGE, STRENGTH = 0.05, 0.8
TWO = {"strength": STRENGTH, "ridge": RIDGE, "sides": "two"}
LAYERS = ("q", "k", "down")
PREFIX = "base_model.model."


class Net(nn.Module):
    """Two layers with one input, one on top of them, and an embedding below."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(30, 8)
        self.q, self.k, self.down = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, ids):
        x = self.words(ids)
        return self.down(torch.tanh(self.q(x)) * self.k(x))


def measured(model, seed, *, curvatures=True, **settings):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 30, (60, 5), generator=generator)
    with Moments(model, curvatures=curvatures, **settings) as moments:
        ((1 + seed) * model(ids).square()).sum().backward()
    return moments


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Base, adapter, full fine-tune, and moments of both texts."""
    folder, model = tmp_path_factory.mktemp("case"), Net()
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    base = save(folder / "base.safetensors", weights)
    shapes = {name: weights[f"{name}.weight"].shape for name in LAYERS}
    tensors = {}
    for seed, (name, (m, n)) in enumerate(shapes.items()):
        tensors[f"{PREFIX}{name}.lora_A.weight"] = draw(2, n, seed=seed)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = draw(m, 2, seed=9 + seed)
    tensors[f"{PREFIX}down.lora_B.weight"][:, 1] = 0  # a lower rank than its columns
    tensors[f"{PREFIX}words.lora_embedding_A"] = draw(2, 30, seed=7)
    tensors[f"{PREFIX}words.lora_embedding_B"] = draw(8, 2, seed=8)
    changed = {f"{n}.weight": weights[f"{n}.weight"] + draw(*shapes[n], seed=3) for n in LAYERS}
    full = save(folder / "full.safetensors", weights | changed)
    adapter = save_adapter(folder / "adapter", tensors, lora_alpha=6)
    return model, base, adapter, full, (measured(model, 1), measured(model, 2))


def scaled(C):
    C = C.double()
    return C / C.diagonal().mean() + RIDGE * torch.eye(len(C), dtype=C.dtype)


def means(moments):
    known = [x.curvature for x in moments.layers.values() if x.curvature is not None]
    return sum(float(G.diagonal().mean()) for G in known) / len(known)


def parts(both, name):
    """The four matrices of a layer, and what λ is multiplied with, from their definition."""
    b, t = (moments[name] for moments in both)
    unit = means(both[1]) / means(both[0])
    for one, other in ((b.moment, t.moment), (b.curvature, t.curvature)):
        unit *= float(one.diagonal().mean() / other.diagonal().mean())
    return [scaled(C) for C in (b.moment, t.moment, b.curvature, t.curvature)], unit


def test_a_full_fine_tune_solves_the_equation(case, tmp_path):
    _, base, _, full, both = case
    method = Protect(*both, **TWO)
    record = bulkedge.repair(base, full, tmp_path / "out", method=method)
    assert (record.method["sides"], record.method["ridge"]) == ("two", RIDGE)
    W0, W, now = (load_file(x) for x in (base, full, tmp_path / "out" / full.name))
    for name in LAYERS:
        (C_b, C_t, G_b, G_t), unit = parts(both, name)
        update = (W[f"{name}.weight"] - W0[f"{name}.weight"]).double()
        system = torch.kron(G_t, C_t) + STRENGTH * unit * torch.kron(G_b, C_b)
        right = (G_t @ update @ C_t).flatten()
        expected = torch.linalg.solve(system, right).reshape(update.shape)
        found = (now[f"{name}.weight"] - W0[f"{name}.weight"]).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        row = next(x for x in record.matrices if x.name == f"{name}.weight")
        assert row.strength == pytest.approx(STRENGTH * unit)
        assert row.note is None


def test_an_adapter_gets_both_factors_and_an_embedding_one(case, tmp_path):
    _, base, adapter, _, both = case
    out = tmp_path / "out"
    record = bulkedge.repair(base, adapter, out, method=Protect(*both, **TWO))
    before, now = (load_file(x / "adapter_model.safetensors") for x in (adapter, out))
    config = "adapter_config.json"
    assert (out / config).read_bytes() == (adapter / config).read_bytes()
    for name in LAYERS:
        B, A = (before[f"{PREFIX}{name}.lora_{x}.weight"] for x in "BA")
        inputs, outputs = ([getattr(m[name], x) for m in both] for x in ("moment", "curvature"))
        layer = Sides.of(tuple(inputs), tuple(outputs), RIDGE)
        strength = STRENGTH * means(both[1]) / means(both[0])
        expected = layer.solved(LowRank(B, A, 3.0), strength).to_dense()
        B, A = (now[f"{PREFIX}{name}.lora_{x}.weight"].double() for x in "BA")
        assert B.shape[1] == len(A) == 2
        torch.testing.assert_close(3 * B @ A, expected, rtol=1e-5, atol=1e-5)
    names = [f"{PREFIX}words.lora_embedding_{x}" for x in "AB"]
    assert [torch.equal(before[n], now[n]) for n in names] == [False, True]
    notes = {row.name: row.note for row in some(record.matrices)}
    assert notes.pop("words.weight") == (
        "protected by its inputs alone: no curvatures of its outputs were collected"
    )
    assert set(notes.values()) == {None}
    assert all(row.rank_after == row.rank_before for row in record.matrices)


def test_layers_without_curvatures_are_protected_by_their_inputs(case, tmp_path):
    model, base, adapter, *_ = case
    both = [measured(model, seed, exact_width=4, rank=8) for seed in (1, 2)]
    assert [both[0][name].curvature is None for name in LAYERS] == [True, True, False]
    bulkedge.repair(
        base, adapter, tmp_path / "out", method=Protect(*both, balance="layer", sides="two")
    )
    before, now = (load_file(x / "adapter_model.safetensors") for x in (adapter, tmp_path / "out"))
    A, B = (f"{PREFIX}q.lora_{x}.weight" for x in "AB")
    expected = protected(before[A], both[0]["q"].moment, both[1]["q"].moment, 1.0)
    torch.testing.assert_close(now[A], expected.float())
    assert torch.equal(now[B], before[B])
    assert not torch.equal(
        now[f"{PREFIX}down.lora_B.weight"], before[f"{PREFIX}down.lora_B.weight"]
    )


def test_sketches_are_protected_by_their_inputs(case, tmp_path):
    _, base, adapter, _, (one, other) = case
    method = Protect(one.sketched(3), other.sketched(3), sides="two")
    record = bulkedge.repair(base, adapter, tmp_path / "out", method=method)
    notes = {row.name: row.note for row in record.matrices}
    assert all("two sides do not work with sketches" in notes[f"{name}.weight"] for name in LAYERS)


def test_two_sides_that_make_no_sense_are_refused(case):
    model, *_, (base, task) = case
    plain = measured(model, 2, curvatures=False)
    Protect(base, task, sides="two", balance="layer")
    for settings in ({"target_drift": 0.1}, {"balance": "drift"}):
        with pytest.raises(InputError, match="drift does not show what they keep"):
            Protect(base, task, sides="two", **settings)
    for others in (plain, None):
        with pytest.raises(InputError, match="expected curvatures in both moments for two sides"):
            Protect(base, others, sides="two")
    with pytest.raises(InputError, match='expected sides to be "one" or "two", got \'both\''):
        Protect(base, task, sides="both")
    for ridge in (0.0, -1):
        with pytest.raises(InputError, match="expected ridge to be positive and finite, got"):
            Protect(base, task, ridge=ridge)


def test_layers_with_one_input_share_what_is_made_of_it(case, tmp_path, monkeypatch):
    _, base, adapter, _, both = case
    calls, found = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda C: calls.append(len(C)) or found(C))
    for sides, sizes in (("one", [6, 8]), ("two", [4, 6, 6, 6, 8])):  # of both embeddings none
        calls.clear()
        bulkedge.repair(base, adapter, tmp_path / sides, method=Protect(*both, sides=sides))
        assert sorted(calls) == sizes


def test_few_gradients_are_in_doubt(case, tmp_path):
    model, base, adapter, _, (_, task) = case
    with Moments(model, curvatures=True) as few:
        model(torch.arange(3)[None]).sum().backward()
        with torch.no_grad():
            model(torch.arange(30)[None])
    record = bulkedge.repair(
        base, adapter, tmp_path / "out", method=Protect(few, task, sides="two")
    )
    notes = {row.name: row.note for row in record.matrices}
    assert notes["q.weight"].startswith("the base curvatures have 3 gradients for a width of 6")


def test_the_command_takes_both_sides_from_files(case, tmp_path):
    _, base, adapter, _, both = case
    files = [tmp_path / "base.moments", tmp_path / "task.moments"]
    for moments, file in zip(both, files, strict=True):
        moments.save(file)
    thin = tmp_path / "plain.moments"
    measured(Net(), 2, curvatures=False).save(thin)

    def run(task, *options):
        command = ["repair", base, adapter, "--method", "protect", "--moments", files[0],
                   "--task-moments", task, "-k", "1", "-q", *options]  # fmt: skip
        return CliRunner().invoke(cli, list(map(str, command)))

    out = tmp_path / "out"
    done = run(files[1], "-o", out, "--sides", "two", "--ridge", RIDGE, "--strength", STRENGTH)
    assert done.exit_code == 0, done.output
    bulkedge.repair(
        base,
        adapter,
        tmp_path / "in",
        method=Protect(*both, **TWO),
    )
    one, other = (load_file(x / "adapter_model.safetensors") for x in (out, tmp_path / "in"))
    for name, value in some(one.items()):
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-4)
    refused = run(thin, "--dry-run", "--sides", "two")
    assert "expected curvatures in both moments" in str(refused.exception)
