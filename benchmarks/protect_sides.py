"""Does protecting gain from curvatures of the outputs, or from collecting the inputs again?

python benchmarks/protect_sides.py

The adapter of rank 8 of examples/minilm_wordnet, on all texts of the tests.  The pooler is as
trained in every arm: no embedding passes it, so that there is nothing of the base's to protect.

*Two-sided*: with ``G = E[g gᵀ]``, g the gradient of a loss by the outputs of a layer, one for each
token, the update is the minimum of

    tr(G_t (D − ΔW) C_t (D − ΔW)ᵀ) + λ tr(G_b D C_b Dᵀ),    G_t D C_t + λ G_b D C_b = G_t ΔW C_t.

It is solved by ``bulkedge.repairing.Sides``, at the rank of the adapter by alternating least
squares from the factors as trained, or for A alone.  *Layers weighed* has the mean curvature of
each layer in every direction, so that layers differ in λ alone.

Loss of the task: cross-entropy of the trained classifier, labels drawn from its own distribution,
so that G is Fisher's and does not vanish on texts that are fitted.  Loss of the base: ``⟨z, e⟩``
with e the unit embedding of a text and z random signs, so that ``E[g gᵀ] = E[Jᵀ J]`` with J the
derivative of e: what an embedding moves by, in all directions, without pairs or labels.  (The
squared norm of e is constant, its gradient zero.)

*Rounds*: the inputs of the task are collected again on the repaired adapter, and the adapter as
trained is protected with them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import store
from protect_measure import BASE, EXAMPLE, Measure
from torch import Tensor, nn
from transformers import logging as transformers_logging

from bulkedge._linmap import LowRank
from bulkedge._moments import collect_moments
from bulkedge.moments import Moments, to_dense
from bulkedge.moments._watched import plain_name
from bulkedge.repairing import Sides
from bulkedge.repairing.sides import SWEEPS
from bulkedge.repairing.solve import protected

ADAPTER = EXAMPLE / "lora-r8"
SCALE = 2.0  # α/r of this adapter
STRENGTHS, OTHERS = (1.0, 3.0), (0.3, 10.0)
ROUNDS = 3
HALVINGS = 12
BATCH = 32


@contextmanager
def curvatures(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """``Σ g gᵀ`` over the outputs of linear layers, by one backward pass of a summed loss."""
    found: dict[str, Tensor] = {}
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def add(g: Tensor) -> None:
            rows = g.detach().flatten(0, -2).double()
            found[name] = found.get(name, 0) + rows.mT @ rows

        def hook(_layer: nn.Module, _inputs: Any, y: Tensor) -> None:
            y.register_hook(add)

        return hook

    for name, layer in linear_layers(model).items():
        handles.append(layer.register_forward_hook(watch(name)))
    words = next(layer for layer in model.modules() if isinstance(layer, nn.Embedding))
    handles.append(words.register_forward_hook(lambda _m, _i, y: y.requires_grad_()))
    yield found
    for handle in handles:
        handle.remove()


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """The linear layers of the encoder by plain path; those that an adapter wraps, as wrapped."""
    found = {}
    for name, layer in model.named_modules():
        linear = hasattr(layer, "base_layer") or isinstance(layer, nn.Linear)
        inside = ".lora_" in name or name.endswith("base_layer")
        if linear and not inside and "encoder." in name:
            found[plain_name(name).removeprefix("bert.")] = layer
    return found


def task_curvatures(measure: Measure, glosses: list[str]) -> dict[str, Tensor]:
    """Of the cross-entropy, on labels that the classifier draws."""
    model = measure.tuned(ADAPTER).requires_grad_(False)

    def loss(tokens: Any, generator: torch.Generator) -> Tensor:
        logits = model(**tokens).logits
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        return nn.functional.cross_entropy(logits, drawn, reduction="sum")

    return _collected(measure, model, glosses, loss)


def base_curvatures(measure: Measure, texts: list[str]) -> dict[str, Tensor]:
    """Of the unit embedding, in random directions."""
    model = measure.new_base().requires_grad_(False)

    def loss(tokens: Any, generator: torch.Generator) -> Tensor:
        states, mask = model.bert(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        e = nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
        signs = torch.randint(0, 2, e.shape, generator=generator) * 2 - 1
        return (signs * e).sum()

    return _collected(measure, model, texts, loss)


def _collected(
    measure: Measure, model: nn.Module, texts: list[str], loss: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """Curvatures on texts, a mean over tokens."""
    generator, count, order = torch.Generator().manual_seed(0), 0, sorted(texts, key=len)
    with curvatures(model) as found:
        for start in range(0, len(order), BATCH):
            tokens = measure.tokenizer(
                order[start : start + BATCH], padding=True, truncation=True, max_length=64,
                return_tensors="pt",
            )  # fmt: skip
            loss(tokens, generator).backward()
            count += int(tokens["attention_mask"].sum())
    return {name: total / count for name, total in found.items()}


def sides(
    base: Moments, task: Moments, G_b: dict[str, Tensor], G_t: dict[str, Tensor]
) -> dict[str, Sides]:
    """All layers; both losses in units in which their mean curvature is 1."""
    units = [sum(float(G.diagonal().mean()) for G in Gs.values()) / len(Gs) for Gs in (G_b, G_t)]
    return {
        name: Sides.of(
            (base[name].moment, task[name].moment), (G_b[name] / units[0], G_t[name] / units[1])
        )
        for name in G_b
    }


def weighed(Gs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean curvature of each layer in every direction: layers differ, directions do not."""
    return {n: float(G.diagonal().mean()) * torch.eye(len(G)).to(G) for n, G in Gs.items()}


