"""``bulkedge inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bulkedge._errors import count, printable

from ._hub import download_option, fetch_if_asked

if TYPE_CHECKING:
    from bulkedge.checkpoint import Adapter, Checkpoint, TensorInfo

Row = dict[str, Any]


@click.command(short_help="List the tensors of a checkpoint or adapter.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@download_option
def inspect(path: Path, as_json: bool, download: bool) -> None:
    """List the tensors of a checkpoint or an adapter from its headers.

    For an adapter, each layer has the name of the weight that it updates; a layer that cannot be
    used has the reason.  The last line says what PATH is and how its weights are quantised.
    """
    from bulkedge.checkpoint import Adapter, open_path

    fetch_if_asked((path,), {"download": download, "quiet": as_json})
    opened, kind = open_path(path), ""
    if isinstance(opened, Adapter):
        rows = _adapter_rows(opened)
        summary, kind = _summary(opened), opened.kind
    else:
        rows = _model_rows(opened)
        summary = _what_model(opened)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        click.echo(_line(row, kind))
    click.echo(summary)


def _tensor(name: str, info: TensorInfo) -> Row:
    return {"name": name, "shape": list(info.shape), "dtype": info.dtype}


def _model_rows(model: Checkpoint) -> list[Row]:
    """The tensors as they are stored; those of GGUF with the shape of their numbers."""
    rows: list[Row] = []
    for name, info in model.tensors.items():
        row = _tensor(name, info)
        if model.codecs is not None and (codec := model.weights[name]).quantised:
            row |= {"shape": list(codec.shape), "dtype": codec.quantised}
        rows.append(row | {"file": info.file.name})
    return rows


def _adapter_rows(adapter: Adapter) -> list[Row]:
    """Updates, replacements, layers that cannot be used, and what is no part of a layer."""
    rows: list[Row] = [
        {
            "name": name,
            "shape": [side or None for side in f.shape],  # None where only the base has it
            "dtype": f.infos[0].dtype,
            "rank": f.rank,
            "scale": f.scale,
        }
        for name, f in adapter.factors.items()
    ]
    rows += [_tensor(name, info) for name, info in adapter.tensors.items()]
    rows += [_tensor(info.name, info) for wrapped in adapter.wrapped for info in wrapped.infos]
    rows += [{"name": name, "not_usable": why} for name, why in _unusable(adapter).items()]
    set_aside = (row for row in adapter.unhandled if row.set_aside)
    return rows + [{"name": row.info.name, "not_handled": row.reason} for row in set_aside]


def _unusable(adapter: Adapter) -> dict[str, str]:
    """The weights whose update is stored and cannot be used, each once, with the reason."""
    return {row.name: row.reason for row in adapter.unhandled if not row.set_aside}


def _summary(adapter: Adapter) -> str:
    """What an adapter is, in one line."""
    ranks = sorted({f.rank for f in adapter.factors.values() if f.rank is not None})
    parts = f"{count(len(adapter.factors), 'layer')} updated"
    if ranks:
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        parts += f" by factors of rank {span}"
    if adapter.wrapped:
        parts += f", {count(len(adapter.wrapped), 'module')} by their bare parameters"
    if adapter.tensors:
        parts += f", {count(len(adapter.tensors), 'tensor')} replaced"
    if unusable := _unusable(adapter):
        parts += f", {count(len(unusable), 'layer')} NOT usable"
    base = adapter.config.base_model_name_or_path
    trained = f"; trained on {printable(base)}" if isinstance(base, str) and base else ""
    origin = adapter.origin and f" {adapter.origin}"
    return f"{adapter.method} adapter{origin}: {parts}{trained}"


def _what_model(model: Checkpoint) -> str:
    """What a full model is, in one line."""
    from bulkedge.checkpoint.packed import packed_by
    from bulkedge.checkpoint.shard import shard_of
    from bulkedge.checkpoint.writer import by

    form = {"gguf": "GGUF", "file": "one file", "folder": "one file and its configuration"}.get(
        model.kind
    )
    form = form or count(len(model.files), "shard")
    if model.kind == "file" and (part := shard_of(model.files[0].name)) is not None:
        form = f"file {part[0]} of {part[1]}, which is a part of the model"
    kind, version = (model.config.get(name) for name in ("model_type", "transformers_version"))
    name = f" of type {printable(kind)}" if isinstance(kind, str) else ""
    name += f" {by('transformers', version)}" if version else ""
    told = f"full model{name}: {count(len(model.tensors), 'tensor')} in {form}"
    if model.superseded:
        told += f", {count(len(model.superseded), 'superseded copy', 'superseded copies')}"
    if model.quantised:
        told += f"; quantised: {model.quantised}"
    if (packed := packed_by(model)) is not None:
        told += f"; quantised by {packed[-1]}, which is NOT read"
    return told


def _side(length: int | None) -> str:
    """One side of a shape; a question mark where only the base has it."""
    return "?" if length is None else str(length)


def _line(row: Row, kind: str = "") -> str:
    """One tensor on one line; ``kind`` is that of the adapter."""
    name = printable(row["name"])
    if "not_usable" in row:
        return f"{name}  NOT usable: {printable(row['not_usable'])}"
    if "not_handled" in row:
        return f"{name}  ({printable(row['not_handled'])})"
    line = f"{name}  {row['dtype']}  {'×'.join(map(_side, row['shape'])) or 'scalar'}"
    known = [f"r={row['rank']}"] if row.get("rank") is not None else []
    known += [f"scale={row['scale']:g}"] if row.get("scale") is not None else []
    return f"{line}  {' '.join([kind, *known])}" if "rank" in row else line
