"""Matrices over two processes: the same triplets and verdicts as those of the whole matrix."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from bulkedge.intruder import certify
from bulkedge.triplet import GolubKahan, singular_triplet
from bulkedge.triplet.solver._start import seeded_by
from helpers import some

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
SHAPES = [(60, 40), (61, 40), (40, 63), (3, 50)]


def draw(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def in_two(work, tmp_path):
    """Run ``work(rank)`` in two processes of a gloo group."""
    mp.spawn(_entry, args=(work, str(tmp_path / "meet")), nprocs=2, join=True)


def _entry(rank, work, meeting):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        work(rank)
    finally:
        dist.destroy_process_group()


def compare_triplets(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from bulkedge.tune.sharded import sharded_map

    mesh = init_device_mesh("cpu", (2,))
    for m, n in SHAPES:
        W = draw(m, n).double()
        for placement in (Shard(0), Shard(1), Replicate()):
            A = sharded_map(distribute_tensor(W, mesh, [placement]))
            assert A.shape == (m, n)
            X, Y = draw(n, 3, 1).double(), draw(m, 3, 2).double()
            torch.testing.assert_close(A.matmat(X), W @ X)
            torch.testing.assert_close(A.rmatmat(Y), W.mT @ Y)
            torch.testing.assert_close(A.to_dense(), W)
            assert A.norm_bound() == pytest.approx(float(W.norm()))
            k = min(2, m, n)
            for solver in (None, GolubKahan(vector_tol=1e-4)):
                options = {} if solver is None else {"solver": solver}
                found, whole = (singular_triplet(x, k, **options) for x in (A, W))
                torch.testing.assert_close(found.sigma, whole.sigma)
                cosines = (found.u * whole.u).sum(dim=0).abs()
                torch.testing.assert_close(cosines, torch.ones(k).double(), rtol=0, atol=1e-6)


def compare_verdicts(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from bulkedge.tune.sharded import sharded_map

    W0, y = draw(151, 120), draw(151, 2, 1)
    Y = torch.linalg.qr(torch.cat([y[:, :1], torch.linalg.svd(W0).U[:, :1]], dim=1)).Q
    mesh = init_device_mesh("cpu", (2,))
    shared = sharded_map(distribute_tensor(W0, mesh, [Shard(0)]))
    found, whole = (certify(A, Y, generator=torch.Generator().manual_seed(0)) for A in (shared, W0))
    assert found.verdicts == whole.verdicts
    torch.testing.assert_close(found.score, whole.score, rtol=0, atol=1e-3)
    for A in (shared, 2.0 * shared.T, shared + shared):  # all processes draw the same vectors
        drawn = torch.from_numpy(seeded_by(A).standard_normal(4))
        others = [torch.empty_like(drawn) for _ in range(2)]
        torch.distributed.all_gather(others, drawn)
        assert torch.equal(*others)


def with_outliers():
    """A base whose leading vectors stand apart: their scores do not hang on rounding."""
    outliers = torch.linspace(40.0, 20.0, 12)
    left, right = (torch.linalg.qr(draw(size, 12, size)).Q for size in (151, 120))
    return draw(151, 120) / (151**0.5 + 120**0.5) + left * outliers @ right.mT


def monitor_fully_sharded(rank):
    """FSDP2 keeps weights and factors as parts; the figures are those of one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from bulkedge.tune import Monitor

    peft = pytest.importorskip("peft")
    figures = []
    for shard in (False, True):
        torch.manual_seed(0)
        linear = nn.Linear(120, 151, bias=False)
        linear.weight.data.copy_(with_outliers())
        config = peft.LoraConfig(r=2, lora_alpha=40, target_modules=["0"])
        model = peft.get_peft_model(nn.Sequential(linear), config)
        layer = model.base_model.model[0]
        nn.init.normal_(layer.lora_B["default"].weight)
        if shard:
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        monitor = Monitor(model, every=1, per_call=1, top_k=4, thresholds={
            "base_model.model.0": 1.0
        })  # fmt: skip
        monitor.step()
        figures.append(monitor.metrics())
    for name, value in some(figures[0].items()):
        # parts are judged by products, a small whole by its SVD, which leaves fewer verdicts open
        if name not in (
            "bulkedge/overhead",
            "bulkedge/check_seconds",
            "bulkedge/undecided",
            "bulkedge/lowest_score",
        ):
            assert figures[1][name] == pytest.approx(value, rel=1e-3), name
    # products say of a score no more than that it is below ε
    worst = [found["bulkedge/lowest_score"] for found in figures]
    assert max(worst) < 0.5
    assert abs(worst[0] - worst[1]) < 0.1


def hold_fully_sharded(rank):
    """Holders that were built before the model was spread, and factors of which a part is empty."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from bulkedge.tune import OrthonormalFactors, RankController, SpikeClip

    peft = pytest.importorskip("peft")
    name, limit = "base_model.model.0", 0.3
    known = {"level": 1.0, "thresholds": {name: limit}}
    for kind in (SpikeClip, RankController, OrthonormalFactors):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=1, lora_alpha=2, target_modules=["0"])
        model = peft.get_peft_model(nn.Sequential(nn.Linear(40, 50, bias=False)), config)
        holder = kind(model) if kind is OrthonormalFactors else kind(model, **known)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        trained = [x for x in model.parameters() if x.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1.0)
        holder.attach(optimizer)
        for _ in range(3):
            (-model(torch.ones(4, 40)).sum()).backward()
            optimizer.step()
            layer = model.base_model.model[0]
            A, B = (x["default"].weight.full_tensor() for x in (layer.lora_A, layer.lora_B))
            norm = float(torch.linalg.matrix_norm(2 * (B @ A).detach().double(), 2))
            assert norm == pytest.approx(2.0 if kind is OrthonormalFactors else limit, rel=1e-6)


def everything(rank):
    """One after the other: two processes for each would import torch as often."""
    for work in (compare_triplets, compare_verdicts, monitor_fully_sharded, hold_fully_sharded):
        work(rank)


def test_two_processes(tmp_path):
    in_two(everything, tmp_path)
