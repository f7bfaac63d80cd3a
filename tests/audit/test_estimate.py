"""What a dry run expects; ``benchmarks/dry_run.py`` measures the constants behind it."""

import pytest
import torch
from safetensors.torch import save_file

from bulkedge import Recipe
from bulkedge.auditing import estimate
from bulkedge.comparison import make_plan

SMALL, LARGE = (96, 64), (1100, 800)  # decomposed, and judged by products


def planned(folder, *shapes):
    base = {f"{i}.weight": torch.randn(shape) for i, shape in enumerate(shapes)}
    save_file(base, folder / "base.safetensors")
    save_file({name: W + 0.1 for name, W in base.items()}, folder / "tuned.safetensors")
    return make_plan(folder / "base.safetensors", folder / "tuned.safetensors", Recipe())


@pytest.fixture
def alike(monkeypatch):
    """A machine like the one that was measured."""
    monkeypatch.setattr(estimate, "reference_seconds", lambda: estimate.REFERENCE_SECONDS)


@pytest.mark.usefixtures("alike")
def test_times_of_matrices_add_up(tmp_path):
    alone = [estimate.core_seconds(planned(tmp_path, shape), Recipe()) for shape in (SMALL, LARGE)]
    together = estimate.core_seconds(planned(tmp_path, SMALL, LARGE), Recipe())
    assert together == pytest.approx(sum(alone))
    assert 0 < alone[0] < alone[1]


@pytest.mark.usefixtures("alike")
def test_a_measured_scale_is_some_judgements_more(tmp_path):
    plan, recipe = planned(tmp_path, LARGE), Recipe(critical_scale=True)
    once = estimate.core_seconds(plan, Recipe())
    assert estimate.core_seconds(plan, recipe) == pytest.approx(estimate.SCALES * once)


def test_a_slower_machine_takes_longer(tmp_path, monkeypatch):
    plan, found = planned(tmp_path, LARGE), []
    for slower in (1, 3):
        seconds = slower * estimate.REFERENCE_SECONDS
        monkeypatch.setattr(estimate, "reference_seconds", lambda x=seconds: x)
        found.append(estimate.core_seconds(plan, Recipe()))
    assert found[1] == pytest.approx(3 * found[0])


def test_the_reference_is_measured_on_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert 0 < estimate.reference_seconds() < 60
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_memory_is_that_of_the_largest_matrix(tmp_path):
    one, two = (estimate.peak_bytes(planned(tmp_path, *s), Recipe()) for s in ([LARGE], [SMALL]))
    assert estimate.peak_bytes(planned(tmp_path, SMALL, LARGE), Recipe()) == one > two
    assert two > estimate.PROCESS_BYTES
