"""Worker processes of this machine: the same rows, and an end at once."""

import functools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

import bulkedge
from bulkedge import BulkedgeError, InputError, LocalEngine, RayEngine, Recipe
from bulkedge._precision import one_thread
from bulkedge.auditing import run_plan
from bulkedge.auditing.engine._order import largest_first
from bulkedge.comparison import make_plan
from bulkedge.intruder import Verdict
from cases import gaussian, orthonormal
from helpers import save, some, weights

SHAPES = [(30, 20), (40, 40), (12, 12), (35, 20)]


@pytest.fixture
def pair(tmp_path):
    base = {f"l{i}.weight": gaussian(*shape) for i, shape in enumerate(SHAPES)}
    tuned = {name: W + torch.eye(*W.shape) for name, W in base.items()}
    return save(tmp_path / "b.safetensors", base), save(tmp_path / "t.safetensors", tuned)


@pytest.fixture
def comparisons(pair):
    return make_plan(*pair, Recipe()).comparisons


def use(monkeypatch, audit):
    """Let ``audit`` take the place of ``audit_matrix``, in workers too."""
    monkeypatch.setattr("bulkedge.auditing.engine.local.audit_matrix", audit)


def no_children():
    return not multiprocessing.active_children()


def test_the_largest_goes_first(comparisons):
    assert largest_first(comparisons) == [1, 3, 0, 2]
    assert largest_first([comparisons[0]] * 3) == [0, 1, 2]


def test_nothing_to_compute_starts_no_process(monkeypatch):
    monkeypatch.setattr("multiprocessing.get_context", None)
    assert list(LocalEngine(4).rows([], Recipe())) == []


def test_jobs_below_one():
    with pytest.raises(InputError, match=r"expected jobs ≥ 1, got 0"):
        LocalEngine(0)


def threads(comparison, _):
    return comparison.base.name, torch.get_num_threads()


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_matrix_is_computed_with_one_thread(jobs, comparisons, monkeypatch):
    use(monkeypatch, threads)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = dict(LocalEngine(jobs).rows(comparisons, Recipe()))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert found == {i: (f"l{i}.weight", 1) for i in range(4)}


NEW = hasattr(torch.backends, "fp32_precision")  # from torch 2.9 on
SWITCHED = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if NEW else ()


def switches():
    """Every switch of the precision of float32 products."""
    return [module.fp32_precision for module in SWITCHED]


@pytest.fixture
def untouched_switches():
    yield
    torch.set_float32_matmul_precision("highest")
    for module in SWITCHED:
        module.fp32_precision = "none"


def lower(where, value):
    """Ask for products in less than float32, as a caller may have done long before."""
    if where == "matmul":
        torch.set_float32_matmul_precision(value)
    elif where == "allow_tf32":
        torch.backends.cuda.matmul.allow_tf32 = value
    else:
        names = filter(None, where.split("."))
        functools.reduce(getattr, names, torch.backends).fp32_precision = value


LOWERED = [
    ("matmul", "high"),
    ("matmul", "medium"),
    ("allow_tf32", True),
    ("cuda.matmul", "tf32"),
    ("mkldnn.matmul", "bf16"),
    ("", "tf32"),  # of all kinds of products
]


@pytest.mark.usefixtures("untouched_switches")
@pytest.mark.skipif(not NEW, reason="torch has the older API alone")
@pytest.mark.parametrize(("where", "value"), LOWERED)
def test_products_are_full_float32_whatever_was_asked_for(where, value):
    """TF32 on CUDA, bfloat16 on CPUs: by either API, which torch refuses to see mixed."""
    lower(where, value)
    before = switches()
    assert {"tf32", "bf16"} & set(before)
    with one_thread():
        assert switches()[1:] == ["ieee", "ieee"]
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
    assert switches() == before


@pytest.mark.usefixtures("untouched_switches")
def test_what_was_asked_for_comes_back_after_an_error():
    torch.set_float32_matmul_precision("medium")
    with pytest.raises(ZeroDivisionError), one_thread():
        _ = 1 / 0
    assert torch.get_float32_matmul_precision() == "medium"


def precision(comparison, _):
    return comparison.base.name, torch.get_float32_matmul_precision()


@pytest.mark.usefixtures("untouched_switches")
@pytest.mark.parametrize("jobs", [1, 2])
def test_workers_have_full_precision_where_the_environment_asks_for_less(
    jobs, comparisons, monkeypatch
):
    use(monkeypatch, precision)
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")  # TF32 in every new process
    torch.set_float32_matmul_precision("high")  # and in this one
    found = dict(LocalEngine(jobs).rows(comparisons, Recipe()))
    assert found == {i: (f"l{i}.weight", "highest") for i in range(4)}


OTHER_PROCESSOR = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}


def audited(pair, environment):
    """A record, computed by a process of its own."""
    command = [sys.executable, "-m", "bulkedge", "audit", *pair, "--json"]
    options = ["--side", "both", "--method", "certified", "--fail-on", "never"]
    result = subprocess.run(
        [*command, *options], capture_output=True, env=os.environ | environment, timeout=120
    )
    assert result.returncode in (0, 2), result.stderr  # 2 where a verdict stays open
    return bulkedge.Record.model_validate_json(result.stdout)


