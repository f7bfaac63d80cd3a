"""The tables of docs/random-matrices.md, from their stored results."""

from __future__ import annotations

import statistics
from typing import Any

LEVELS = ("0.001", "0.01", "0.05", "0.5")
NULL = """| noise | test | p < 0.001 | p < 0.01 | p < 0.05 | p < 0.5 |
|---|---|---|---|---|---|
"""
ENDS = """| matrices | | misfit over its limit | mean ratio | smallest p of it | with large, small outliers | left vectors that are no noise: top, middle, bottom | right vectors |
|---|---|---|---|---|---|---|---|
"""
SURE = 0.01
"""A vector with a smaller p-value is counted as no noise."""
PLACES = ("top", "middle", "bottom")


def null_table(found: dict[str, Any]) -> str:
    """How often p-values of noise are below each level."""
    lines = []
    for row in found["rows"]:
        shape = "×".join(map(str, row["shape"]))
        for name in ("spacings", "lower edge", "lower edge, fitted", "lower edge, no law"):
            lines.append(_line([f"{shape}, {row['draws']:,} draws", name, *_rates(row[name])]))
    for row in found["vectors"]:
        noise = f"{row['size']} components, {row['draws']:,} draws"
        lines.append(_line([noise, "vectors", *_rates(row["vectors"])]))
    return NULL + "\n".join(lines)


def not_white(found: dict[str, Any]) -> dict[str, str]:
    """The range of how often noise is called none."""
    shares = [row["called_not_white"] for row in found["rows"]]
    return {"least": f"{100 * min(shares):.1f} %", "most": f"{100 * max(shares):.1f} %"}


def ends_table(rows: list[dict[str, Any]]) -> str:
    """Both ends of MiniLM's spectra, by kinds of matrices."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    return ENDS + "\n".join(_kind(name, kind) for name, kind in kinds.items())


def ends(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over all matrices but the pooler, which was never trained."""
    trained = [row for row in rows if row["kind"] != "pooler"]
    shares = {
        place: statistics.mean(p < SURE for row in trained for side in ("left", "right")
                               for p in row["vectors"][f"{side} {place}"])
        for place in PLACES
    }  # fmt: skip
    ratios = [row["repulsion"][0] for row in trained]
    return {
        "matrices": len(trained),
        "white": sum(row["white"] for row in trained),
        "pooler": sum(row["white"] for row in rows) - sum(row["white"] for row in trained),
        "mean": statistics.mean(ratios),
        "least_p": min(row["repulsion"][1] for row in trained),
        "rejected": sum(row["repulsion"][1] < 1e-3 for row in trained),
        "large": sum(row["upper"][0] > 0 for row in trained),
        "small": sum(row["lower"][0] > 0 for row in trained),
        **{place: 100 * share for place, share in shares.items()},
    }


def _kind(name: str, rows: list[dict[str, Any]]) -> str:
    """One kind of matrices."""
    outliers = [sum(row[end][0] > 0 for row in rows) for end in ("upper", "lower")]
    vectors = [
        ", ".join(
            f"{statistics.mean(p < SURE for row in rows for p in row['vectors'][f'{side} {place}']):.0%}".replace("%", " %")
            for place in PLACES
        )
        for side in ("left", "right")
    ]  # fmt: skip
    return _line([
        f"{name}, {'×'.join(map(str, rows[0]['shape']))}",
        str(len(rows)),
        f"{statistics.median(row['misfit'] for row in rows):.1f}",
        f"{statistics.mean(row['repulsion'][0] for row in rows):.3f}",
        f"{min(row['repulsion'][1] for row in rows):.3f}",
        f"{outliers[0]}, {outliers[1]}",
        *vectors,
    ])  # fmt: skip


def _rates(found: dict[str, float]) -> list[str]:
    return [f"{100 * found[level]:.2f} %" for level in LEVELS]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
