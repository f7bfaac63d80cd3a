"""Arms of ``protect.py`` that know the outputs of a layer, too: two-sided, at the adapter's rank.

With ``G = E[g gᵀ]``, g the gradient of a loss by the outputs of a layer, one for each token, the
update is the minimum of

    tr(G_t (D − ΔW) C_t (D − ΔW)ᵀ) + λ tr(G_b D C_b Dᵀ)

by alternating least squares from the factors as trained, or for A alone.  Both losses are in units
in which their mean curvature over the layers is 1.  Losses of which curvatures are taken:

classes    cross-entropy of the trained classifier, labels drawn from its own distribution, so that
           G is Fisher's and does not vanish on texts that are fitted
embedding  ``⟨z, e⟩`` with e the unit embedding of a text and z random signs, so that
           ``E[g gᵀ] = E[Jᵀ J]`` with J the derivative of e: what an embedding moves by, in all
           directions, without labels or pairs
states     the same of the last hidden states of all tokens, a sign for each number
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from protect_adapters import BUILD
from protect_arms import mean, with_ridge
from protect_model import Batches, Bench, Tuned, Update
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

BATCH = 32
SWEEPS = 8


@cache
def network(part: str) -> Bench:
    """A model in float32 to take gradients of."""
    found = Bench(part, torch.float32)
    found.model.requires_grad_(False)
    return found


def curvatures(
    name: str, part: str, tuned: Tuned | None, texts: list[str], loss: str
) -> dict[str, Tensor]:
    """``E[g gᵀ]`` over the tokens of texts, of each layer of the encoder; kept in build/."""
    path = BUILD / "curvatures" / f"{name} {loss}.safetensors".replace(" ", "-")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(_measured(network(part), tuned, texts, LOSSES[loss]), path)
    return load_file(path)


def _measured(
    bench: Bench, tuned: Tuned | None, texts: list[str], loss: Callable[..., Tensor]
) -> dict[str, Tensor]:
    bench.put({} if tuned is None else tuned.dense, tuned)
    generator, count = torch.Generator().manual_seed(0), 0
    with _watched(bench.model) as found:
        for tokens in Batches(bench.tokenizer, texts, BATCH).tokens:
            loss(bench.model, tokens, generator).backward()
            count += int(tokens["attention_mask"].sum())
    return {name: (total / count).float() for name, total in found.items()}


@contextmanager
def _watched(model: Any) -> Iterator[dict[str, Tensor]]:
    """``Σ g gᵀ`` over the outputs of the encoder's linear layers."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def add(g: Tensor) -> None:
            rows = g.detach().flatten(0, -2)
            found[name] = found.get(name, 0) + (rows.mT @ rows).double()

        return lambda _layer, _inputs, y: y.register_hook(add) and None

    handles = [
        layer.register_forward_hook(watch(name))
        for name, layer in model.bert.named_modules()
        if isinstance(layer, nn.Linear) and name.startswith("encoder.")
    ]
    words = model.bert.embeddings
    handles.append(words.register_forward_hook(lambda _m, _i, y: y.requires_grad_()))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _classes(model: Any, tokens: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    logits = model(**tokens).logits
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    return nn.functional.cross_entropy(logits, drawn, reduction="sum")


def _embedding(model: Any, tokens: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    states, mask = model.bert(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
    e = nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    return (_signs(e, generator) * e).sum()


def _states(model: Any, tokens: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    states = model.bert(**tokens).last_hidden_state * tokens["attention_mask"][..., None]
    return (_signs(states, generator) * states).sum()


def _signs(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, x.shape, generator=generator) * 2 - 1


LOSSES = {"classes": _classes, "embedding": _embedding, "states": _states}


@dataclass(frozen=True)
class Sided:
    """A layer in the bases in which all four matrices are diagonal; for every strength."""

    R: Tensor
    mu: Tensor
    S: Tensor
    nu: Tensor
    unit: float

    def solved(self, update: Update, strength: float, sweeps: int = SWEEPS) -> Update:
        """The update at a strength; with 0 sweeps A alone is new."""
        mu, nu = self.mu, strength * self.unit * self.nu
        P0, Q0 = self.S.mT @ update.B.double(), update.A.double() @ self.R
        P, Q = P0, _right(P0, P0, Q0, nu, mu)
        for _ in range(sweeps):
            P = _right(Q.mT, Q0.mT, P0.mT, mu, nu).mT
            Q = _right(P, P0, Q0, nu, mu)
        B = update.B if sweeps == 0 else torch.linalg.solve(self.S.mT, P).float()
        A = torch.linalg.solve(self.R.mT, Q.mT).mT.float()
        return Update(B, A, update.scale)  # as it is stored


def sided(
    inputs: Mapping[str, tuple[Tensor, Tensor]],
    outputs: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
) -> dict[str, Sided]:
    """All layers.

    Args:
        inputs: C_b and C_t of each.
        outputs: G_b and G_t of each.
    """
    units = [sum(map(mean, Gs.values())) / len(Gs) for Gs in outputs]
    found = {}
    for name, Cs in inputs.items():
        G_b, G_t = (Gs[name].double() / unit for Gs, unit in zip(outputs, units, strict=True))
        (R, mu), (S, nu) = (_basis(*map(with_ridge, pair)) for pair in (Cs, (G_b, G_t)))
        unit = mean(Cs[0]) * mean(G_b) / (mean(Cs[1]) * mean(G_t))
        found[name] = Sided(R, mu, S, nu, unit)
    return found


def _basis(base: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
    """R and μ with ``task = R Rᵀ`` and ``base = R diag(μ) Rᵀ``."""
    L = torch.linalg.cholesky(task)
    half = torch.linalg.solve_triangular(L, base, upper=False)
    mu, Q = torch.linalg.eigh(torch.linalg.solve_triangular(L, half.mT, upper=False))
    return L @ Q, mu


def _right(P: Tensor, P0: Tensor, Q0: Tensor, nu: Tensor, mu: Tensor) -> Tensor:
    """The Q that minimises ``Σ (P Q − P0 Q0)² + ν μᵀ (P Q)²``: one system for each column."""
    systems = P.mT @ P + mu[:, None, None] * ((P.mT * nu) @ P)
    return torch.linalg.solve(systems, (P.mT @ P0 @ Q0).mT[..., None])[..., 0].mT
