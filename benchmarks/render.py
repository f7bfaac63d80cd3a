"""Write docs/benchmarks.md from the stored results: no figure in it is typed by hand.

python benchmarks/render.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TARGET = HERE.parent / "docs/benchmarks.md"

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
"""


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


def render() -> str:
    """The page."""
    memory, precision = result("audit_memory"), result("precision")
    return PAGE.format(
        **memory["measured"],
        **precision["measured"],
        memory_where=where(memory),
        precision_where=where(precision),
    )


if __name__ == "__main__":
    TARGET.write_text(render())
    print(f"wrote {TARGET}")
