"""The tables of docs/benchmarks.md and docs/how-to-choose.md, from stored results."""

from __future__ import annotations

from typing import Any

FIT_HEAD = """| shape | spiked | strong | mixed | half hidden | time | over the SVD's |
|---|---|---|---|---|---|---|
"""
ALARM_HEAD = """| shape | fitted σ | known σ | empirical edge | beyond τ(√m + √n) | not white |
|---|---|---|---|---|---|
"""
PREDICTED_HEAD = """| spikes | | R² of the outlier | median error | within 3 sd | R² of the overlap | score < 0.5: expected, measured, both |
|---|---|---|---|---|---|---|
"""

GRADIENT_HEAD = """| n | spectrum | gap | ours | passes | error | svd | error | lowrank | error | seed | error |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""
FORWARD_HEAD = """| n | spectrum | sine | arpack | sine | propack | sine |
|---|---|---|---|---|---|---|
"""
TRAINING_HEAD = """| width | free step | torch, over free | cap, over free | cap, over torch | norm, torch | norm, cap |
|---|---|---|---|---|---|---|
"""
BOUND_HEAD = """| n | rigorous | time | excess | probable (1 %) | excess | probable (0.1 %) | excess |
|---|---|---|---|---|---|---|---|
"""
SOLVER_HEAD = "| solver, k = {k} |" + " {} |" * 4 + "\n|---|" + "---|" * 4 + "\n"
CROSSOVER_HEAD = "| n | {} |\n|---|{}\n| dense over Lanczos | {} |\n"
SPECTRA = ("gaussian", "decaying", "spiked", "nearly degenerate")


def gradient_table(rows: list[dict[str, Any]]) -> str:
    """Ours against the differentiable peers."""
    lines = [
        f"| {r['n']} | {r['spectrum']} | {r['relative_gap']:.1e} | {r['ms']:.1f} ms | {r['passes']} "
        f"| {r['ours_error']:.0e} | {r['svd_ratio']:.1f}× | {r['svd_error']:.0e} "
        f"| {r['svd_lowrank_ratio']:.1f}× | {r['svd_lowrank_error']:.0e} "
        + (f"| {r['seed_ratio']:.0f}× | {r['seed_error']:.0e} |" if "seed_ratio" in r else "| | |")
        for r in rows
    ]
    return GRADIENT_HEAD + "\n".join(lines)


def forward_table(rows: list[dict[str, Any]]) -> str:
    """Ours against SciPy."""
    lines = [
        f"| {r['n']} | {r['spectrum']} | {r['u_error']:.0e} | {r['arpack_ratio']:.1f}× "
        f"| {r['arpack_u_error']:.0e} | {r['propack_ratio']:.1f}× | {r['propack_u_error']:.0e} |"
        for r in rows
    ]
    return FORWARD_HEAD + "\n".join(lines)


def training_table(rows: list[dict[str, Any]]) -> str:
    """Steps with every layer normalised."""
    lines = [
        f"| {r['width']} | {r['free_ms']:.0f} ms | {r['torch_over_free']:.2f}× "
        f"| {r['cap_over_free']:.2f}× | {r['cap_over_torch']:.2f}× "
        f"| {r['torch_norm_largest']:.4f} | {r['cap_norm_largest']:.7f} |"
        for r in rows
    ]
    return TRAINING_HEAD + "\n".join(lines)


def bound_table(rows: list[dict[str, Any]]) -> str:
    """Upper bounds."""
    lines = [
        f"| {r['n']} | {r['rigorous_over_svdvals']:.2f} | {r['rigorous_ms']:.0f} ms "
        f"| {r['rigorous_excess']:.0e} | {r['probable_over_svdvals']:.2f} "
        f"| {r['probable_excess']:.0e} | {r['probable_3_over_svdvals']:.2f} "
        f"| {r['probable_3_excess']:.0e} |"
        for r in rows
    ]
    return BOUND_HEAD + "\n".join(lines)


def fit_table(rows: list[dict[str, Any]]) -> str:
    """Bias of sigma and cost of a bulk fit."""
    lines = []
    for r in rows:
        cells = " | ".join(
            f"{100 * r['cases'][case]['sigma_bias']:+.2f} % "
            f"({100 * r['cases'][case]['rms_bias']:+.0f} %)"
            for case in ("strong", "mixed", "half hidden")
        )
        lines.append(
            f"| {size(r)} | {r['spiked']} | {cells} | {r['fit_ms']:.1f} ms "
            f"| {r['fit_ms'] / r['svd_ms']:.2f} |"
        )
    return FIT_HEAD + "\n".join(lines)


def alarm_table(rows: list[dict[str, Any]]) -> str:
    """How often noise is taken for more."""
    lines = [
        f"| {size(r)} "
        + "".join(
            f"| {100 * r[kind]['0.05']:.1f} % ({100 * r[kind]['0.01']:.1f} %) "
            for kind in ("fitted", "known")
        )
        + f"| {100 * r['empirical_5_percent']:.1f} % | {100 * r['asymptotic_edge']:.0f} % "
        f"| {100 * r['called_not_white']:.2f} % |"
        for r in rows
    ]
    return ALARM_HEAD + "\n".join(lines)


def predicted_table(measured: dict[str, Any]) -> str:
    """Agreement on MiniLM's adapters."""
    kinds = {"all": "all", "encoder": "encoder", "random_vectors": "encoder, random vectors"}
    lines = []
    for kind, label in kinds.items():
        r = measured[kind]
        lines.append(
            f"| {r['spikes']} | {label} | {r['location_r2']:.2f} "
            f"| {100 * r['relative_error_median']:.1f} % | {r['within_3_sd']} "
            f"| {r['overlap_r2']:.2f} "
            f"| {r['intruder_expected']}, {r['intruder_measured']}, {r['intruder_both']} |"
        )
    return PREDICTED_HEAD + "\n".join(lines)


def size(row: dict[str, Any]) -> str:
    """A shape as it is spoken."""
    return "{} × {}".format(*row["shape"])


def solver_table(rows: list[dict[str, Any]], k: int) -> str:
    """Milliseconds and passes of each solver on each spectrum."""
    lines = []
    for solver in dict.fromkeys(row["solver"] for row in rows):
        cells = {r["spectrum"]: r for r in rows if (r["solver"], r["k"]) == (solver, k)}
        if cells:
            lines.append(
                f"| `{solver}` | "
                + " | ".join(
                    f"{cells[s]['ms']:.1f} ms, {cells[s]['passes']}"
                    + ("" if cells[s]["status"] == "CONVERGED" else " (stopped)")
                    for s in SPECTRA
                )
                + " |"
            )
    return SOLVER_HEAD.format(*SPECTRA, k=k) + "\n".join(lines)


def adjoint_table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of each backward solver on each spectrum."""
    lines = []
    for adjoint in dict.fromkeys(row["adjoint"] for row in rows):
        cells = {r["spectrum"]: r for r in rows if r["adjoint"] == adjoint}
        lines.append(
            f"| `{adjoint}` | " + " | ".join(f"{cells[s]['ms']:.1f} ms" for s in SPECTRA) + " |"
        )
    return SOLVER_HEAD.format(*SPECTRA, k=1).replace("solver", "adjoint") + "\n".join(lines)


def crossover_table(rows: list[dict[str, Any]]) -> str:
    """Where a dense SVD stops paying."""
    return CROSSOVER_HEAD.format(
        " | ".join(str(row["n"]) for row in rows),
        "---|" * len(rows),
        " | ".join(f"{row['dense_over_lanczos']:.1f}" for row in rows),
    ).rstrip()
