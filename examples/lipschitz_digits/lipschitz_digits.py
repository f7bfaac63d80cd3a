"""Small networks on scikit-learn's digits with every layer held to a spectral norm, five ways.

    python examples/lipschitz_digits/lipschitz_digits.py [--quick] [--output results.json]

An MLP and a small convolutional network are trained with free weights, with torch's own
``spectral_norm``, with ``spectral_cap`` and by projected gradient, from the same seeds, on the same
batches, to the same bound.  Every layer's norm is then certified, and with it how far an image may
be moved (in the Euclidean norm) before the network can change its mind.  Prints the tables of the
README and writes ``results.json`` beside this file.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from bulkedge.spectral import (
    Convolution,
    NormBound,
    Rigorous,
    hold_spectral_ball,
    spectral_cap,
    spectral_norm,
)

HERE = Path(__file__).parent
BOUND = 1.0
SEEDS, EPOCHS, BATCH, RATE = (0, 1, 2), 6, 64, 3e-3
TRAINED_ON = 1297  # of 1797 images, the other 500 are for the test
SHARPNESS = 10.0  # of the softmax: a network of gain 1 has small logits, and would be all caution
RADII = (0.1, 0.3)  # pixels are in [0, 1]
EVERY = 5  # steps between two looks at the norms in training

Optimizer = torch.optim.Optimizer
Apply = Callable[[nn.Sequential, Optimizer | None], None]


class Scaled(nn.Module):
    """What torch's parametrization lacks: a bound other than 1, put on top of it."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, weight: Tensor) -> Tensor:
        """The weight of norm 1 scaled to the bound."""
        return self.bound * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        """For assignment."""
        return weight / self.bound


def mlp(seed: int) -> nn.Sequential:
    """64-128-128-10."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def cnn(seed: int) -> nn.Sequential:
    """Two convolutions, the second of stride 2, and a linear layer."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def layers(network: nn.Sequential) -> list[nn.Module]:
    """Those with a weight, in order; both convolutions see 8×8 images."""
    return [layer for layer in network if isinstance(layer, nn.Linear | nn.Conv2d)]


# The ways to hold a layer.


def free(network: nn.Sequential, optimizer: Optimizer | None) -> None:
    """Nothing is held."""


def torchs_own(iterations: int) -> Apply:
    """Torch's parametrization, scaled to the bound."""

    def apply(network: nn.Sequential, optimizer: Optimizer | None) -> None:
        for layer in layers(network):
            parametrizations.spectral_norm(layer, n_power_iterations=iterations)
            parametrize.register_parametrization(layer, "weight", Scaled(BOUND))

    return apply


def cap(network: nn.Sequential, optimizer: Optimizer | None) -> None:
    """``spectral_cap`` of the weight matrix, for a convolution of the reshaped kernel."""
    for layer in layers(network):
        spectral_cap(layer, bound=BOUND)


def cap_operator(network: nn.Sequential, optimizer: Optimizer | None) -> None:
    """``spectral_cap`` of the operator that a convolution is."""
    for layer in layers(network):
        convolves = isinstance(layer, nn.Conv2d)
        spectral_cap(layer, bound=BOUND, input_size=(8, 8) if convolves else None)


def projected(method: str) -> Apply:
    """Projection of the start, and after each step."""

    def apply(network: nn.Sequential, optimizer: Optimizer | None) -> None:
        hold_spectral_ball(optimizer, BOUND, method=method)

    return apply


MLP: dict[str, Apply] = {
    "free": free,
    "torch, 1 iteration": torchs_own(1),
    "torch, 10 iterations": torchs_own(10),
    "cap": cap,
    "projected, clip": projected("clip"),
    "projected, rescale": projected("rescale"),
}
CNN: dict[str, Apply] = {
    "free": free,
    "torch, 1 iteration": torchs_own(1),
    "cap, reshaped kernel": cap,
    "cap, operator": cap_operator,
}
SEALED = "cap, then certified"
PARAMETRIZED = ("torch, 1 iteration", "torch, 10 iterations", "cap")


