"""IA³, OFT, BOFT, HRA, FourierFT and trainable tokens: scores against what stock PEFT merges."""

import copy
import json
import re
from importlib.metadata import version

import pytest
import torch
from click.testing import CliRunner

import bulkedge
from bulkedge import Recipe
from bulkedge.auditing import run_plans
from bulkedge.checkpoint import open_path
from bulkedge.cli import cli
from bulkedge.comparison import make_plan
from helpers import oracle_scores, save, some

RECIPE = {"top_k": 4, "method": "dense"}
# BOFT looks for its CUDA extension, and says that it is not there
pytestmark = [
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(20, 18)
        self.q = torch.nn.Linear(18, 30)
        self.v = torch.nn.Linear(18, 24, bias=False)
        self.head = torch.nn.Linear(24, 18)

    def forward(self, x):
        x = self.embed_tokens(x)
        return self.q(x), self.head(self.v(x))


def configs():
    import peft

    both = {"target_modules": ["q", "v"]}
    exact = {"use_cayley_neumann": False}
    tokens = {"embed_tokens": [1, 7, 5]}
    return {
        "ia3": peft.IA3Config(feedforward_modules=["v"], **both),
        "oft": peft.OFTConfig(r=0, oft_block_size=6, **both),
        "oft 3": peft.OFTConfig(r=0, oft_block_size=6, num_cayley_neumann_terms=3, **both),
        "oft 2": peft.OFTConfig(r=0, oft_block_size=6, num_cayley_neumann_terms=2, **both),
        "oft exact": peft.OFTConfig(r=2, oft_block_size=0, **exact, **both),
        "oft coft": peft.OFTConfig(r=0, oft_block_size=6, coft=True, eps=0.5, **exact, **both),
        "oft share": peft.OFTConfig(r=0, oft_block_size=6, block_share=True, **both),
        "boft": peft.BOFTConfig(boft_block_size=6, **both),
        **{
            f"boft {factors}": peft.BOFTConfig(
                boft_block_size=size, boft_n_butterfly_factor=factors, target_modules=["head"]
            )
            for factors, size in ((2, 6), (3, 2))
        },
        "hra": peft.HRAConfig(r=4, **both),
        "hra orthogonal": peft.HRAConfig(r=4, apply_GS=True, **both),
        "fourierft": peft.FourierFTConfig(n_frequency=40, random_loc_seed=3, **both),
        "trainable_tokens": peft.TrainableTokensConfig(
            token_indices=[1, 7, 5], target_modules=["embed_tokens"]
        ),
        "lora tokens": peft.LoraConfig(r=2, trainable_token_indices=tokens, **both),
        "ia3 saved": peft.IA3Config(feedforward_modules=[], modules_to_save=["head"], **both),
    }


CASES = (
    "ia3", "oft", "oft 3", "oft 2", "oft exact", "oft coft", "oft share", "boft", "boft 2",
    "boft 3", "hra", "hra orthogonal", "fourierft", "trainable_tokens", "lora tokens", "ia3 saved",
)  # fmt: skip


class BlockDiagonal:
    """What PEFT's CUDA extension for several butterfly factors computes; without it PEFT takes one.

    Permutations, Cayley transforms and products stay PEFT's own.
    """

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


@pytest.fixture(autouse=True)
def several_butterfly_factors(request, monkeypatch):
    if "boft " in request.node.name:
        monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", BlockDiagonal)


def trained(case, tmp_path):
    """A base, an adapter that stock PEFT has saved, and the weights that it merges."""
    import peft

    torch.manual_seed(1)
    base = Model()
    model = peft.get_peft_model(copy.deepcopy(base), configs()[case])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "a")
    state = {name: W.detach() for name, W in base.state_dict().items()}
    save(tmp_path / "b.safetensors", state)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    merged = loaded.merge_and_unload().state_dict()
    return tmp_path / "b.safetensors", tmp_path / "a", state, merged


