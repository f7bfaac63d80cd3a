"""Write docs/benchmarks.md and the tables of docs/how-to-choose.md from the stored results.

python benchmarks/render.py

No figure in them is typed by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"

PAGE = """# Benchmarks

`make bench` runs the scripts in `benchmarks/`, stores each result with its commit and machine in
`benchmarks/results/`, and writes this page from them.

## Memory of an audit

A made-up sharded float32 checkpoint with a LoRA adapter on every matrix, audited in one process. The
largest matrix, an embedding of 32768 × 1024, has {largest_matrix_MB} MB; importing torch and this
package alone takes {imports_alone_MB} MB.

| checkpoint | matrices | peak memory |
|---|---|---|
| {small[checkpoint_MB]:,} MB | {small[matrices]} | {small[peak_MB]:,} MB |
| {large[checkpoint_MB]:,} MB | {large[matrices]} | {large[peak_MB]:,} MB |

The peak is that of the largest matrix, {copies_of_largest} times its size in float32 beyond the imports, and does not
grow with the checkpoint. A square matrix costs most, {copies_of_square} times its size in float32: the float64
SVD needs four more copies of it to work in. `bulkedge audit --dry-run` tells the peak beforehand.

{memory_where}

## Precision

Over the {directions} leading directions of the two shipped MiniLM adapters:

| what | figure |
|---|---|
| median gap of neighbouring base singular values, over σ₁ | {relative_gap_median:.1e} |
| one gap in a hundred is below | {relative_gap_1_percent:.1e} |
| largest change of a score when all is done in float32 instead of float64 | {score_change_largest:.1e} |
| SVD of a 512 × 8192 matrix, time over that of its transpose (median of 5 pairs) | {wide_over_tall_512x8192:.1f} |

{precision_where}

## The top triplet and its gradient

Forward and backward of u and v of a square float32 matrix, one thread; each peer's time over ours,
median of pairs in one run (9 at n = 256, 3 at 2048, one at 4096), and the relative error of the gradient against float64. *svd* is
`torch.linalg.svd` through autograd, *lowrank* `torch.svd_lowrank` with its defaults, *seed* the
recipe of the seeds' author (power iteration, dense augmented least squares) with a sound
least-squares driver. *gap* is (σ₁ − σ₂)/σ₁.

{gradient_table}

`torch.linalg.svd` in float32 leaves an error of about eps·σ/gap; our last digits are taken in float64,
and that is part of our time.

**What was aimed at, and missed.** At n = 2048: 30 times *svd* on noise and 100 times on a decaying
spectrum, with errors below 1e-5. Found: {goal_gaussian:.0f} and {goal_decaying:.0f} times ({goal_large_gaussian:.0f} and {goal_large_decaying:.0f} at 4096), with errors of
{goal_gaussian_error:.0e} and {goal_decaying_error:.0e}. On noise the gap is the reason: {goal_passes} passes over the matrix, each at the speed of
memory, come before any arithmetic of ours; LAPACK's SVD runs at the speed of the processor, and here
that one is fast. Against *seed*, 20 times were aimed at up to n = 1024: {goal_seed_low:.0f} to {goal_seed_high:.0f} were found, least on
small matrices, where our steps cost what Python costs.

The forward half alone beside SciPy's `svds`, which has no derivative; *sine* is that of the angle
between u and the true vector:

{forward_table}

{triplet_where}