class Arms:
    """All arms on one adapter."""

    def __init__(self) -> None:
        self.measure = Measure()
        kept = [text for pair in self.measure.pairs["texts"] for text in pair]
        self.glosses = [gloss for _, gloss in self.measure.examples["train"][:600]]
        self.base = collect_moments(BASE, kept)
        self.task = collect_moments(BASE, self.glosses, tuned=ADAPTER)
        self.G_b = base_curvatures(self.measure, kept)
        self.G_t = task_curvatures(self.measure, self.glosses)
        self.trained = self.measure.tuned(ADAPTER)
        self.rows: list[dict[str, Any]] = []

    def one_sided(self, strength: float, rounds: int = 1) -> None:
        """What ``Protect(base, task, strength, rounds=…)`` makes, without its audits."""
        task, model = self.task, self.measure.tuned(ADAPTER)
        for i in range(rounds):
            if i:
                with tempfile.TemporaryDirectory() as folder:
                    model.save_pretrained(folder)
                    task = collect_moments(BASE, self.glosses, tuned=folder)
            for name, layer in linear_layers(self.trained).items():
                C_b, C_t = self.base[name], task[name]
                unit = means(C_b.moment) / means(C_t.moment)  # both are scaled in there
                A = layer.lora_A["default"].weight.detach()
                new = protected(A, C_b.moment, C_t.moment, strength * unit)
                linear_layers(model)[name].lora_A["default"].weight.data.copy_(new)
        self.row("one-sided", model, strength=strength, rounds=rounds)

    def two_sided(self, layers: dict[str, Sides], target: float, arms: dict[str, int]) -> None:
        """At the strength at which A alone has a drift, for some numbers of sweeps."""
        model = self.measure.tuned(ADAPTER)
        low, high = -2.0, 3.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            self.put(model, layers, 10**middle, 0)
            low, high = (middle, high) if self.drift(model) > target else (low, middle)
        for arm, sweeps in arms.items():
            self.put(model, layers, 10**low, sweeps)
            self.row(arm, model, strength=10**low)

    def put(self, model: nn.Module, layers: dict[str, Sides], strength: float, sweeps: int) -> None:
        """Give a model the factors of a strength."""
        trained = linear_layers(self.trained)
        for name, layer in linear_layers(model).items():
            B, A = (getattr(trained[name], f"lora_{x}")["default"].weight.detach() for x in "BA")
            found = layers[name].solved(LowRank(B, A, SCALE), strength, sweeps)
            layer.lora_B["default"].weight.data.copy_(found.B)
            layer.lora_A["default"].weight.data.copy_(found.A)

    def drift(self, model: nn.Module) -> float:
        """The mean over the encoder's layers of ``tr(ΔW C_b ΔWᵀ)/tr(W0 C_b W0ᵀ)``."""
        found = []
        for name, layer in linear_layers(model).items():
            B, A = (getattr(layer, f"lora_{x}")["default"].weight.double().detach() for x in "BA")
            inner = A @ to_dense(self.base[name].moment).double() @ A.mT
            found.append(SCALE**2 * float(((B.mT @ B) * inner).sum()) / self.base[name].output)
        return sum(found) / len(found)

    def row(self, arm: str, model: nn.Module, **more: Any) -> None:
        """Measure a model."""
        found = {"arm": arm, **more, "drift": self.drift(model)} | self.measure.row(model)
        self.rows.append(found)
        store("protect_sides", {"rows": self.rows})


def means(moment: Any) -> float:
    """The mean of the diagonal."""
    return float(to_dense(moment).diagonal().double().mean())


def main() -> None:
    """Measure, store."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    arms = Arms()
    layers = sides(arms.base, arms.task, arms.G_b, arms.G_t)
    for strength in STRENGTHS:
        arms.one_sided(strength)
        drift = arms.rows[-1]["drift"]
        arms.two_sided(layers, drift, {"two-sided": SWEEPS, "two-sided, A alone": 0})
        arms.one_sided(strength, rounds=ROUNDS)
    for strength in OTHERS:  # to have one-sided at the retrieval of the others
        arms.one_sided(strength)
    layers = sides(arms.base, arms.task, weighed(arms.G_b), weighed(arms.G_t))
    arms.two_sided(layers, arms.rows[0]["drift"], {"layers weighed, A alone": 0})


if __name__ == "__main__":
    main()
