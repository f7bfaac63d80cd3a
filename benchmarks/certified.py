"""What the certified audit costs.

python benchmarks/certified.py speed [--up-to N]   one matrix against full SVDs
python benchmarks/certified.py model [--scale 16]   a whole checkpoint
python benchmarks/certified.py cost                 what it grows with
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_up_model
import torch
from common import peak_of, store

from bulkedge import Recipe
from bulkedge._linmap import LowRank
from bulkedge.comparison import Pair, judge_pair
from bulkedge.intruder import Judgement, Verdict

SHAPES = [(1024, 1024), (2048, 2048), (4096, 4096), (11008, 4096)]
K = 10
FIGURE = Path(__file__).parents[1] / "docs/figures/certified_cost.svg"


def make_pair(kind: str, m: int, n: int, rank: int, seed: int = 0) -> Pair:
    """A base and a LoRA of the rank, half of whose spikes are strong enough to lead."""
    generator = torch.Generator().manual_seed(seed)
    W0, B, A = made_up_model.base_and_factors(kind, m, n, rank, generator)
    return Pair(W0, None, LowRank(B, A))


def audit_one(pair: Pair, recipe: Recipe) -> Judgement:
    """All directions of one matrix, from its tensors."""
    found = judge_pair(pair, recipe.model_copy(update={"method": "certified"}))
    if found.method != "certified":
        raise SystemExit("the tuned triplets were not found")
    return found


def lora_of(pair: Pair) -> LowRank:
    """The update, which every pair here has."""
    if pair.low_rank is None:
        raise TypeError("expected a pair with a low-rank update")
    return pair.low_rank


def by_two_svds(pair: Pair) -> list[str]:
    """The authors' way, in float32: the verdicts by all singular vectors of both matrices."""
    W = pair.tuned_map(torch.float32).to_dense()
    U0, _, _ = torch.linalg.svd(pair.base, full_matrices=False)
    U, _, _ = torch.linalg.svd(W, full_matrices=False)
    cosines = U0.mT @ U[:, :K]
    scores, overlaps = cosines.abs().amax(dim=0), cosines[: 2 * K].square().sum(dim=0)
    pairs = zip(scores.tolist(), overlaps.tolist(), strict=True)
    return [
        "aligned" if score >= 0.5 else "rotated" if overlap >= 0.5 else "intruder"
        for score, overlap in pairs
    ]


def by_peft(pair: Pair) -> None:
    """PEFT's own function on a model of one linear layer."""
    import peft
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    m, n = pair.base.shape
    layer = torch.nn.Linear(n, m, bias=False)
    layer.weight.data = pair.base.clone()
    update = lora_of(pair)
    rank = update.A.shape[0]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(layer), config)
    wrapped = model.base_model.model[0]
    wrapped.lora_A["default"].weight.data = update.A.float()
    wrapped.lora_B["default"].weight.data = update.B.float()
    reduce_intruder_dimension(model, top_k=K, logging_sink=None)


