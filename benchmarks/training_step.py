"""What capping every layer costs in a training step, and what a certificate costs.

    python benchmarks/training_step.py

A step (forward, backward, SGD) of a network of four square Gaussian layers, batch 128, float32,
one thread: free, with torch's spectral_norm (one power iteration), and with spectral_cap, in turn
in one run; ratios are medians over the steps.  Every tenth step the true norms of all layers are
taken from a float64 SVD, which no timing includes.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import store
from torch import nn
from torch.nn.utils import parametrizations

from bulkedge.spectral import Probable, Rigorous, spectral_cap
from bulkedge.triplet import Dense, DenseSVD, singular_triplet

WIDTHS = (512, 1024, 2048)
STEPS = 40
BATCH = 128


def network(width: int) -> nn.Sequential:
    """Four linear layers with ReLU between, Gaussian weights of norm about 2."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        layer = nn.Linear(width, width)
        nn.init.normal_(layer.weight, std=width**-0.5)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def treated(model: nn.Sequential, treatment: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
    """A copy whose linear layers are parametrized."""
    model = copy.deepcopy(model)
    for layer in model:
        if isinstance(layer, nn.Linear):
            treatment(layer)
    return model


def true_norm(model: nn.Sequential) -> float:
    """The largest spectral norm among the weights as the next forward would use them."""
    with torch.no_grad():
        layers = [copy.deepcopy(layer).eval() for layer in model if isinstance(layer, nn.Linear)]
        return max(float(torch.linalg.matrix_norm(x.weight.double(), 2)) for x in layers)


def train(width: int) -> dict[str, Any]:
    """Ratios to torch's parametrization and to the free step, and the largest true norms."""
    base = network(width)
    models = {
        "free": base,
        "torch": treated(base, parametrizations.spectral_norm),
        "cap": treated(base, lambda layer: spectral_cap(layer, shrink_only=False)),
    }
    optimizers = {name: torch.optim.SGD(m.parameters(), lr=0.1) for name, m in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    norms: dict[str, list[float]] = {name: [] for name in models}
    for step in range(STEPS):
        x = torch.randn(BATCH, width, generator=torch.Generator().manual_seed(step))
        for name, model in models.items():
            started = time.perf_counter()
            optimizers[name].zero_grad()
            (model(x) - x).square().mean().backward()
            optimizers[name].step()
            times[name].append(time.perf_counter() - started)
            if step % 10 == 9:
                norms[name].append(true_norm(model))
    del times["free"][:2], times["torch"][:2], times["cap"][:2]

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

    return {
        "width": width,
        "free_ms": 1e3 * statistics.median(times["free"]),
        "torch_over_free": ratio("torch", "free"),
        "cap_over_free": ratio("cap", "free"),
        "cap_over_torch": ratio("cap", "torch"),
        "torch_norm_largest": max(norms["torch"]),
        "cap_norm_largest": max(norms["cap"]),
    }


def certificates(n: int) -> dict[str, Any]:
    """Seconds of each certificate over those of an SVD, and how far above the norm it ends."""
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(1))
    v = singular_triplet(A).v
    true = float(singular_triplet(A.double(), solver=DenseSVD()).sigma)
    row: dict[str, Any] = {"n": n}
    methods = {"rigorous": Rigorous(), "probable": Probable(), "probable_3": Probable(rtol=1e-3)}
    for name, method in methods.items():
        ratios, spent = [], []
        for _ in range(3):
            started = time.perf_counter()
            torch.linalg.svdvals(A)
            middle = time.perf_counter()
            found = method.bound(Dense(A), v)
            spent.append(time.perf_counter() - middle)
            ratios.append(spent[-1] / (middle - started))
        row |= {
            f"{name}_ms": 1e3 * statistics.median(spent),
            f"{name}_over_svdvals": statistics.median(ratios),
            f"{name}_excess": found.upper / true - 1,
            f"{name}_passes": found.passes,
        }
    return row


if __name__ == "__main__":
    torch.set_num_threads(1)
    store(
        "training_step",
        {
            "steps": STEPS,
            "batch": BATCH,
            "rows": [train(width) for width in WIDTHS],
            "certificates": [certificates(n) for n in (512, 1024, 2048)],
        },
    )
