"""``bulkedge moments``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bulkedge._errors import count

from ._output import check_file, default_to_one_thread, refuse_stdout
from ._progress import show_progress

if TYPE_CHECKING:
    from bulkedge.moments import Moments

NAMED = 3  # so many layers are named


@click.command(short_help="Measure the inputs that a model's layers see on your texts.")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True,
              help="The file to write.")  # fmt: skip
@click.option("--tuned", type=click.Path(path_type=Path),
              help="Measure the inputs of this fine-tune: an adapter or a checkpoint.")  # fmt: skip
@click.option("--column", "--field", default="text", show_default=True,
              help="Field of JSON or column of Parquet that holds the text.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(min=1), help="Stop after this many tokens.")
@click.option(
    "--include", multiple=True, metavar="GLOB", help="Measure only these layers; repeatable."
)
@click.option(
    "--exclude", multiple=True, metavar="GLOB", help="Leave these layers out; repeatable."
)
@click.option("--rank", type=click.IntRange(min=1),
              help="Keep this many eigenvectors of each wider input.  [default: all, up to "
                   "--exact-width; 1024 beyond]")  # fmt: skip
@click.option("--exact-width", type=click.IntRange(min=0),
              help="Widest input whose full second moment is kept.  [default: 4096]")  # fmt: skip
@click.option(
    "--curvatures",
    is_flag=True,
    help="Measure how much each output of a layer matters, too, by a backward pass.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--force", is_flag=True, help="Replace the output file.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def moments(model: Path, texts: tuple[Path, ...], **options: Any) -> None:
    """Measure the inputs of a model's layers on your texts, for `repair --method protect`.

    MODEL is the folder of a transformers model with its tokenizer.  TEXTS are files with one text
    per line, or JSON, JSONL or Parquet: a few hundred texts of the kind that the model should keep.
    Repeat the command to resume a run that was stopped.
    """
    from bulkedge._moments import collect_moments
    from bulkedge.moments import read_texts

    output: Path = options["output"]
    refuse_stdout(output, "moments, which are numbers")
    _check_output(output, model, texts, options)
    default_to_one_thread()
    found = [text for path in texts for text in read_texts(path, options["column"])]
    partial = output.with_name(f"{output.name}.partial")
    if partial.exists() and not options["quiet"]:
        click.echo(f"going on from {partial}", err=True)
    names = ("tuned", "max_tokens", "include", "exclude", "rank", "exact_width", "curvatures",
             "device")  # fmt: skip
    given = {name: options[name] for name in names if options[name] not in (None, ())}
    with show_progress(options["quiet"], len(found), "reading") as progress:
        measured = collect_moments(
            model,
            found,
            partial=partial,
            progress=None if progress is None else lambda done, total: progress("", done, total),
            **given,
        )
    measured.save(output)
    partial.unlink(missing_ok=True)
    if (few := _few_inputs(measured)) is not None:
        click.echo(few, err=True)
    if not options["quiet"]:
        for line in _summary_lines(measured, len(found), output):
            click.echo(line, err=True)
        for line in _next(model, options["tuned"], output):
            click.echo(line, err=True)


def _next(model: Path, tuned: Path | None, output: Path) -> list[str]:
    """What the moments are for, as commands; TUNED and the files of texts are the user's."""
    from bulkedge.checkpoint import Adapter, open_path
    from bulkedge.report.commands import BASE_MOMENTS, TASK_MOMENTS, free
    from bulkedge.report.merging import MERGED, adapter_to_be_merged, merge_adapter

    if tuned is None:
        task = free(TASK_MOMENTS, os.path.lexists)
        return [
            "next: measure the fine-tune on texts of its task",
            f"  {_moments_line(model, 'task.txt', task, 'TUNED')}",
            *_protect_lines(model, "TUNED", str(output), task),
        ]
    lines = []
    if not os.path.lexists(BASE_MOMENTS):
        lines = [
            "next: measure the base on texts like those to keep",
            f"  {_moments_line(model, 'keep.txt', BASE_MOMENTS)}",
        ]
    opened, treated = open_path(tuned), str(tuned)
    if isinstance(opened, Adapter) and (method := adapter_to_be_merged(opened)) is not None:
        treated = free(MERGED, os.path.lexists)
        lines += merge_adapter(str(model), opened, treated).lines(
            f"{method}: protect refuses it as it is stored; merge it first, into {treated}"
        )
    return [*lines, *_protect_lines(model, treated, BASE_MOMENTS, str(output))]


