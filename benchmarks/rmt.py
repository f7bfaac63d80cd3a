"""Is a bulk fitted well, and does noise set off alarms?

    python benchmarks/rmt.py fit       # bias of sigma with spikes present, time against an SVD
    python benchmarks/rmt.py alarms    # false alarms on pure noise: some minutes
    python benchmarks/rmt.py           # both

Noise is drawn by its singular values: those of a bidiagonal matrix of independent χ variables have
the law of those of a Gaussian matrix (Dumitriu and Edelman, arXiv:math-ph/0206043).
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import numpy as np
from common import store
from scipy.linalg import eigvalsh_tridiagonal

from bulkedge.rmt import WhiteBulk, count_outliers, edge_test, fit_bulk

SHAPES = [(100, 100), (400, 400), (200, 800)]
DRAWS = 10_000
LEVELS = (0.01, 0.05, 0.1)
SPIKED = 0.05
STRENGTHS = {"strong": (2.0, 10.0), "mixed": (1.2, 4.0), "half hidden": (0.5, 2.0)}


def noise(shape: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """Singular values of a Gaussian matrix with entries of variance 1, descending."""
    p, longer = min(shape), max(shape)
    diagonal = np.sqrt(generator.chisquare(longer - np.arange(p)))
    beside = np.sqrt(generator.chisquare(p - 1 - np.arange(p - 1)))
    squares = diagonal**2 + np.concatenate([[0.0], beside**2])
    found = eigvalsh_tridiagonal(squares, diagonal[:-1] * beside)
    return np.sqrt(found[::-1].clip(0.0))


def alarms(shape: tuple[int, int], draws: int) -> dict[str, Any]:
    """How often noise is taken for more, by each test."""
    generator = np.random.default_rng(0)
    fitted, known, empirical, asymptotic, misfits, limit, sigmas = [], [], [], 0, [], 0.0, []
    for _ in range(draws):
        values = noise(shape, generator)
        fit = fit_bulk(values, shape)
        fitted.append(edge_test(values[0], shape, sigma=fit.sigma, fitted=True))
        known.append(edge_test(values[0], shape, sigma=1.0))
        empirical.append(count_outliers(values)[0] > 0)
        asymptotic += int(values[0] > WhiteBulk(shape).edge)
        misfits.append(fit.misfit)
        limit = fit.misfit_limit
        sigmas.append(fit.sigma)
    return {
        "shape": list(shape),
        "draws": draws,
        "fitted": {str(level): float(np.mean(np.array(fitted) < level)) for level in LEVELS},
        "known": {str(level): float(np.mean(np.array(known) < level)) for level in LEVELS},
        "empirical_5_percent": float(np.mean(empirical)),
        "asymptotic_edge": asymptotic / draws,
        "called_not_white": float(np.mean(np.array(misfits) > limit)),
        "sigma_bias": float(np.mean(sigmas)) - 1,
        "sigma_sd": float(np.std(sigmas)),
        "sigma_error": fit.sigma_error,
    }


def spiked(shape: tuple[int, int], strengths: tuple[float, float], seed: int) -> np.ndarray:
    """Noise with one value in twenty spiked, strengths in thresholds."""
    generator = np.random.default_rng(seed)
    m, n = shape
    count = int(SPIKED * min(shape))
    u = np.linalg.qr(generator.standard_normal((m, count)))[0]
    v = np.linalg.qr(generator.standard_normal((n, count)))[0]
    theta = np.linspace(*strengths, count) * WhiteBulk(shape).threshold
    return generator.standard_normal(shape) + (u * theta) @ v.T


def fit(shape: tuple[int, int], repeats: int) -> dict[str, Any]:
    """Bias of sigma, spikes found, and milliseconds beside those of the singular values."""
    row: dict[str, Any] = {"shape": list(shape), "spiked": int(SPIKED * min(shape)), "cases": {}}
    fits, svds = [], []
    for name, strengths in STRENGTHS.items():
        sigmas, rms, spikes = [], [], []
        for seed in range(repeats):
            W = spiked(shape, strengths, seed)
            start = time.perf_counter()
            values = np.linalg.svd(W, compute_uv=False)
            middle = time.perf_counter()
            found = fit_bulk(values, shape)
            fits.append(1e3 * (time.perf_counter() - middle))
            svds.append(1e3 * (middle - start))
            sigmas.append(found.sigma)
            rms.append(np.sqrt(np.mean(W**2)))
            spikes.append(found.spikes)
        row["cases"][name] = {
            "sigma_bias": float(np.mean(sigmas)) - 1,
            "sigma_bias_error": float(np.std(sigmas)) / repeats**0.5,
            "rms_bias": float(np.mean(rms)) - 1,
            "spikes_found": float(np.mean(spikes)),
        }
    return row | {"fit_ms": statistics.median(fits), "svd_ms": statistics.median(svds)}


def main(parts: list[str]) -> None:
    """Run the parts that are named, all if none is."""
    if not parts or "fit" in parts:
        fit((100, 100), 1)  # the Tracy–Widom table is made once
        # repeats; the last shape takes minutes, for its singular values
        shapes = {
            (400, 400): 100,
            (200, 800): 100,
            (384, 1536): 30,
            (1000, 1000): 10,
            (4096, 4096): 3,
        }
        store("bulk_fit", {"rows": [fit(*item) for item in shapes.items()]})
    if not parts or "alarms" in parts:
        store("alarms", {"rows": [alarms(shape, DRAWS) for shape in SHAPES]})


if __name__ == "__main__":
    main(sys.argv[1:])
