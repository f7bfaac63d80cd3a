"""``bulkedge moments``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ._output import check_file, default_to_one_thread, show_progress


@click.command(short_help="Measure what a model's layers are used on.")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True,
              help="File to be written.")  # fmt: skip
@click.option("--tuned", type=click.Path(path_type=Path),
              help="Fine-tune whose inputs are wanted: an adapter or a checkpoint.")  # fmt: skip
@click.option("--column", default="text", show_default=True,
              help="Field of JSONL, or column of Parquet.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(min=1), help="Where to stop reading.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute.")
@click.option("--force", is_flag=True, help="Replace the output file.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def moments(model: Path, texts: tuple[Path, ...], **options: Any) -> None:
    """Measure what a model's layers are used on, for `repair --method protect`.

    MODEL is the folder of a transformers model with its tokenizer.  TEXTS are files of one text a
    line, JSONL or Parquet: a few hundred texts of the kind that is to be kept.
    """
    from bulkedge._moments import collect_moments
    from bulkedge.auditing import keep_out
    from bulkedge.moments import read_texts

    output: Path = options["output"]
    check_file(output, options["force"])
    sources = [path for path in (model, options["tuned"], *texts) if path is not None]
    keep_out(
        output, sources, (file for path in sources if path.is_dir() for file in path.iterdir())
    )
    default_to_one_thread()
    found = [text for path in texts for text in read_texts(path, options["column"])]
    with show_progress(options["quiet"], len(found)) as progress:
        measured = collect_moments(
            model,
            found,
            tuned=options["tuned"],
            max_tokens=options["max_tokens"],
            device=options["device"],
            progress=None if progress is None else lambda done, total: progress("", done, total),
        )
    measured.save(output)
    if not options["quiet"]:
        layers = measured.layers.values()
        tokens = max(layer.count for layer in layers)
        click.echo(
            f"{len(found)} texts, {tokens} inputs, {len(layers)} layers: written to {output}",
            err=True,
        )
