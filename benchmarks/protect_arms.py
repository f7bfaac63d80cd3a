"""What can be done to an update after training: one function a method, layer by layer.

Each takes a :class:`Layer` and returns the new update, dense.  Those that need files or gradients
(``bulkedge.repair``'s other methods, PEFT's function, training again) take the adapter.
"""

from __future__ import annotations

import random
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora.intruders import reduce_intruder_dimension
from protect_adapters import BASE, BATCH, Adapter, example, glosses
from protect_model import Bench, Tuned, Update
from torch import Tensor
from transformers import AutoTokenizer

import bulkedge
from bulkedge.rmt import fit_bulk

RIDGE = 0.03
"""As documented: part of the mean diagonal of a moment that is added to it."""
REPLAY_STEPS = 50
"""A tenth of the training."""


@dataclass(frozen=True)
class Layer:
    """A layer: its name, base weight, update, and the moments of both texts, ``E[x xᵀ]``."""

    name: str
    W0: Tensor
    update: Update
    base_moment: Tensor
    task_moment: Tensor

    @cached_property
    def spikes(self) -> tuple[Tensor, Tensor, Tensor]:
        """The singular triplets of the update."""
        U, S, Vh = torch.linalg.svd(self.update.dense, full_matrices=False)
        return U, S, Vh

    @cached_property
    def threshold(self) -> float:
        """θ_c: the strength from which on a generic spike makes an outlier of the base."""
        values = torch.linalg.svdvals(self.W0.double())
        return float(fit_bulk(values, tuple(self.W0.shape)).bulk.threshold)


Arm = Callable[[Layer, float], Tensor]


def scaled(layer: Layer, scale: float) -> Tensor:
    """The whole update times one number (WiSE-FT, arXiv:2109.01903)."""
    return scale * layer.update.dense


def protected(layer: Layer, strength: float, ridge: float = RIDGE) -> Tensor:
    """``ΔW C_t (C_t + λ C_b)⁻¹`` as in docs/protect.md, densely.

    Written anew here, so that the figures do not depend on the code that they judge; the cells of
    the plan ``files`` say how far what ``bulkedge.repair`` writes is from it.
    """
    return _protected(layer, strength, layer.base_moment, layer.task_moment, ridge)


def without_task_moments(layer: Layer, strength: float) -> Tensor:
    """The same where every direction counts alike for the task."""
    alike = mean(layer.base_moment) * torch.eye(layer.W0.shape[1])
    return _protected(layer, strength, layer.base_moment, alike)


def by_sketches(layer: Layer, strength: float, rank: int) -> Tensor:
    """The same of both moments' leading eigenvectors and the diagonal of the rest."""
    moments = (_sketched(C, rank) for C in (layer.base_moment, layer.task_moment))
    return _protected(layer, strength, *moments)


def _sketched(C: Tensor, rank: int) -> Tensor:
    """What a sketch of a rank keeps of a moment."""
    values, Q = torch.linalg.eigh(C.double())
    kept = Q[:, -rank:] * values[-rank:] @ Q[:, -rank:].mT
    return kept + torch.diag((C.double() - kept).diagonal())


def _protected(
    layer: Layer, strength: float, base: Tensor, task: Tensor, ridge: float = RIDGE
) -> Tensor:
    C_b, C_t = (with_ridge(C, ridge) for C in (base, task))
    exchange = mean(base) / mean(task)  # one λ for the whole model
    A = torch.linalg.solve(C_t + strength * exchange * C_b, C_t @ layer.update.A.double().mT).mT
    return Update(layer.update.B, A.float(), layer.update.scale).dense  # as it is stored


def with_ridge(C: Tensor, ridge: float = RIDGE) -> Tensor:
    """Mean diagonal 1, and the documented ridge."""
    return C.double() / mean(C) + ridge * torch.eye(len(C)).double()


def mean(C: Tensor) -> float:
    """Of the diagonal."""
    return float(C.double().diagonal().mean())


def budget(layer: Layer, level: float) -> Tensor:
    """The layer's update scaled down until its norm is ``level · θ_c``."""
    _, S, _ = layer.spikes
    return min(1.0, level * layer.threshold / float(S[0])) * layer.update.dense