def seal(network: nn.Sequential) -> nn.Sequential:
    """A copy with plain layers, every weight divided by a proved upper bound of its norm."""
    network = copy.deepcopy(network).eval()
    for layer in layers(network):
        parametrize.remove_parametrizations(layer, "weight")
        spectral_cap(layer, bound=BOUND, certified=True)
        parametrize.remove_parametrizations(layer, "weight")  # the weight stays, the cost goes
    return network


# What is measured.


def operator(layer: nn.Module) -> Tensor | Convolution:
    """The linear map of a layer."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Conv2d):
        return Convolution(weight, (8, 8), stride=layer.stride, padding=layer.padding)
    return weight


def intervals(network: nn.Sequential) -> list[NormBound]:
    """Each layer's norm in evaluation, certified."""
    network.eval()
    return [spectral_norm(operator(layer), certified=Rigorous()) for layer in layers(network)]


def excess(network: nn.Sequential) -> float:
    """By how much the largest layer norm exceeds the bound, relative to it.

    LAPACK in float64 is the judge, and the weight is read in the mode that the network is in.  Of a
    convolution the reshaped kernel is judged.
    """
    weights = [layer.weight.detach().double().flatten(1) for layer in layers(network)]
    return max(float(torch.linalg.matrix_norm(weight, 2)) for weight in weights) / BOUND - 1