def _protect_lines(model: Path, tuned: str, keep: str, task: str) -> list[str]:
    """How the moments of both are used."""
    from bulkedge.report.commands import PROTECTED, as_line, free

    words = ["bulkedge", "repair", str(model), tuned, "--method", "protect", "--moments", keep]
    words += ["--task-moments", task, "-o", free(PROTECTED, os.path.lexists)]
    return ["next: give back what it forgot, without training", f"  {as_line(words)}"]


def _moments_line(model: Path, texts: str, output: str, tuned: str | None = None) -> str:
    """A command that measures moments."""
    from bulkedge.report.commands import as_line

    words = ["bulkedge", "moments", str(model), texts]
    words += [] if tuned is None else ["--tuned", tuned]
    return as_line([*words, "-o", output])


def _check_output(
    output: Path, model: Path, texts: tuple[Path, ...], options: dict[str, Any]
) -> None:
    """Whether the output may be written, and is none of the inputs."""
    from bulkedge.auditing import keep_out

    check_file(output, options["force"])
    sources = [path for path in (model, options["tuned"], *texts) if path is not None]
    keep_out(
        output, sources, (file for path in sources if path.is_dir() for file in path.iterdir())
    )


def _summary_lines(measured: Moments, texts: int, output: Path) -> list[str]:
    """What was written, what is not in it, and what its sketches have lost."""
    from bulkedge.moments import Sketch

    layers = measured.layers
    tokens = max(layer.count for layer in layers.values())
    seen = f"{count(texts, 'text')}, {tokens} tokens, {count(len(layers), 'layer')}"
    lines = [f"{seen}: written to {output}"]
    collector = measured.collector
    if idle := [name for name in collector.layers if name not in layers]:
        lines.append(f"{count(len(idle), 'layer')} did not run: {_named(idle)}")
    if odd := collector.unmeasured:
        lines.append(f"{count(len(odd), 'weight')} of no layer with inputs: {_named(odd)}")
    if of := [name for name, layer in layers.items() if layer.curvature is not None]:
        lines.append(f"{count(len(of), 'layer')} with curvatures of their outputs")
    losses = {n: x.moment.loss for n, x in layers.items() if isinstance(x.moment, Sketch)}
    if losses:
        worst = max(losses, key=losses.__getitem__)
        lines.append(
            f"{count(len(losses), 'sketch', 'sketches')}: the most is lost of {worst}, "
            f"{losses[worst]:.1%} of its moment's norm"
        )
    return lines


def _few_inputs(measured: Moments) -> str | None:
    """A warning where layers have had fewer inputs than they are wide; None where none has."""
    from torch import Tensor

    from bulkedge.moments import width

    layers = measured.layers
    few = [
        name
        for name, layer in layers.items()
        # the shares of an embedding's indices need not be many
        if not (isinstance(layer.moment, Tensor) and layer.moment.ndim == 1)
        and layer.count < width(layer.moment)
    ]
    if not few:
        return None
    widest = max(few, key=lambda name: width(layers[name].moment))
    inputs, wide = layers[widest].count, width(layers[widest].moment)
    return (
        f"WARNING: {len(few)} of {count(len(layers), 'layer')} had fewer inputs than they are "
        f"wide, such as {widest}: {inputs} for a width of {wide}; measure more texts"
    )


def _named(names: list[str]) -> str:
    """The first names of a list."""
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