def cut(layer: Layer, level: float) -> Tensor:
    """Singular values of the update cut at ``level · θ_c``."""
    U, S, Vh = layer.spikes
    return U * S.clamp_max(level * layer.threshold) @ Vh


def trimmed(layer: Layer, share: float) -> Tensor:
    """The largest entries of the update alone (TIES, arXiv:2306.01708)."""
    D = layer.update.dense
    least = D.abs().flatten().kthvalue(round((1 - share) * D.numel())).values
    return D * (D.abs() > least)


def dropped(layer: Layer, share: float) -> Tensor:
    """Random entries dropped, the others scaled up (DARE, arXiv:2311.03099)."""
    generator = torch.Generator().manual_seed(zlib.crc32(layer.name.encode()))
    D = layer.update.dense
    return D * (torch.rand(D.shape, generator=generator) >= share) / (1 - share)


def off_leading(layer: Layer, k: float) -> Tensor:
    """The update off the base's k leading singular vectors on both sides.

    These are the projections of OPLoRA (arXiv:2510.13003), applied after training.
    """
    U, _, Vh = torch.linalg.svd(layer.W0.double(), full_matrices=False)
    U, Vh, D = U[:, : int(k)], Vh[: int(k)], layer.update.dense
    D = D - U @ (U.mT @ D)
    return D - (D @ Vh.mT) @ Vh


def on_null_space(layer: Layer, k: float) -> Tensor:
    """The update off the k leading eigenvectors of C_b.

    That is the space of LoRA-Null (arXiv:2503.02659), applied after training.
    """
    C_b = layer.base_moment.double()
    Q, D = torch.linalg.eigh(C_b).eigenvectors[:, -int(k) :], layer.update.dense
    return D - (D @ Q) @ Q.mT


def repaired(adapter: Adapter, method: object) -> Mapping[str, Tensor]:
    """By ``bulkedge.repair``, through files."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        bulkedge.repair(BASE, adapter.folder, out, method=method, only=["encoder.*"])
        return Tuned(out).dense


def by_peft(adapter: Adapter, bench: Bench, keep: float) -> Mapping[str, Tensor]:
    """By PEFT's ``reduce_intruder_dimension``, through files."""
    model = PeftModel.from_pretrained(example.load_base(BASE, bench.categories), adapter.folder)
    reduce_intruder_dimension(model, mitigation_lambda=keep, logging_sink=None)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["intruder_reduced"])
        return Tuned(Path(folder) / "intruder_reduced").dense


def replayed(adapter: Adapter, bench: Bench, texts: list[str], weight: float) -> Tuned:
    """A tenth of the training again, with the texts to be kept replayed.

    Their loss is one minus the mean cosine to the base's embeddings: the texts have no labels.
    """
    random.seed(adapter.seed)
    torch.manual_seed(adapter.seed)
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    base = example.load_base(BASE, bench.categories).eval()
    model = PeftModel.from_pretrained(
        example.load_base(BASE, bench.categories), adapter.folder, is_trainable=True
    )
    rate = adapter.learning_rate / 2
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=REPLAY_STEPS)
    stream = example.batches(glosses(adapter.part)["train"], tokenizer, bench.categories, BATCH)
    model.train()
    for _ in range(REPLAY_STEPS):
        tokens = tokenizer(
            random.sample(texts, BATCH),
            padding=True, truncation=True, max_length=64, return_tensors="pt",
        )  # fmt: skip
        with torch.no_grad():
            wanted = _pooled(base.bert, tokens)
        now = _pooled(model.get_submodule("base_model.model.bert"), tokens)
        away = 1 - torch.cosine_similarity(now, wanted).mean()
        loss = model(**next(stream)).loss + weight * away
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return Tuned(Path(folder))


def _pooled(encoder: torch.nn.Module, tokens: Mapping[str, Tensor]) -> Tensor:
    """Mean-pooled states."""
    mask = tokens["attention_mask"][..., None]
    return (encoder(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
