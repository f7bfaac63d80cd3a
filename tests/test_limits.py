"""Guards at their very limits: one step beyond is refused, one step within is not."""

import json
import math
import struct

import numpy as np
import pytest
import torch

import bulkedge
from bulkedge import CheckpointError, InputError, OutputError, Recipe
from bulkedge.checkpoint.header import read_header
from bulkedge.comparison import make_plan
from bulkedge.comparison.pair import load
from bulkedge.report import to_markdown
from bulkedge.rmt import TracyWidom, edge_test, fit_bulk
from bulkedge.tune import AdaptedMatrix, SpikeClip, hold_update
from bulkedge.update._update_svd import update_svd
from helpers import save, weights

# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", range(1, 10))
def test_a_header_may_not_reach_past_the_end_of_the_file(more, tmp_path):
    """The eight bytes of its own length do not count."""
    text = b"{}" + b" " * 20
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text) + more) + text)
    with pytest.raises(CheckpointError, match=r"30 bytes, truncated or not safetensors"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("shape", [(6,), ()])
def test_fp8_vectors_have_no_blocks(shape, tmp_path):
    """Scales beside a vector, which has no rows and columns, are no reason to stumble."""
    tensors = {
        "norm.weight": torch.ones(shape).to(torch.float8_e4m3fn),
        "norm.weight_scale_inv": torch.ones(1),
        "q.weight": weights(6, 6),
    }
    base = save(tmp_path / "base.safetensors", tensors)
    tuned = save(tmp_path / "tuned.safetensors", tensors | {"q.weight": weights(6, 6, seed=1)})
    assert [c.base.name for c in make_plan(base, tuned, Recipe()).comparisons] == ["q.weight"]


@pytest.mark.parametrize("size", [[0, 3], [3, 0], [-1, 3], [True, 3], [3], [3, 3, 3], "3", None])
def test_a_block_size_that_is_none_is_the_default(size, tmp_path):
    def folder(name, seed, **config):
        packed = weights(6, 6, seed=seed).to(torch.float8_e4m3fn)
        tensors = {"q.weight": packed, "q.weight_scale_inv": torch.full((1, 1), 0.5)}
        save(tmp_path / name / "model.safetensors", tensors)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return tmp_path / name, packed.float() / 2

    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": size}}
    (base, W0), (tuned, W) = folder("b", 0, **config), folder("t", 1, **config)
    (comparison,) = make_plan(base, tuned, Recipe()).comparisons
    pair = load(comparison, torch.device("cpu"))
    assert torch.equal(pair.base, W0)
    assert torch.equal(pair.replaced, W)


# --- numbers ----------------------------------------------------------------------------------


def test_a_weak_direction_of_an_update_is_a_direction():
    """Down to the rounding of the factors, and no further."""
    U, V = (torch.linalg.qr(weights(n, 3, seed=n, dtype=torch.float64)).Q for n in (40, 30))
    for weakest, rank in ((1e-12, 3), (1e-17, 2)):
        strengths = torch.tensor([1.0, 1e-6, weakest], dtype=torch.float64)
        assert update_svd(U * strengths, V.mT, 1.0, (40, 30)).rank == rank


def test_the_error_of_a_fitted_sigma_widens_the_law_by_as_much_as_in_draws():
    shape, count = (40, 30), 800
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    values = torch.linalg.svdvals(noise)
    fitted = torch.tensor([fit_bulk(row, shape).sigma for row in values], dtype=torch.float64)
    largest = values[:, 0].square()
    a, b = (math.sqrt(size - 0.5) for size in shape)
    centre, scale = (a + b) ** 2, (a + b) * (1 / a + 1 / b) ** (1 / 3)
    more = float(((largest / fitted**2).var() - largest.var()) / scale**2)
    x = np.array([1.0, 2.0, 3.0])
    at = np.sqrt(centre + scale * x)
    found = edge_test(at, shape, sigma=1.0, fitted=True) - edge_test(at, shape, sigma=1.0)
    law = TracyWidom()
    curvature = (law.sf(x + 0.1) - 2 * law.sf(x) + law.sf(x - 0.1)) / 0.01
    np.testing.assert_allclose(found, more * curvature / 2, rtol=0.35)


# --- thresholds, reports, journals ------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
def test_an_update_is_not_held_at_a_threshold_that_is_none(threshold):
    module = torch.nn.Linear(30, 20)
    with pytest.raises(InputError, match="expected threshold to be positive and finite, got"):
        hold_update(module, threshold=threshold)
    matrix = AdaptedMatrix("layer", module.weight.detach(), weights(2, 30), weights(20, 2))
    with pytest.raises(InputError, match="expected the threshold of layer to be positive"):
        SpikeClip([matrix], thresholds={"layer": threshold})


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_long_summary_says_how_much_it_leaves_out(limit, tmp_path, monkeypatch):
    base = {f"l{i}.weight": weights(60, 50, seed=i) for i in range(2)}
    tuned = {
        name: W + 20 * weights(60, 1, seed=8) @ weights(1, 50, seed=9) for name, W in base.items()
    }
    files = [save(tmp_path / f"{i}.safetensors", x) for i, x in enumerate((base, tuned))]
    record = bulkedge.audit(*files)
    assert sum(bool(matrix.new_directions) for matrix in record.matrices) == 2
    monkeypatch.setattr("bulkedge.report.markdown.MOST_ROWS", limit)
    page = to_markdown(record)
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + min(limit, 2)  # with a head and a rule
    assert ("… and 1 more" in page) is (limit == 1)


def test_a_journal_of_absurd_size_is_not_read(tmp_path, monkeypatch):
    files = [save(tmp_path / f"{i}.safetensors", {"w": weights(9, 8, seed=i)}) for i in range(2)]
    journal = tmp_path / "journal.jsonl"
    bulkedge.audit(*files, journal=journal)
    size = journal.stat().st_size
    for limit in (size, size - 1):
        monkeypatch.setattr("bulkedge.auditing.journal.MAX_RECORD_BYTES", limit)
        if limit == size:
            bulkedge.audit(*files, journal=journal, resume=True)
        else:
            with pytest.raises(OutputError, match=f"expected at most {limit} of a journal"):
                bulkedge.audit(*files, journal=journal, resume=True)
