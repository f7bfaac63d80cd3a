"""The Ray engine: what it refuses, and a cluster of two nodes of which one is killed."""

import functools
import importlib.util
import os
import sys
import types

import pytest

import bulkedge
from bulkedge import BulkedgeError, InputError, MissingExtraError, RayEngine, Recipe
from bulkedge.auditing.engine import ray as module
from bulkedge.auditing.inputs import files_of, stamps
from bulkedge.comparison import make_plan
from cases import gaussian, orthonormal
from helpers import save


@pytest.fixture
def token_off(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


def pair(tmp_path, count, size):
    base = {f"l{i}.weight": gaussian(size + i % 3, size) for i in range(count)}
    tuned = {
        name: W + 40 * orthonormal(W.shape[0], 1, 1) @ orthonormal(W.shape[1], 1, 2).mT
        for name, W in base.items()
    }
    return save(tmp_path / "b.safetensors", base), save(tmp_path / "t.safetensors", tuned)


# ---- what needs no Ray

REMOTE = [
    "auto",
    "10.0.0.7:6379",
    "ray://head.example.org:10001",
    "head:6379",
    "[2001:db8::1]:6379",
]
REMOTE += ["127.0.0.1.example.org:6379", "", "ray://127.0.0.1@10.0.0.7:10001"]


@pytest.mark.parametrize("address", REMOTE)
def test_remote_addresses_need_a_token(address, token_off):
    with pytest.raises(InputError, match=r"expected RAY_AUTH_MODE=token, since anyone who reaches"):
        RayEngine(address).check(Recipe())


@pytest.fixture
def any_ray(monkeypatch):
    """As if Ray were installed."""
    monkeypatch.setattr(module, "_import_ray", lambda: None)


@pytest.mark.parametrize(
    "address", ["local", "127.0.0.1:6379", "ray://localhost:10001", "[::1]:6379", "127.9.9.9:1"]
)
def test_loopback_needs_none(address, token_off, any_ray):
    RayEngine(address).check(Recipe())


def test_a_token_or_consent_opens_any_address(monkeypatch, any_ray):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    RayEngine("10.0.0.7:6379", insecure=True).check(Recipe())
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    RayEngine("10.0.0.7:6379").check(Recipe())


def test_numbered_devices_are_refused(any_ray):
    with pytest.raises(InputError, match=r"device 'cuda:1': a Ray cluster numbers its own"):
        RayEngine("local").check(Recipe(device="cuda:1"))


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"Ray engine needs ray, .*: .*'bulkedge\[ray\]'"):
        RayEngine("local").check(Recipe())


def test_a_task_gives_the_row_as_plain_values(tmp_path):
    plan = make_plan(*pair(tmp_path, 2, 20), Recipe())
    first = plan.comparisons[0]
    seen = stamps(files_of(first))
    problem, row = module.audit_on_node(first, Recipe(), module.versions(), seen)
    assert problem == ""
    assert type(row) is dict
    (expected, _) = bulkedge.audit(plan.base.path, plan.tuned.path).matrices
    assert type(expected).model_validate(row) == expected


def test_a_node_with_other_files_or_versions_computes_nothing(tmp_path):
    base, tuned = pair(tmp_path, 1, 20)
    (comparison,) = make_plan(base, tuned, Recipe()).comparisons
    seen, versions = stamps(files_of(comparison)), module.versions()
    problem, row = module.audit_on_node(comparison, Recipe(), versions | {"torch": "0.1"}, seen)
    assert row is None
    assert "'torch': '0.1'" in problem
    os.utime(base, ns=(1, 1))
    problem, row = module.audit_on_node(comparison, Recipe(), versions, seen)
    assert row is None
    assert f"has another {base}; let all nodes see one file system" in problem
    base.unlink()
    assert f"lacks {base}" in module.audit_on_node(comparison, Recipe(), versions, seen)[0]


class Unreachable:
    """A Ray without a cluster."""

    def is_initialized(self):
        return False

    def init(self, **_):
        raise ConnectionError("Failed to connect to Ray cluster at 127.0.0.1:9\nand so on")


def test_a_cluster_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_import_ray", Unreachable)
    message = r"address '127.0.0.1:9': no cluster to join .Failed to connect .*:9.; check address"
    with pytest.raises(InputError, match=message):
        bulkedge.audit(*pair(tmp_path, 1, 20), engine=RayEngine("127.0.0.1:9"))


