"""The section of docs/benchmarks.md on the certified audit, from its stored results."""

from __future__ import annotations

from typing import Any

SECTION = """## The certified audit

One float32 matrix under a LoRA update of rank {rank}, the {k} leading directions, one thread; *two SVDs* is
`torch.linalg.svd` of base and tuned matrix in float32, as the authors' script does it (one run from 4096 on),
*PEFT* its `reduce_intruder_dimension` on a model of one such layer, which decomposes three times and writes a
repaired adapter. *Trained* has rows and columns of unequal variance and twelve outliers, *noise* neither.

{speed_table}

Aimed at was 200 times two SVDs at 4096². Found: {ratio_low:.0f} and {ratio_high:.0f}. {speed_missed}

{speed_where}

**A whole model.** A made-up checkpoint of the shape of a 7B model, {layers} linear weights in bfloat16
([generator](../benchmarks/made_up_model.py)), with a LoRA adapter of rank 16 that has intruders in known
places; `bulkedge audit --jobs 2` on two cores, hashing, reading and starting included. Of the 64 tall matrices
(11008 × 4096) a verdict may hang on the kernel, which takes the Gram matrix of the shorter side.

{model_table}

*Found elsewhere* are matrices called intruded that are not. *Copies* are of the largest matrix in float32, in
the peak memory of a worker beyond importing the package; bases are read in bfloat16 and widened in tiles.

{model_where}

**What it grows with.** A square matrix, n = {n}, k = {base_k}, r = {r}, ε = {epsilon}, one of them changed at a
time; median of 5. *Open* is the share of directions without a verdict after the last step, which go to the SVD.
This table is from before leading triplets and counts were [proved](certificate.md#what-may-have-been-missed) by random vectors, which
costs two to four passes more.

![Seconds and passes against n, k, r and ε](figures/certified_cost.svg)

{cost_table}

{cost_where}
"""

SPEED_HEAD = """| shape | base | ours | passes | two SVDs | ratio | PEFT | ratio | intruders | same verdicts |
|---|---|---|---|---|---|---|---|---|---|
"""
MODEL_HEAD = """| sides over | size | time | GB/s | plain reading | passes, median (most) | planted, found, elsewhere | open | by SVD | peak, copies |
|---|---|---|---|---|---|---|---|---|---|
"""
COST_HEAD = """| changed | value | noise: time | passes | open | trained: time | passes | open |
|---|---|---|---|---|---|---|---|
"""


def speed_table(rows: list[dict[str, Any]]) -> str:
    """One matrix against full SVDs."""
    return SPEED_HEAD + "\n".join(
        f"| {r['shape'][0]} × {r['shape'][1]} | {r['kind']} | {1e3 * r['seconds']:.0f} ms "
        f"| {r['passes']} | {r['two_svds']:.1f} s | {r['ratio']:.0f}× "
        + (f"| {r['peft']:.1f} s | {r['peft_ratio']:.0f}× " if r["peft"] else "| | ")
        + f"| {r['intruders']} | {'yes' if r['same_verdicts'] else 'no'} |"
        for r in rows
    )


def model_table(results: list[dict[str, Any]]) -> str:
    """Whole checkpoints."""
    return MODEL_HEAD + "\n".join(
        f"| {r['scale']} | {r['gigabytes']:.2f} GB | {r['seconds']:.0f} s "
        f"| {r['gigabytes_per_second']:.3f} | {r['plain_reading_gigabytes_per_second']:.1f} GB/s "
        f"| {r['passes_median']:.0f} ({r['passes_most']}) "
        f"| {r['planted_matrices']}, {r['planted_found']}, {r['found_elsewhere']} "
        f"| {r['undecided']} | {r['dense_directions']} "
        f"| {r['peak_MB']:,} MB, {r['copies_of_largest']} |"
        for r in results
    )


def cost_table(rows: list[dict[str, Any]]) -> str:
    """One thing changed at a time."""

    def cells(kind: str, changed: str, value: float) -> str:
        (r,) = (r for r in rows if (r["kind"], r["changed"], r["value"]) == (kind, changed, value))
        return f"{1e3 * r['seconds']:.0f} ms | {r['passes']:.0f} | {r['open_percent']:.0f} %"

    kept = dict.fromkeys((r["changed"], r["value"]) for r in rows)
    names = {"epsilon": "ε"}
    return COST_HEAD + "\n".join(
        f"| {names.get(changed, changed)} | {value} | {cells('noise', changed, value)} "
        f"| {cells('trained', changed, value)} |"
        for changed, value in kept
    )


def section(speed: Any, models: list[Any], cost: Any, where: Any) -> str:
    """The whole section; ``where`` tells the machine of a result."""
    rows = speed["measured"]["rows"]
    ratios = sorted(r["ratio"] for r in rows if r["shape"] == [4096, 4096])
    missed = (
        "Some forty passes take nearly all of it: a block of eighteen vectors is too thin for the "
        "processor's full speed and too thick for that of memory, while SVDs run at the former."
    )
    plain = cost["measured"]["plain"]
    return SECTION.format(
        rank=speed["measured"]["rank"],
        k=speed["measured"]["k"],
        speed_table=speed_table(rows),
        ratio_low=ratios[0],
        ratio_high=ratios[-1],
        speed_missed=missed if ratios[0] < 200 else "",
        speed_where=where(speed),
        layers=models[0]["measured"]["matrices"],
        model_table=model_table([model["measured"] for model in models]),
        model_where=where(models[-1]),
        n=plain["n"],
        base_k=plain["k"],
        r=plain["r"],
        epsilon=plain["epsilon"],
        cost_table=cost_table(cost["measured"]["rows"]),
        cost_where=where(cost),
    )
