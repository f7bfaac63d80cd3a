"""The tables of the certified audit, from its stored results."""

from __future__ import annotations

from typing import Any

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


TURNS_HEAD = """| shape | base | before | after | times | passes | operations | products alone | decided by | same verdicts |
|---|---|---|---|---|---|---|---|---|---|
"""


def turns_table(rows: list[dict[str, Any]]) -> str:
    """Two codes in turn on the same matrices."""

    def change(row: dict[str, Any], key: str) -> str:
        return f"{row['before'][key]:,} → {row['after'][key]:,}"

    def products(after: dict[str, Any]) -> str:
        return f"{1e3 * after['products']:.1f} ms" if after["method"] == "certified" else "–"

    return TURNS_HEAD + "\n".join(
        f"| {r['shape'][0]} × {r['shape'][1]}, r = {r['rank']} | {r['kind']} "
        f"| {1e3 * r['before']['seconds']:.1f} ms | {1e3 * r['after']['seconds']:.1f} ms "
        f"| {r['before']['seconds'] / r['after']['seconds']:.1f} "
        f"| {change(r, 'passes')} | {change(r, 'operations')} "
        f"| {products(r['after'])} | {r['after']['method']} "
        f"| {'yes' if r['same_verdicts'] else 'no'} |"
        for r in rows
    )


MANY_HEAD = """| matrices | shape | before | after | times |
|---|---|---|---|---|
"""


def many_table(rows: list[dict[str, Any]]) -> str:
    """Whole audits of many small matrices by two codes."""
    return MANY_HEAD + "\n".join(
        f"| {r['matrices']:,} | {r['size']} × {r['size']}, r = {r['rank']} "
        f"| {r['before']:.1f} s | {r['after']:.1f} s | {r['before'] / r['after']:.1f} |"
        for r in rows
    )


HARD_HEAD = """| family | certificates | directions | decided | contradicted | sides | least σ/σ₁ |
|---|---|---|---|---|---|---|
"""


def hard_table(measured: dict[str, Any]) -> str:
    """Certificates where rounding is worst, held against exact arithmetic."""
    rows = {**measured["families"], "all": measured["all"]}
    return HARD_HEAD + "\n".join(
        f"| {name.replace('_', ' ')} | {r['certificates']:,} | {r['directions']:,} "
        f"| {r['decided']:,} | {r['wrong']} | {r['shortest_side']} to {r['longest_side']:,} "
        f"| {r['smallest_over_largest']:.0e} |"
        for name, r in rows.items()
    )