class WithoutGpu(Unreachable):
    def is_initialized(self):
        return True

    def cluster_resources(self):
        return {"CPU": 4.0}


def test_a_cluster_without_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_import_ray", WithoutGpu)
    files = pair(tmp_path, 1, 20)
    with pytest.raises(InputError, match=r"device 'cuda': the Ray cluster has no GPU"):
        bulkedge.audit(*files, engine=RayEngine("local"), recipe=Recipe(device="cuda"))


class Finished:
    """A Ray whose tasks are finished as soon as they are begun."""

    exceptions = types.SimpleNamespace(RayError=ConnectionError)

    def __init__(self):
        self.looks = 0

    def is_initialized(self):
        return True

    def remote(self, **_):
        return lambda task: types.SimpleNamespace(remote=functools.partial(functools.partial, task))

    def wait(self, references, num_returns, timeout=None):
        self.looks += 1
        return references[:num_returns], references[num_returns:]

    def get(self, reference):
        return reference()


def test_many_tasks_that_are_finished_take_two_looks(tmp_path, monkeypatch):
    found = Finished()
    monkeypatch.setattr(module, "_import_ray", lambda: found)
    comparisons = make_plan(*pair(tmp_path, 6, 20), Recipe()).comparisons
    rows = list(RayEngine("local").rows(comparisons, Recipe()))
    assert sorted(position for position, _ in rows) == list(range(6))
    assert found.looks == 2


# ---- a cluster on loopback


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each; Ray would look for loopback elsewhere without the variable."""
    if importlib.util.find_spec("ray") is None:  # an import here would come before the variables
        pytest.skip("needs the extra [ray]")
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_AUTH_MODE", "disabled")
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    found = Cluster(initialize_head=True, head_node_args=node | {"node_ip_address": "127.0.0.1"})
    try:
        yield found, lambda: found.add_node(**node, node_ip_address="127.0.0.1")
    finally:
        found.shutdown()
        patch.undo()


RAY = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # Ray's own
    pytest.mark.timeout(280),
]


def applied(*marks):
    def mark(test):
        for one in marks:
            test = one(test)
        return test

    return mark


def facts(record):
    return record.model_dump(exclude={"run"})


@applied(*RAY)
def test_a_killed_nodes_matrices_are_computed_elsewhere(cluster, tmp_path):
    found, add_node = cluster
    second = add_node()
    files = pair(tmp_path, 40, 250)
    done = []

    def kill_second(name, count, total):
        done.append(count)
        if count == 6:
            found.remove_node(second, allow_graceful=False)

    record = bulkedge.audit(
        *files, engine=RayEngine(found.address), journal=tmp_path / "j", progress=kill_second
    )
    assert facts(record) == facts(bulkedge.audit(*files))
    assert (record.run.engine, record.run.jobs) == ("ray", None)
    assert done == list(range(1, 41))


@applied(*RAY)
def test_a_task_that_fails_is_told(cluster, tmp_path, monkeypatch):
    found, _ = cluster
    files = pair(tmp_path, 2, 30)
    monkeypatch.setattr(module, "versions", lambda: {"torch": "0.1"})
    with pytest.raises(BulkedgeError, match=r"on tensor 'l\d.weight' was not started: node .* has"):
        bulkedge.audit(*files, engine=RayEngine(found.address))
    monkeypatch.undo()
    monkeypatch.setattr(module, "audit_on_node", lambda *_: os._exit(3))
    monkeypatch.setattr(module, "RETRIES", 1)
    with pytest.raises(BulkedgeError, match=r"failed .WorkerCrashedError.*tried again 1 times"):
        bulkedge.audit(*files, engine=RayEngine(found.address))


@applied(*RAY)
def test_an_interrupted_audit_resumes_elsewhere(cluster, tmp_path):
    found, _ = cluster
    files = pair(tmp_path, 8, 60)
    path = tmp_path / "journal.jsonl"

    def interrupt(name, count, total):
        if count == 3:
            raise KeyboardInterrupt

    engine = RayEngine(found.address)
    with pytest.raises(KeyboardInterrupt):
        bulkedge.audit(*files, engine=engine, journal=path, progress=interrupt)
    record = bulkedge.audit(*files, journal=path, resume=True, jobs=2)
    assert record.run.resumed == 3
    assert facts(record) == facts(bulkedge.audit(*files))
