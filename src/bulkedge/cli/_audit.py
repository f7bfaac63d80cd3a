"""``bulkedge audit``."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bulkedge._errors import OutputError, printable

from ._output import RECORD_NAME, exit_code, one_thread, show, show_progress, write

if TYPE_CHECKING:
    from bulkedge._audit import Plan, Recipe


@click.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("tuned", type=click.Path(path_type=Path))
@click.option("-k", "--top-k", type=int, help="Leading tuned directions to judge.  [default: 10]")
@click.option("--epsilon", type=float, help="Score below which one counts.  [default: 0.5]")
@click.option(
    "--side",
    type=click.Choice(["left", "right", "both"]),
    help="Singular vectors to compare.  [default: left]",
)
@click.option(
    "--include", multiple=True, metavar="GLOB", help="Only tensors that match; repeatable."
)
@click.option("--exclude", multiple=True, metavar="GLOB", help="No tensors that match; repeatable.")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cpu]")
@click.option("--seed", type=int, help="Seed of the solver's start block.  [default: 0]")
@click.option(
    "--config", type=click.Path(path_type=Path), help="Recipe in YAML; options override it."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for record.json.")
@click.option("--force", is_flag=True, help="Write into an output folder that exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print the verdict alone, no progress.")
@click.option("-j", "--jobs", type=click.IntRange(min=1), default=1, show_default=True,
              help="Worker processes, one thread each.")  # fmt: skip
@click.option(
    "--fail-on",
    type=click.Choice(["rotated", "intruder", "never"]),
    default="rotated",
    show_default=True,
    help="Mildest verdict that makes the exit code 1; rotated is the paper's count.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, stop.")
def audit(base: Path, tuned: Path, **options: Any) -> None:
    """Find the intruder dimensions that a fine-tune wrote into a model.

    BASE is a .safetensors file or a model folder; TUNED is the same, or a PEFT LoRA adapter folder.
    """
    from bulkedge._audit import check_device, make_plan, run_plan

    recipe = _recipe(options)
    plan = make_plan(base, tuned, recipe)
    check_device(recipe.device)
    output: Path | None = options["output"]
    if output is not None:
        _check_output(output, options["force"], plan)
    if options["dry_run"]:
        facts = _describe(plan, recipe)
        told = "\n".join(printable(f"{name:20} {value}") for name, value in facts.items())
        click.echo(json.dumps(facts, indent=2) if options["as_json"] else told)
        return
    one_thread()
    with show_progress(options["quiet"], len(plan.comparisons)) as progress:
        record = run_plan(plan, recipe, jobs=options["jobs"], progress=progress)
    show(record, options)
    if output is not None:
        write(output / RECORD_NAME, record.to_json())
        if not options["quiet"]:
            click.echo(f"record written to {output / RECORD_NAME}", err=True)
    sys.exit(exit_code(record, options["fail_on"]))


def _recipe(options: dict[str, Any]) -> Recipe:
    """The recipe file's settings, overridden by what was given on the command line."""
    from bulkedge._audit import Recipe, make_recipe, read_recipe

    path: Path | None = options["config"]
    settings = read_recipe(path) if path is not None else {}
    given = {name: options[name] for name in Recipe.model_fields if options[name] not in (None, ())}
    return make_recipe(settings | given, source=str(path) if path is not None else "options")


def _describe(plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """What an audit would do, and what it would need."""
    infos = [comparison.base for comparison in plan.comparisons]
    largest = max(infos, key=lambda info: info.size)
    read = sum(file.stat().st_size for file in {*plan.base.files, *plan.tuned.files})
    svd = sum(6 * max(i.shape) * min(i.shape) ** 2 for i in infos)
    return {
        "matrices": len(infos),
        "skipped": len(plan.skipped),
        "lost": sum(row.lost for row in plan.skipped),
        "largest": f"{largest.name} {'×'.join(map(str, largest.shape))} {largest.dtype}",
        "gigabytes_to_read": round(read / 1e9, 2),
        "gigabytes_of_memory": round(_peak_bytes(largest.shape) / 1e9, 2),
        "teraflop_in_float64": round(svd / 1e12, 2),
        "recipe": recipe.model_dump(mode="json"),
    }


def _peak_bytes(shape: tuple[int, ...]) -> float:
    """Memory of a job whose largest matrix has ``shape``: torch, and the SVD's copies and work."""
    long, short = max(shape), min(shape)
    return 300e6 + 8 * (4 * long * short + 5 * short**2)


def _check_output(output: Path, force: bool, plan: Plan) -> None:
    """Everything that can go wrong with the output, before the first computation."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: is a file; give a folder")
    if (output / RECORD_NAME).is_dir():
        raise OutputError(f"{output}: {RECORD_NAME} in it is a folder; give another")
    if output.exists() and any(output.iterdir()) and not force:
        raise OutputError(f"{output}: exists; give another folder, or --force to write into it")
    for source in (plan.base.path, plan.tuned.path):
        if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
            raise OutputError(f"{output}: lies inside the input {source}; write elsewhere")
    parent = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{output}: {parent} is not writable")
    needed = 2**20 + 2**14 * len(plan.comparisons) + 2**10 * len(plan.skipped)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(f"{output}: {free} bytes free, the record needs about {needed}")