def check(record, before, after):
    """The rows of a record against two float64 SVDs of PEFT's weights."""
    assert record.summary.lost == record.summary.not_audited == 0
    for row in some(record.matrices):
        name, _, part = row.name.partition("[")
        rows = slice(*map(int, part.rstrip("]").split(":"))) if part else slice(None)
        W0, W = (side[name][rows].double() for side in (before, after))
        norm = float(torch.linalg.matrix_norm(W - W0, 2))
        assert norm > 0.05  # or nothing would be tried
        assert row.spectral_norm_update == pytest.approx(norm, rel=1e-4)
        found = torch.tensor([d.score for d in row.directions], dtype=torch.float64)
        torch.testing.assert_close(found, oracle_scores(W0, W, 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_the_merged_weights(case, tmp_path):
    base, adapter, before, after = trained(case, tmp_path)
    split = {} if case == "trainable_tokens" else {"split": {"q.weight": [10, 20]}}
    record = bulkedge.audit(base, adapter, recipe=RECIPE | split)
    changed = {name for name, W in after.items() if W.ndim == 2 and not W.equal(before[name])}
    assert {row.name.partition("[")[0] for row in record.matrices} == changed
    check(record, before, after)
    kind = case.split()[0]
    if kind != "lora":
        assert record.inputs.tuned.kind == kind.replace("_", "")
        updates = {row.name: row.update for row in record.matrices}
        assert updates.pop("head.weight", kind) == ("dense" if case == "ia3 saved" else kind)
        assert set(updates.values()) <= {kind}


def test_blocks_of_tokens(tmp_path):
    base, adapter, before, after = trained("trainable_tokens", tmp_path)
    split = {"embed_tokens.weight": [6, 14]}  # of the rows 1, 5 and 7, two and one
    record = bulkedge.audit(base, adapter, recipe=RECIPE | {"split": split})
    check(record, before, after)


@pytest.mark.parametrize("case", ["ia3", "fourierft"])
def test_weights_stored_as_in_out(case, tmp_path):
    import peft
    from transformers.pytorch_utils import Conv1D

    class Turned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn, self.c_proj = Conv1D(30, 18), Conv1D(18, 18)

        def forward(self, x):
            return self.c_attn(self.c_proj(x))

    torch.manual_seed(0)
    both = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    config = {
        "ia3": lambda: peft.IA3Config(feedforward_modules=["c_proj"], **both),
        "fourierft": lambda: peft.FourierFTConfig(n_frequency=40, **both),
    }[case]()
    model = Turned()
    state = {name: W.detach().clone() for name, W in model.state_dict().items()}
    tuned = peft.get_peft_model(copy.deepcopy(model), config)
    for parameter in (p for p in tuned.parameters() if p.requires_grad):
        parameter.data += torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path / "a")
    base = save(tmp_path / "base/model.safetensors", state).parent
    (base / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    merged = tuned.merge_and_unload().state_dict()
    record = bulkedge.audit(base, tmp_path / "a", recipe=RECIPE)
    assert {(row.name, row.transposed) for row in record.matrices} == {
        ("c_attn.weight", True), ("c_proj.weight", True)
    }  # fmt: skip
    sides = ({name: W.mT for name, W in side.items() if W.ndim == 2} for side in (state, merged))
    check(record, *sides)


def test_certificates_and_several_agree_with_svds(tmp_path):
    base, adapter, _, _ = trained("oft", tmp_path)
    dense = bulkedge.audit(base, adapter, recipe=RECIPE)
    recipe = Recipe(top_k=2, method="certified")
    (first, _) = run_plans([make_plan(base, adapter, recipe) for _ in range(2)], recipe)
    for row, exact in some(zip(first.matrices, dense.matrices, strict=True)):
        for ours, other in some(zip(row.directions, exact.directions, strict=False)):
            assert ours.score_lower - 1e-4 <= other.score <= ours.score_upper + 1e-4


def test_repairs_and_budgets_refuse_by_name(tmp_path):
    base, adapter, _, _ = trained("fourierft", tmp_path)
    for method in (None, bulkedge.repairing.Rescale(uniform=0.5)):
        repaired = bulkedge.repair(base, adapter, None, recipe=RECIPE, method=method)
        notes = {m.note for m in repaired.matrices if m.status == "refused"}
        assert any("computed from the base's weight" in note for note in some(notes))
    (update, _) = open_path(adapter).factors.values()
    with pytest.raises(bulkedge.AdapterError, match="not a product of stored factors; audit it"):
        update.read()
    found = bulkedge.budget(base, like=adapter)
    assert {"no α scales it" in (row.note or "") for row in some(found.matrices)} == {True}


@pytest.mark.parametrize("kind", [[], {}, 3, None])
def test_a_method_that_is_no_word(kind, tmp_path):
    save(tmp_path / "adapter_model.safetensors", {"q.ia3_l": ONES(3, 1)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(bulkedge.AdapterError, match="peft_type: Input should be a valid string"):
        open_path(tmp_path)


def test_inspect_marks_sides_that_the_base_tells(tmp_path):
    _, adapter, _, _ = trained("oft", tmp_path)
    lines = CliRunner().invoke(cli, ["inspect", str(adapter)]).stdout.splitlines()
    assert lines[0] == "q.weight  F32  ?×18  oft"
    assert lines[-1] == f"OFT adapter by PEFT {version('peft')}: 2 layers updated"


ONES = torch.ones
BAD = {
    "kernel": ("IA3", {"q.ia3_l": ONES(1, 3, 1, 1)}, {}, "of a linear layer"),
    "older": ("OFT", {"q.oft_R": ONES(3, 4, 4)}, {}, "as PEFT 0.15 and later"),
    "terms": (
        "OFT",
        {"q.oft_R.weight": ONES(3, 6)},
        {"num_cayley_neumann_terms": 10**9},
        "up to 100",
    ),
    "eps": ("OFT", {"q.oft_R.weight": ONES(3, 6)}, {"coft": True, "eps": "x"}, "eps 'x'"),
    "shared": ("OFT", {"q.oft_R.weight": ONES(3, 6)}, {"block_share": True}, "one is shared"),
    "embedding": ("OFT", {"q.oft_embedding_R.weight": ONES(3, 6)}, {}, "not handled"),
    "butterfly": ("BOFT", {"q.boft_R": ONES(2, 2, 3, 3), "q.boft_s": ONES(3, 1)}, {}, "even"),
    "butterflies": ("BOFT", {"q.boft_R": ONES(3, 6, 2, 2), "q.boft_s": ONES(3, 1)}, {}, "power of"),
    "half": ("BOFT", {"q.boft_R": ONES(1, 2, 3, 3)}, {}, "expected boft_R, boft_s"),
    "wide": ("HRA", {"q.hra_u": ONES(2, 3)}, {}, r"expected \(in, r\)"),
    "seed": ("FOURIERFT", {"q.fourierft_spectrum": ONES(3)}, {"random_loc_seed": None}, "which fr"),
    "integers": ("IA3", {"q.ia3_l": ONES(3, 1).int()}, {}, "not a floating-point weight"),
    "tokens": ("TRAINABLE_TOKENS", {"q.trainable_tokens_delta": ONES(2, 3)}, {}, "does not name"),
    "twice": (
        "TRAINABLE_TOKENS",
        {"q.trainable_tokens_delta": ONES(2, 3)},
        {"token_indices": [4, 4]},
        "does not name as many different tokens",
    ),
    "flat": (
        "TRAINABLE_TOKENS",
        {"q.trainable_tokens_delta": ONES(2)},
        {"token_indices": [4, 5]},
        "expected rows of numbers",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_parts_that_do_not_fit_are_told(case, tmp_path):
    method, parts, settings, message = BAD[case]
    save(
        tmp_path / "adapter_model.safetensors",
        {f"base_model.model.{k}": v for k, v in parts.items()},
    )
    content = {"peft_type": method} | settings
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    opened = open_path(tmp_path)
    assert not opened.factors
    for row in some(opened.unhandled):
        assert re.search(message, row.reason)


@pytest.mark.parametrize("shape", [(30,), (3, 30, 18)])
def test_a_base_whose_weight_is_no_matrix(shape, tmp_path):
    named = {"q.fourierft_spectrum": ONES(4), "v.ia3_l": ONES(4, 1)}
    tensors = {f"base_model.model.{name}": tensor for name, tensor in named.items()}
    save(tmp_path / "a/adapter_model.safetensors", tensors)
    (tmp_path / "a/adapter_config.json").write_text(json.dumps({"peft_type": "FOURIERFT"}))
    base = save(tmp_path / "b.safetensors", {"q.weight": ONES(shape), "v.weight": ONES(4, 4)})
    refused = bulkedge.NothingAuditedError, bulkedge.AdapterError
    with pytest.raises(refused, match=r"nothing to audit in|was trained for another base"):
        bulkedge.audit(base, tmp_path / "a", recipe=RECIPE)


def test_tokens_that_the_base_lacks(tmp_path):
    rows = {"base_model.model.embed_tokens.trainable_tokens_delta": ONES(2, 18)}
    save(tmp_path / "a/adapter_model.safetensors", rows)
    content = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [3, 20]}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(content))
    base = save(tmp_path / "b.safetensors", {"embed_tokens.weight": torch.randn(20, 18)})
    (row,) = bulkedge.audit(base, tmp_path / "a", recipe=RECIPE).matrices
    assert row.status == "failed"
    assert (
        "replaces row 20, where the base has 20; give the base with the trained vocabulary"
        in row.note
    )