def judge(network: nn.Sequential, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Accuracy, the network's Lipschitz bound, and the share of images that it makes safe.

    A difference of two logits changes by at most √2·L times the move of the image, so an image that
    is classified correctly by a margin above √2·L·ε stays so within ε.  Rounding in the network's
    own arithmetic is not part of this.
    """
    found = intervals(network)
    lipschitz = math.prod(interval.upper for interval in found) * (1 + 1e-15)
    with torch.no_grad():
        logits = network(images).double()
    best = logits.topk(2).values
    margins = torch.where(logits.argmax(1) == labels, best[:, 0] - best[:, 1], -math.inf)
    return {
        "accuracy": float((margins > -math.inf).double().mean()),
        "norms": [[interval.lower, interval.upper] for interval in found],
        "excess_in_evaluation": max(interval.upper for interval in found) / BOUND - 1,
        "lipschitz": lipschitz,
        "robust": [float((margins > math.sqrt(2) * lipschitz * r).double().mean()) for r in RADII],
    }


@dataclass
class Run:
    """One network in training."""

    network: nn.Sequential
    optimizer: Optimizer
    first: float | None = None
    worst: float = -math.inf
    seconds: list[float] = field(default_factory=list)

    def epoch(self, batches: list[tuple[Tensor, Tensor]], start: int) -> None:
        """One pass over the batches; only the steps themselves are timed."""
        spent = 0.0
        self.network.train()
        for step, (images, labels) in enumerate(batches, start):
            # cached: a look at the weight shows what the forward used, and iterates no further
            with parametrize.cached():
                began = time.perf_counter()
                self.optimizer.zero_grad()
                loss = nn.functional.cross_entropy(SHARPNESS * self.network(images), labels)
                loss.backward()
                self.optimizer.step()
                spent += time.perf_counter() - began
                if step % EVERY == 0:
                    self.worst = max(self.worst, excess(self.network))
        self.seconds.append(spent)


def begin(make: Callable[[int], nn.Sequential], apply: Apply, seed: int) -> Run:
    """A network held as ``apply`` says, and what a first forward in training meets."""
    network = make(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    apply(network, optimizer)
    # a parametrization keeps the parameter object, so the optimiser made before has the right ones
    untouched = copy.deepcopy(network).train()
    return Run(network, optimizer, first=excess(untouched))


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images in [0, 1], labels; to train on, to test."""
    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = (images / 16).float().reshape(-1, 1, 8, 8)[order], labels[order]
    return images[:TRAINED_ON], labels[:TRAINED_ON], images[TRAINED_ON:], labels[TRAINED_ON:]


def train(
    make: Callable[[int], nn.Sequential], methods: dict[str, Apply], seed: int, epochs: int
) -> dict[str, Run]:
    """All methods on one seed, epoch by epoch in turn, so that times can be compared in pairs."""
    images, labels, _, _ = data()
    runs = {name: begin(make, apply, seed) for name, apply in methods.items()}
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        parts = torch.randperm(len(labels), generator=order).split(BATCH)
        batches = [(images[part], labels[part]) for part in parts]
        for run in runs.values():
            run.epoch(batches, epoch * len(batches))
    return runs


def put_on_trained(trained: nn.Sequential, seed: int) -> dict[str, dict[str, float]]:
    """The excess in evaluation when weights trained freely are given to a held layer."""
    found = {}
    for name in PARAMETRIZED:
        # another seed: weights that come from elsewhere know nothing of this network's start
        registered, assigned = copy.deepcopy(trained).eval(), mlp(seed + 1).eval()
        MLP[name](registered, None)
        MLP[name](assigned, None)
        for layer, source in zip(layers(assigned), layers(trained), strict=True):
            layer.weight = source.weight.detach()
        found[name] = {"registered": excess(registered), "assigned": excess(assigned)}
    return found


def measure(seeds: tuple[int, ...], epochs: int) -> dict[str, Any]:
    """Everything in ``results.json`` but the machine."""
    _, _, images, labels = data()
    rows: dict[str, list[dict[str, Any]]] = {"mlp": [], "cnn": []}
    for seed, (kind, make, methods) in itertools.product(
        seeds, (("mlp", mlp, MLP), ("cnn", cnn, CNN))
    ):
        runs = train(make, methods, seed, epochs)
        moved = put_on_trained(runs["free"].network, seed) if kind == "mlp" else {}
        for name, run in runs.items():
            row = {"name": name, "seed": seed} | judge(run.network, images, labels)
            row |= {"excess_at_first": run.first, "excess_in_training": run.worst}
            row |= {f"excess_{key}": value for key, value in moved.get(name, {}).items()}
            row["seconds"] = run.seconds
            if kind == "cnn":
                row["reshaped_norms"] = [
                    float(torch.linalg.matrix_norm(layer.weight.detach().double().flatten(1), 2))
                    for layer in layers(run.network)
                ]
            rows[kind].append(row)
        if kind == "mlp":
            began = time.perf_counter()
            sealed = seal(runs["cap"].network)
            spent = time.perf_counter() - began
            row = {"name": SEALED, "seed": seed} | judge(sealed, images, labels)
            rows[kind].append(row | {"seal_seconds": spent})
    settings = {"bound": BOUND, "seeds": seeds, "epochs": epochs, "batch": BATCH}
    settings |= {"learning_rate": RATE, "sharpness": SHARPNESS, "radii": RADII}
    settings |= {"trained_on": TRAINED_ON, "tested_on": len(labels)}
    return {"settings": settings} | rows


def where() -> dict[str, Any]:
    """The machine, as far as it matters to a figure, and the commit if there is one."""
    commit, git = "", shutil.which("git")
    if git:
        command = [git, "-C", str(HERE), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout  # noqa: S603
    return {
        "commit": commit.strip() or "unknown",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    """The model name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# The tables.


def of(rows: list[dict[str, Any]], name: str, key: str) -> list[Any]:
    """One figure of one method, for each seed."""
    return [row[key] for row in rows if row["name"] == name and key in row]


def percent(values: list[float]) -> str:
    """Mean and range."""
    low, mean, high = (100 * f(values) for f in (min, statistics.mean, max))
    return f"{mean:.1f} % ({low:.1f} to {high:.1f})"


def over(values: list[float]) -> str:
    """The largest excess over the seeds, two digits, rounded up; a dash if there is none."""
    if not values:
        return "–"
    worst = 100 * max(values)
    if worst <= 0:
        return "none"
    digits = 1 - math.floor(math.log10(worst))
    worst = math.ceil(worst * 10**digits) / 10**digits
    return f"{worst:,.{max(digits, 0)}f} %"


def up(value: float) -> str:
    """Rounded up: an upper bound stays one when printed."""
    return f"{math.ceil(value * 1e5) / 1e5:.5f}"


def seconds(rows: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """An epoch, and its ratio to one with free weights, medians."""
    own = list(itertools.chain(*of(rows, name, "seconds")))
    base = itertools.chain(*of(rows, "free", "seconds"))
    ratios = [one / other for one, other in zip(own, base, strict=True)]
    return statistics.median(own), statistics.median(ratios)


def summary(rows: list[dict[str, Any]], name: str) -> str:
    """The columns that both networks have."""
    robust = zip(*of(rows, name, "robust"), strict=True)
    cells = [percent(of(rows, name, "accuracy"))]
    cells += [f"{100 * statistics.mean(values):.1f} %" for values in robust]
    return " | ".join([*cells, up(max(of(rows, name, "lipschitz")))])


def cost(rows: list[dict[str, Any]], name: str) -> str:
    """The last two columns."""
    if not of(rows, name, "seconds"):
        return f"{statistics.median(of(rows, name, 'seal_seconds')):.2f} once | –"
    epoch, ratio = seconds(rows, name)
    return f"{epoch:.3f} | {ratio:.1f}"


def show(measured: dict[str, Any]) -> None:
    """The four tables of the README."""
    safe = " | ".join(f"safe to {radius}" for radius in measured["settings"]["radii"])
    rows = measured["mlp"]
    names = list(dict.fromkeys(row["name"] for row in rows))

    print(f"| MLP | accuracy | {safe} | Lipschitz bound | s/epoch | × free |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        print(f"| {name} | {summary(rows, name)} | {cost(rows, name)} |")

    print("\n| MLP, in evaluation | layer 1 | layer 2 | layer 3 | above the bound |")
    print("|---|---|---|---|---|")
    for name in names:
        per_layer = zip(*of(rows, name, "norms"), strict=True)
        ends = [up(max(upper for _, upper in layer)) for layer in per_layer]
        above = over(of(rows, name, "excess_in_evaluation"))
        print(f"| {name} | {' | '.join(ends)} | {above} |")

    print("\n| above the bound | first forward | in training | registered | assigned |")
    print("|---|---|---|---|---|")
    for name in names:
        if name in ("free", SEALED):
            continue
        keys = ("at_first", "in_training", "registered", "assigned")
        cells = [over(of(rows, name, f"excess_{key}")) for key in keys]
        print(f"| {name} | {' | '.join(cells)} |")

    rows = measured["cnn"]
    print(
        f"\n| convolutions | accuracy | {safe} | Lipschitz bound | reshaped 1, 2 | operator 1, 2 "
        "| s/epoch | × free |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["name"] for row in rows):
        kernels = list(zip(*of(rows, name, "reshaped_norms"), strict=True))[:2]
        operators = list(zip(*of(rows, name, "norms"), strict=True))[:2]
        shapes = ", ".join(up(max(kernel)) for kernel in kernels)
        truths = ", ".join(up(max(upper for _, upper in each)) for each in operators)
        print(f"| {name} | {summary(rows, name)} | {shapes} | {truths} | {cost(rows, name)} |")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs, nothing stored")
    parser.add_argument("--output", type=Path, help="where to store (default: beside the script)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    measured = measure(SEEDS[:1], 2) if options.quick else measure(SEEDS, EPOCHS)
    show(measured)
    output = options.output or (None if options.quick else HERE / "results.json")
    if output:
        output.write_text(json.dumps({"measured": measured, "where": where()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
