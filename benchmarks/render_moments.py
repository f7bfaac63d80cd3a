"""The tables of docs/moments.md: what moments cost, what sketches lose, how many texts they need."""

from __future__ import annotations

from typing import Any

GIGABYTE = 1e9
LAYERS_7B = 32
"""Layers of a 7B model; of each three inputs of 4096 and one of 11008 are measured."""


def layer_table(rows: list[dict[str, Any]]) -> str:
    """Time and memory of one layer."""
    lines = [
        "| inputs | r | forward | exact sum | sketch | at the end: exact | sketch | memory: exact | sketch | file: exact | sketch |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        alone, ways = row["alone"], (row["exact"], row["sketch"])
        cells = [f"{row['width']:,}", f"{row['rank']}"]
        cells.append(f"{1e6 * alone['forward_s'] / row['rows']:,.0f} ms")  # of 1,000 tokens
        cells += [f"{1e6 * (w['both_s'] - w['forward_s']) / row['rows']:,.0f} ms" for w in ways]
        cells += [f"{way['save_s']:.2f} s" for way in ways]
        cells += [f"{way['peak_mb'] - alone['peak_mb']:,.0f} MB" for way in ways]
        cells += [f"{way['file_mb']:,.1f} MB" for way in ways]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rank_table(found: dict[str, Any]) -> str:
    """What sketches of MiniLM's moments lose."""
    lines = [
        "| rank | file | 384 inputs, cut | streamed | 1,536 inputs, cut | streamed |",
        "|---|---|---|---|---|---|",
        f"| all | {found['file_mb']:.0f} MB | 0 |  | 0 |  |",
    ]
    for row in found["rows"]:
        cells = [
            _losses(row[f"{way}_{width}"]) for width in (384, 1536) for way in ("cut", "streamed")
        ]
        lines.append(f"| {row['rank']} | {row['file_mb']:.0f} MB | {' | '.join(cells)} |")
    return "\n".join(lines)


def _losses(found: dict[str, float] | None) -> str:
    """Median and largest loss."""
    return "" if found is None else f"{found['median']:.1%} ({found['largest']:.1%})"


def text_table(rows: list[dict[str, Any]]) -> str:
    """How far moments of some texts are from those of others."""
    lines = ["| texts | inputs | apart, median layer | largest |", "|---|---|---|---|"]
    lines += [
        f"| {row['texts']} | {row['inputs']:,} | {row['median']:.1%} | {row['largest']:.1%} |"
        for row in rows
    ]
    return "\n".join(lines)


def sizes_7b() -> dict[str, float]:
    """Gigabytes of a 7B model's moments by their formulas: in memory, and in the file."""
    matrices = 3 * 4096**2
    wide, thin = 11008**2, 11008 * (3 * 1024 + 33)
    return {
        "exact": 12 * LAYERS_7B * (matrices + wide) / GIGABYTE,
        "default": 12 * LAYERS_7B * (matrices + thin) / GIGABYTE,
        "file_exact": 4 * LAYERS_7B * (matrices + wide) / GIGABYTE,
        "file_default": 4 * LAYERS_7B * (matrices + 11008 * 1025) / GIGABYTE,
        "file_256": 4 * LAYERS_7B * 257 * (3 * 4096 + 11008) / GIGABYTE,
    }
