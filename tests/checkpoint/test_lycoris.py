"""LoRA, LoHa, LoKr and full differences without a configuration: against LyCORIS itself."""

import pytest
import torch
from click.testing import CliRunner

import bulkedge
from bulkedge import Recipe
from bulkedge.checkpoint import open_path
from bulkedge.cli import cli
from bulkedge.comparison import make_plan
from bulkedge.comparison.pair import load
from helpers import oracle_scores, save, some, weights

RECIPE = {"top_k": 4, "method": "dense"}
CPU = torch.device("cpu")
ALGORITHMS = {
    "lora": ("lora", {}),
    "loha": ("loha", {}),
    "lokr": ("lokr", {"factor": 3}),
    "lokr both": ("lokr", {"factor": 3, "decompose_both": True}),
    "lokr whole": ("lokr", {"factor": 3, "full_matrix": True}),
    "full": ("full", {}),
}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(18, 30)
        self.conv = torch.nn.Conv2d(6, 9, 3)


def columns(model):
    """The weights that a model computes with: what it makes of each unit input.

    LyCORIS's own merge is no judge: it takes the scale of LoHa and LoKr twice (4.1.3).
    """
    units = torch.eye(54).reshape(54, 6, 3, 3)
    found = {
        "q.weight": model.q(torch.eye(18)) - model.q(torch.zeros(1, 18)),
        "conv.weight": (model.conv(units) - model.conv(torch.zeros(1, 6, 3, 3))).flatten(1),
    }
    return {name: W.detach().mT.double() for name, W in found.items()}


@pytest.mark.parametrize("case", ALGORITHMS)
@pytest.mark.filterwarnings("ignore")
def test_scores_are_those_of_the_weights_that_lycoris_trains(case, tmp_path):
    import lycoris

    algorithm, more = ALGORITHMS[case]
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Model", "Linear", "Conv2d"]})
    torch.manual_seed(1)
    model = Model()
    before = {name: W.detach().clone() for name, W in model.state_dict().items()}
    sizes = {"linear_dim": 2, "linear_alpha": 3, "conv_dim": 2, "conv_alpha": 3}
    network = lycoris.create_lycoris(model, 1.0, algo=algorithm, **sizes, **more)
    network.apply_to()
    for parameter in network.parameters():
        parameter.data += torch.randn_like(parameter)
    stored = {name: W.detach().clone() for name, W in network.state_dict().items()}
    after = columns(model)
    base = save(tmp_path / "base.safetensors", before)
    record = bulkedge.audit(base, save(tmp_path / "l.safetensors", stored), recipe=RECIPE)
    assert record.summary.lost == 0
    assert {row.name for row in record.matrices} == {"q.weight", "conv.weight"}
    for row in some(record.matrices):
        W0, W = before[row.name].flatten(1).double(), after[row.name]
        norm = float(torch.linalg.matrix_norm(W - W0, 2))
        assert norm > 0.1  # or nothing would be tried
        assert row.spectral_norm_update == pytest.approx(norm, rel=1e-4)
        found = torch.tensor([d.score for d in row.directions], dtype=torch.float64)
        torch.testing.assert_close(found, oracle_scores(W0, W, 4), atol=1e-4, rtol=0)
        assert row.update == record.inputs.tuned.kind == algorithm


def loha(module, rows=6, columns=5, **more):
    shapes = {"w1_a": (rows, 2), "w1_b": (2, columns), "w2_a": (rows, 2), "w2_b": (2, columns)}
    parts = {f"hada_{name}": weights(*shape, seed=len(name)) for name, shape in shapes.items()}
    return {f"{module}.{name}": W for name, W in (parts | more).items()}


BASE = {"blocks.0.attn_q.weight": weights(6, 5), "blocks.1.attn_q.weight": weights(6, 5, seed=1)}


@pytest.mark.parametrize(
    "prefix", ["lora_unet_blocks_0_", "lycoris_blocks_0_", "blocks.0.", "x.blocks.0."]
)
def test_names_by_kohyas_scripts_and_others(prefix, tmp_path):
    base = save(tmp_path / "b.safetensors", BASE)
    tensors = loha(f"{prefix}attn_q", alpha=torch.tensor(3.0))
    (comparison,) = make_plan(base, save(tmp_path / "t.safetensors", tensors), Recipe()).comparisons
    t = {name.rpartition(".")[2]: W.double() for name, W in tensors.items()}
    update = 1.5 * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    assert comparison.base.name == "blocks.0.attn_q.weight"
    torch.testing.assert_close(load(comparison, CPU).low_rank.to_dense(), update)


def test_what_cannot_be_read_is_lost_by_name(tmp_path):
    bad = {
        "no_alpha": (loha("lycoris_blocks_0_attn_q"), "no alpha beside it"),
        "nan": (
            loha("lycoris_blocks_0_attn_q", alpha=torch.tensor(float("nan"))),
            "alpha and rank",
        ),
        "shape": (loha("lycoris_blocks_0_attn_q", alpha=torch.ones(2)), "expected one number"),
        "half": ({"lycoris_blocks_0_attn_q.hada_w1_a": weights(6, 2)}, "do not fit together"),
        "dora": (
            loha("lycoris_blocks_0_attn_q", alpha=torch.tensor(1.0), dora_scale=weights(1, 5)),
            "another tensor of this layer",
        ),
    }
    for name, (tensors, message) in bad.items():
        opened = open_path(save(tmp_path / f"{name}.safetensors", tensors))
        assert not opened.factors
        assert any(message in row.reason for row in opened.unhandled), name


def test_a_model_with_a_weight_called_diff_is_a_model(tmp_path):
    model = save(tmp_path / "m.safetensors", BASE | {"norm.diff": weights(6, 5)})
    assert len(open_path(model).tensors) == 3


def test_inspect_names_the_method(tmp_path):
    for parts, line in (
        (
            loha("lycoris_q", alpha=torch.tensor(3.0)),
            "LoHa adapter in LyCORIS's names: 1 layer updated",
        ),
        ({"lycoris_q.diff": weights(6, 5)}, "full adapter in LyCORIS's names: 1 layer updated"),
    ):
        done = CliRunner().invoke(cli, ["inspect", str(save(tmp_path / "t.safetensors", parts))])
        assert done.stdout.splitlines()[-1] == line
