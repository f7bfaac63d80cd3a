"""``bulkedge inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from bulkedge._errors import printable


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def inspect(path: Path, as_json: bool) -> None:
    """List the tensors of a checkpoint or an adapter from its headers."""
    from bulkedge.checkpoint import is_adapter, open_adapter, open_checkpoint

    if is_adapter(path):
        adapter = open_adapter(path)
        rows = [
            {"name": name, "shape": list(f.shape), "dtype": f.infos[0].dtype, "rank": f.rank,
             "scale": f.scale} for name, f in adapter.factors.items()
        ]  # fmt: skip
        rows += [
            {"name": name, "shape": list(info.shape), "dtype": info.dtype}
            for name, info in adapter.tensors.items()
        ]
        rows += [
            {"name": info.name, "shape": list(info.shape), "dtype": info.dtype}
            for wrapped in adapter.wrapped
            for info in wrapped.infos
        ]
        rows += [{"name": row.info.name, "not_handled": row.reason} for row in adapter.unhandled]
    else:
        rows = [
            {"name": name, "shape": list(info.shape), "dtype": info.dtype, "file": info.file.name}
            for name, info in open_checkpoint(path).tensors.items()
        ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        click.echo(_told(row))


def _told(row: dict[str, Any]) -> str:
    """One tensor on one line."""
    name = printable(row["name"])
    if "not_handled" in row:
        return f"{name}  ({printable(row['not_handled'])})"
    line = f"{name}  {row['dtype']}  {'×'.join(map(str, row['shape'])) or 'scalar'}"
    return line + (f"  lora r={row['rank']} scale={row['scale']:g}" if "rank" in row else "")