**Bad gradients.** Over {seeds:,} Gaussian matrices of 256 × 256 in float32, {bad} gradients are off
by more than 1e-3; the largest error is {error_largest:.1e}, the median {error_median:.1e}, and {warned} came
with a warning. The seeds' system solved by `torch.linalg.lstsq` with its default driver on the CPU
([pytorch#71222](https://github.com/pytorch/pytorch/issues/71222)): {default_lstsq_bad} of {default_lstsq_seeds} are off by more than 1e-3,
the largest error is {default_lstsq_error_largest:.1e}.

{bad_gradients_where}

## Capped layers

A training step of four square Gaussian layers, batch {batch}, float32, one thread, {steps} steps: with
every layer normalised by torch's `spectral_norm` (one power iteration) and by `spectral_cap`. *norm* is
the largest true ‖W/σ̂‖₂ that a layer had, by float64 SVD.

{training_table}

What an upper bound of a Gaussian matrix costs, over `torch.linalg.svdvals`, and how far above the true
norm it ends. *Rigorous* is a proof, *probable* fails with probability 1e-9.

{certificate_table}

{training_where}
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
CERTIFICATE_HEAD = """| n | rigorous | time | excess | probable (1 %) | excess | probable (0.1 %) | excess |
|---|---|---|---|---|---|---|---|
"""
SOLVER_HEAD = "| solver, k = {k} |" + " {} |" * 4 + "\n|---|" + "---|" * 4 + "\n"
CROSSOVER_HEAD = "| n | {} |\n|---|{}\n| dense over Lanczos | {} |\n"
SPECTRA = ("gaussian", "decaying", "spiked", "nearly degenerate")


def result(name: str) -> dict[str, Any]:
    """A stored result."""
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def where(stored: dict[str, Any]) -> str:
    """The machine of a result on one line."""
    place = stored["where"]
    return (
        f"*Commit {place['commit']}; {place['processor']}, {place['cores']} cores, "
        f"{place['threads']} thread; Python {place['python']}, torch {place['torch']}.*"
    )


def goals(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The figures that the design named beforehand."""
    at = {(r["n"], r["spectrum"]): r for r in rows}
    seed = [r["seed_ratio"] for r in rows if "seed_ratio" in r]
    return {
        "goal_gaussian": at[2048, "gaussian"]["svd_ratio"],
        "goal_decaying": at[2048, "decaying"]["svd_ratio"],
        "goal_large_gaussian": at[4096, "gaussian"]["svd_ratio"],
        "goal_large_decaying": at[4096, "decaying"]["svd_ratio"],
        "goal_gaussian_error": at[2048, "gaussian"]["ours_error"],
        "goal_decaying_error": at[2048, "decaying"]["ours_error"],
        "goal_passes": at[2048, "gaussian"]["passes"],
        "goal_seed_low": min(seed),
        "goal_seed_high": max(seed),
    }


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


def certificate_table(rows: list[dict[str, Any]]) -> str:
    """Upper bounds."""
    lines = [
        f"| {r['n']} | {r['rigorous_over_svdvals']:.2f} | {r['rigorous_ms']:.0f} ms "
        f"| {r['rigorous_excess']:.0e} | {r['probable_over_svdvals']:.2f} "
        f"| {r['probable_excess']:.0e} | {r['probable_3_over_svdvals']:.2f} "
        f"| {r['probable_3_excess']:.0e} |"
        for r in rows
    ]
    return CERTIFICATE_HEAD + "\n".join(lines)


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


def render() -> str:
    """docs/benchmarks.md."""
    names = ("audit_memory", "precision", "triplet", "bad_gradients", "training_step")
    memory, precision, triplet, bad, training = (result(name) for name in names)
    return PAGE.format(
        **goals(triplet["measured"]["rows"]),
        **memory["measured"],
        **precision["measured"],
        **bad["measured"],
        batch=training["measured"]["batch"],
        steps=training["measured"]["steps"],
        gradient_table=gradient_table(triplet["measured"]["rows"]),
        forward_table=forward_table(triplet["measured"]["rows"]),
        training_table=training_table(training["measured"]["rows"]),
        certificate_table=certificate_table(training["measured"]["certificates"]),
        memory_where=where(memory),
        precision_where=where(precision),
        triplet_where=where(triplet),
        bad_gradients_where=where(bad),
        training_where=where(training),
    )


def fill(page: str) -> str:
    """docs/how-to-choose.md with its tables anew, each between its two comments."""
    stored = result("choose")
    measured = stored["measured"]
    tables = {
        "solvers-1": solver_table(measured["forward"], 1),
        "solvers-10": solver_table(measured["forward"], 10),
        "adjoints": adjoint_table(measured["backward"]),
        "crossover": crossover_table(measured["crossover"]),
        "where": where(stored),
    }
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = page.partition(begin)
        if not found:
            raise ValueError(f"no place for {name}")
        page = before + begin + table + "\n" + end + rest.partition(end)[2]
    return page


if __name__ == "__main__":
    (DOCS / "benchmarks.md").write_text(render())
    choose = DOCS / "how-to-choose.md"
    choose.write_text(fill(choose.read_text()))
    print(f"wrote {DOCS}")