def test_what_holds_on_another_kind_of_processor(tmp_path):
    """Not digits, nor how far a certificate goes: but intervals hold, decided verdicts agree."""
    base, tuned = {}, {}
    for i, strength in enumerate((21.2, 27.9, 29.0, 42.4)):
        base[f"l{i}.weight"] = W0 = weights(210, 200, seed=i)
        left, right = orthonormal(210, 3, i).float(), orthonormal(200, 3, 9 + i).float()
        tuned[f"l{i}.weight"] = W0 + strength * left @ right.mT
    pair = save(tmp_path / "b.safetensors", base), save(tmp_path / "t.safetensors", tuned)
    here, there = audited(pair, {}), audited(pair, OTHER_PROCESSOR)
    decided = 0
    for ours, theirs in some(zip(here.matrices, there.matrices, strict=True)):
        for a, b in some(zip(ours.directions, theirs.directions, strict=True)):
            assert (a.index, a.side) == (b.index, b.side)
            assert max(a.score_lower, b.score_lower) <= min(a.score_upper, b.score_upper)
            assert max(a.overlap_lower, b.overlap_lower) <= min(a.overlap_upper, b.overlap_upper)
            if Verdict.UNDECIDED not in (a.verdict, b.verdict):
                decided += 1
                assert a.verdict is b.verdict
    assert decided > 60


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_names_the_signal_and_the_matrix(comparisons, monkeypatch):
    use(monkeypatch, killed)
    message = r"a worker process died \(signal 9\) on tensor 'l\d.weight'.*use fewer than 2 jobs"
    with pytest.raises(BulkedgeError, match=message):
        list(LocalEngine(2).rows(comparisons, Recipe()))
    assert no_children()


def interrupted(*_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


def test_a_worker_that_was_interrupted_first_is_an_interruption(comparisons, monkeypatch):
    use(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(LocalEngine(2).rows(comparisons, Recipe()))
    assert no_children()


def broken(comparison, _):
    raise ZeroDivisionError(f"in {comparison.base.name}")


def test_a_bug_in_a_worker_comes_with_its_traceback(comparisons, monkeypatch):
    use(monkeypatch, broken)
    with pytest.raises(RuntimeError, match=r"ZeroDivisionError: in l(\d).weight .tensor 'l\1") as e:
        list(LocalEngine(2).rows(comparisons, Recipe()))
    assert "in broken" in str(e.value.__cause__)
    assert no_children()


def quick_then_slow(comparison, _):
    if comparison.base.name == "l1.weight":
        return "quick"
    time.sleep(60)


def test_workers_end_at_once_when_no_more_rows_are_wanted(comparisons, monkeypatch):
    use(monkeypatch, quick_then_slow)
    rows = LocalEngine(2).rows(comparisons, Recipe())
    assert next(rows) == (1, "quick")
    start = time.monotonic()
    rows.close()
    assert time.monotonic() - start < 5
    assert no_children()


def test_an_error_of_the_caller_ends_the_workers(pair, monkeypatch):
    """Though the traceback keeps the iterator alive."""

    def fail(*_):
        raise ValueError("the caller had enough")

    with pytest.raises(ValueError, match="the caller had enough"):
        bulkedge.audit(*pair, jobs=2, progress=fail)
    assert no_children()


def test_an_engine_of_ones_own(pair):
    """The protocol is all that an audit asks for."""

    class Backwards:
        name, jobs = "backwards", None

        def check(self, recipe):
            assert recipe == Recipe()

        def rows(self, comparisons, recipe):
            found = list(LocalEngine().rows(comparisons, recipe))
            yield from reversed(found)

    record = bulkedge.audit(*pair, engine=Backwards())
    assert (record.run.engine, record.run.jobs) == ("backwards", None)
    assert record.matrices == bulkedge.audit(*pair).matrices


def test_settings_that_an_engine_would_not_use_are_refused(pair, tmp_path):
    plan = make_plan(*pair, Recipe())
    engine = RayEngine("local")
    with pytest.raises(InputError, match=r"cache='.*c': a folder of .*'ray' does not use; leave"):
        run_plan(plan, Recipe(), engine=engine, cache=str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()
    for given in (engine, LocalEngine(3)):
        with pytest.raises(InputError, match=r"jobs=2: the engine that was given has its own"):
            bulkedge.audit(*pair, jobs=2, engine=given)
    record = run_plan(plan, Recipe(), engine=LocalEngine(), cache=tmp_path / "c")
    assert record.matrices == bulkedge.audit(*pair).matrices
    assert some(list((tmp_path / "c").iterdir()))


@pytest.mark.slow
def test_a_script_without_the_guard_is_told(pair, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
            import bulkedge
            bulkedge.audit({str(pair[0])!r}, {str(pair[1])!r}, jobs=2)
        """)
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    # which of the two workers is found dead first is a matter of chance
    message = r"a worker process died \(exit code 1\) on tensor 'l\d.weight', its error is above"
    assert re.search(message, result.stderr)
    assert "does the script lack `if __name__" in result.stderr
