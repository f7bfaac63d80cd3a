"""Write docs/benchmarks.md and the tables of docs/how-to-choose.md from the stored results.

python benchmarks/render.py

No figure in them is typed by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import render_certified
import render_finetune
import render_repair

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
grow with the checkpoint; for a square matrix it is {copies_of_square} times. `bulkedge audit --dry-run` tells the
peak beforehand. Two dense SVDs (`--method dense`, and matrices that the certificate leaves open) take some
ten copies in float64 more.

{memory_where}

{certified}
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

## Bulks and edges

A Gaussian matrix of entries with σ = 1, one value in twenty spiked, strengths evenly from 2 to 10 thresholds
(*strong*), 1.2 to 4 (*mixed*), 0.5 to 2 (*half hidden*: a third of the spikes makes no outlier, and no method
can tell it from noise). Each cell has the mean bias of the fitted σ and, in parentheses, that of the root
mean square of the entries.

{fit_table}

{fit_where}

**False alarms.** {draws:,} pure noise matrices of each shape: how often the largest singular value is called an
outlier at the nominal 5 % (1 %), with σ fitted to the same values; by the Tracy–Widom law with σ known; by the
empirical edge, which knows no σ and no law; and by the mere question whether it exceeds τ(√m + √n). The
last column is how often noise is called *not white*.

{alarm_table}

{alarm_where}

## Predicted against measured

For every spike of the two shipped LoRA adapters above the threshold of its MiniLM matrix: the outlier and
the overlap that generic vectors would have, from the base's singular values and the spike's strength alone,
beside the outlier that is there.

![Measured against expected outliers and overlaps of MiniLM's adapters](figures/predicted.svg)

{predicted_table}

R² is 1 − Σ(measured − expected)²/Σ(measured − mean)², with no line fitted. *Random vectors* are the encoder's
spikes once more, same bases, same strengths, with u and v drawn at random. So theory and fit of the edge
hold on trained weights, {not_white} of whose {matrices} bulks are not white; what fails is the
assumption that a trained update is generic: its left vectors have {aligned:.1f} times the share of a generic vector in the base's leading 20
directions. Overlaps are predicted less well than places, since beside an own outlier of the base, of which
trained matrices have many, two vectors mix.

Counted by matrix: {same_count} of {matrices} have as many outliers beyond the edge as expected, {measured_outliers} in all where
{predicted_outliers} were expected. Of the {with_intruders} matrices in which the audit finds intruders, {with_intruders_above} have a spike above the threshold; of
the {without_intruders} others, {without_intruders_above} have one too. A spike above its threshold is close to necessary for an intruder, not
sufficient: an update along what the base already has strengthens that.

The secular equation assumes nothing, and finds every one of these outliers without an SVD of the tuned matrix,
within {exact_error_largest:.0e} (relative) of LAPACK's.

{predicted_where}
"""

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


def predictions(measured: dict[str, Any]) -> dict[str, float]:
    """Counts of the predictions on MiniLM's adapters."""
    names = (
        "matrices", "not_white", "same_count", "predicted_outliers", "measured_outliers",
        "with_intruders", "with_intruders_above", "without_intruders_above", "exact_error_largest",
    )  # fmt: skip
    return {name: measured[name] for name in names} | {
        "aligned": measured["encoder"]["aligned_median"],
        "without_intruders": measured["matrices"] - measured["with_intruders"],
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
    for kind, told in kinds.items():
        r = measured[kind]
        lines.append(
            f"| {r['spikes']} | {told} | {r['location_r2']:.2f} "
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


def render() -> str:
    """docs/benchmarks.md."""
    names = ("audit_memory", "precision", "triplet", "bad_gradients", "training_step")
    memory, precision, triplet, bad, training = (result(name) for name in names)
    fit, alarms, predicted = (result(name) for name in ("bulk_fit", "alarms", "predicted"))
    certified = [result(f"certified_{name}") for name in ("speed", "cost")]
    models = [
        json.loads(path.read_text())
        for path in sorted((HERE / "results").glob("certified_model_*.json"))
    ]
    models.sort(key=lambda model: -model["measured"]["scale"])
    return PAGE.format(
        certified=render_certified.section(certified[0], models, certified[1], where),
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
        fit_table=fit_table(fit["measured"]["rows"]),
        alarm_table=alarm_table(alarms["measured"]["rows"]),
        draws=alarms["measured"]["rows"][0]["draws"],
        predicted_table=predicted_table(predicted["measured"]),
        **predictions(predicted["measured"]),
        fit_where=where(fit),
        alarm_where=where(alarms),
        predicted_where=where(predicted),
        memory_where=where(memory),
        precision_where=where(precision),
        triplet_where=where(triplet),
        bad_gradients_where=where(bad),
        training_where=where(training),
    )


def choices() -> dict[str, str]:
    """The tables of docs/how-to-choose.md."""
    stored = result("choose")
    measured = stored["measured"]
    return {
        "solvers-1": solver_table(measured["forward"], 1),
        "solvers-10": solver_table(measured["forward"], 10),
        "adjoints": adjoint_table(measured["backward"]),
        "crossover": crossover_table(measured["crossover"]),
        "where": where(stored),
    }


def repairs() -> dict[str, str]:
    """The table of docs/repair.md."""
    stored = result("repair")
    table = render_repair.repair_table(stored["measured"]["rows"])
    return {"repair": table, "where": where(stored)}


def finetunes() -> dict[str, str]:
    """The tables of docs/fine-tuning.md."""
    runs, rates, monitor = (result(name) for name in ("finetune", "finetune_rates", "monitor"))
    return {
        "finetune": render_finetune.finetune_table(
            runs["measured"]["rows"], result("finetune_times")["measured"]["step_ms"]
        ),
        "rates": render_finetune.rates_line(rates["measured"]["rows"]),
        "finetune where": where(runs),
        "watching": render_finetune.watching(monitor["measured"]) + "\n\n" + where(monitor),
    }


def pages() -> dict[str, str]:
    """What docs/report.md says of a page in a browser."""
    stored = result("report_page_1")
    told = stored["measured"]
    return {
        "page": (
            f"Measured for a made-up model of the shape of 7B, both sides ({told['matrices']} matrices, "
            f"{told['directions']} directions): the page has {told['page_MB']:.1f} MB, is seen "
            f"{told['seen_ms'] / 1e3:.1f} s after it was opened, and a matrix with its charts {told['opened_ms'] / 1e3:.1f} s "
            f"after the click (medians in headless Chromium, `benchmarks/report_page.py --scale 1`).\n\n{where(stored)}"
        )
    }


FILLED = {
    "how-to-choose.md": choices,
    "repair.md": repairs,
    "fine-tuning.md": finetunes,
    "report.md": pages,
}
"""Pages that have tables of measurements between words, and what makes these."""


def fill(page: str, tables: dict[str, str]) -> str:
    """A page with its tables anew, each between its two comments."""
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = page.partition(begin)
        if not found:
            raise ValueError(f"no place for {name}")
        page = before + begin + table + "\n" + end + rest.partition(end)[2]
    return page


if __name__ == "__main__":
    (DOCS / "benchmarks.md").write_text(render())
    for page, tables in FILLED.items():
        (DOCS / page).write_text(fill((DOCS / page).read_text(), tables()))
    print(f"wrote {DOCS}")