def timed(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds and the last result."""
    seconds, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def measure_speed(up_to: int) -> None:
    """One matrix, one thread: ours, two full SVDs, PEFT's function."""
    rows = []
    for m, n in (shape for shape in SHAPES if max(shape) <= up_to):
        for kind in ("noise", "trained"):
            pair = make_pair(kind, m, n, rank=16)
            ours, found = timed(lambda pair=pair: audit_one(pair, Recipe()), 5)
            few = 1 if max(m, n) > 2048 else 3
            svds, verdicts = timed(lambda pair=pair: by_two_svds(pair), few)
            peft = None
            # its time does not depend on the entries, and is minutes beyond
            if kind == "trained" and max(m, n) <= 2048:
                peft, _ = timed(lambda pair=pair: by_peft(pair), few)
            mine = [direction.verdict.value for direction in found.directions]
            rows.append(
                {
                    "shape": [m, n],
                    "kind": kind,
                    "seconds": round(ours, 4),
                    "passes": found.passes,
                    "two_svds": round(svds, 2),
                    "ratio": round(svds / ours, 1),
                    "peft": None if peft is None else round(peft, 2),
                    "peft_ratio": None if peft is None else round(peft / ours, 1),
                    "intruders": mine.count("intruder"),
                    "undecided": mine.count("undecided"),
                    "same_verdicts": mine == verdicts,
                }
            )
            print(rows[-1], flush=True)
    store("certified_speed", {"rows": rows, "k": K, "rank": 16})


def measure_model(scale: int, made: Path | None) -> None:
    """A whole checkpoint on two processes: time, passes, memory, and what was found where."""
    with tempfile.TemporaryDirectory() as place:
        folder = made or Path(place) / "model"
        if made is None:
            made_up_model.make(folder, scale)
        out = Path(place) / "out"
        files = sorted((folder / "base").glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        reading, _ = timed(lambda: [_read(file) for file in files], 1)
        imports = peak_of([sys.executable, "-c", "import bulkedge; bulkedge.audit"])
        command = [sys.executable, "-m", "bulkedge", "audit", "-j", "2", "-q", "--fail-on", "never"]
        command += ["--method", "certified"]
        command += [str(folder / "base"), str(folder / "adapter"), "-o", str(out)]
        start = time.perf_counter()
        peak = peak_of(command)
        seconds = time.perf_counter() - start
        record = json.loads((out / "record.json").read_text())
        planted = set(json.loads((folder / "planted.json").read_text()))
    rows = record["matrices"]
    found = {row["name"] for row in rows if row["new_directions"]}
    passes = sorted(row["passes"] for row in rows)
    methods = [direction["method"] for row in rows for direction in row["directions"]]
    largest = max(row["shape"][0] * row["shape"][1] for row in rows) * 4
    store(
        f"certified_model_{scale}",
        {
            "scale": scale,
            "matrices": len(rows),
            "gigabytes": round(size / 1e9, 3),
            "seconds": round(seconds, 1),
            "gigabytes_per_second": round(size / 1e9 / seconds, 3),
            "plain_reading_gigabytes_per_second": round(size / 1e9 / reading, 3),
            "passes_median": statistics.median(passes),
            "passes_most": passes[-1],
            "planted_matrices": len(planted),
            "planted_found": len(planted & found),
            "found_elsewhere": len(found - planted),
            "intruders": record["summary"]["new_directions"],
            "undecided": record["summary"]["verdicts"]["undecided"],
            "dense_directions": methods.count("dense"),
            "peak_MB": round(peak / 1e6),
            "imports_MB": round(imports / 1e6),
            "largest_float32_MB": round(largest / 1e6),
            "copies_of_largest": round((peak - imports) / largest, 1),
        },
    )


def _read(file: Path) -> None:
    with file.open("rb") as stream:
        while stream.read(2**24):
            pass


def measure_cost() -> None:
    """One thing changed at a time: what it costs in passes and seconds, what stays open."""
    plain = {"n": 1024, "k": 10, "r": 16, "epsilon": 0.5}
    changes = {
        "n": [256, 512, 1024, 2048, 4096],
        "k": [1, 5, 10, 20, 40],
        "r": [1, 4, 16, 64, 256],
        "epsilon": [0.1, 0.2, 0.3, 0.5, 0.7],
    }
    rows = []
    for kind in ("noise", "trained"):
        for name, values in changes.items():
            for value in values:
                setting = plain | {name: value}
                n, recipe = setting["n"], Recipe(top_k=setting["k"], epsilon=setting["epsilon"])
                found = []
                for seed in range(5):
                    pair = make_pair(kind, n, n, setting["r"], seed)
                    found.append(timed(lambda pair=pair, r=recipe: audit_one(pair, r), 1))
                directions = [d for _, judged in found for d in judged.directions]
                open_ = sum(d.verdict is Verdict.UNDECIDED for d in directions)
                rows.append(
                    {
                        "kind": kind,
                        "changed": name,
                        "value": value,
                        "seconds": round(statistics.median(s for s, _ in found), 4),
                        "passes": statistics.median(judged.passes for _, judged in found),
                        "open_percent": round(100 * open_ / len(directions), 1),
                    }
                )
                print(rows[-1], flush=True)
    store("certified_cost", {"plain": plain, "rows": rows})
    draw_cost(rows)


def draw_cost(rows: list[dict[str, Any]]) -> None:
    """docs/figures/certified_cost.svg."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(2, 4, sharex="col", sharey="row")
    for column, name in enumerate(dict.fromkeys(row["changed"] for row in rows)):
        for kind, colour in (("noise", "#0072B2"), ("trained", "#D55E00")):
            mine = [row for row in rows if (row["kind"], row["changed"]) == (kind, name)]
            x = [row["value"] for row in mine]
            for panel, key in zip(panels[:, column], ("seconds", "passes"), strict=True):
                panel.plot(x, [row[key] for row in mine], "o-", color=colour, label=kind)
        panels[0, column].set_yscale("log")
        panels[1, column].set_xlabel("ε" if name == "epsilon" else name)
        if name != "epsilon":
            panels[1, column].set_xscale("log", base=2)
    for panel in panels.flat:
        panel.minorticks_off()
    panels[0, 0].set_ylabel("seconds")
    panels[1, 0].set_ylabel("passes")
    panels[0, 0].legend(frameon=False)
    with mpl.rc_context({"svg.hashsalt": "bulkedge", "svg.fonttype": "none"}):
        figure.savefig(FIGURE, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["speed", "model", "cost"])
    parser.add_argument("--up-to", type=int, default=16384, help="the larger side of a matrix")
    parser.add_argument("--scale", type=int, default=16)
    parser.add_argument("--made", type=Path, help="a folder that made_up_model.py has filled")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "speed":
        measure_speed(arguments.up_to)
    elif arguments.what == "model":
        measure_model(arguments.scale, arguments.made)
    else:
        measure_cost()
