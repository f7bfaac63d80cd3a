"""What the sentence of an audit, and its gate, say where the verdicts cannot differ."""

import pytest
import torch

import bulkedge
from bulkedge.intruder import Verdict
from bulkedge.report import Gate, verdict_line
from cases import gaussian
from helpers import save

SPIKE = 60 * torch.eye(24, dtype=torch.float64)[:, :1] @ torch.eye(20, dtype=torch.float64)[:1]


@pytest.mark.parametrize(("shape", "k", "full"), [
    ((24, 20), 2, False), ((20, 24), 9, False), ((20, 24), 10, True), ((20, 24), 12, True),
    ((24, 20), 12, False),  # the left vectors have 24 entries, and the base spans 20 of them
])  # fmt: skip
def test_a_space_that_is_full_has_no_intruders_and_is_no_green_gate(shape, k, full, tmp_path):
    W0 = gaussian(*shape)
    spike = SPIKE if shape == (24, 20) else SPIKE.mT
    base = save(tmp_path / "b.safetensors", {"a.weight": W0})
    tuned = save(tmp_path / "t.safetensors", {"a.weight": W0 + spike})
    record = bulkedge.audit(base, tuned, recipe={"top_k": k})
    assert record.summary.new_directions > 0
    assert ("could not be distinguished from intruders" in verdict_line(record)) is full
    if full:
        assert record.summary.verdicts["intruder"] == 0
        assert Gate(Verdict.INTRUDER).exit_code(record) == 1
