"""``bulkedge audit``."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bulkedge._errors import OutputError, printable

from ._gate import end, gate_of
from ._hub import base_of, download_option, fetch_if_asked
from ._output import (
    CLEAN,
    check_file,
    check_folder,
    recipe_of,
    recipe_options,
    show,
    take_stdout,
    verdict_options,
    write,
    write_all,
    written_files,
)
from ._progress import say_what_is_kept, show_progress
from ._several import HANDLED, audit_several, plan_of, refuse_for_several

if TYPE_CHECKING:
    from bulkedge.auditing import Engine
    from bulkedge.comparison import Plan
    from bulkedge.records import Recipe, Record


def _shard_numbers(
    context: click.Context, option: click.Parameter, value: str | None
) -> tuple[int, int] | None:
    """The two numbers of the option ``--shard I/N``."""
    if value is None:
        return None
    index, slash, count = value.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and len(value) < 20):
        raise click.BadParameter(f"expected I/N such as 2/8, got {value!r}")
    return int(index), int(count)


LABELS = {
    "matrices": ("matrices to judge", ""),
    "skipped": ("tensors to skip", ""),
    "lost": ("updates that cannot be judged", ""),
    "largest": ("largest matrix", ""),
    "gigabytes_to_read": ("to read from disk", " GB"),
    "gigabytes_of_memory": ("memory of each job, about", " GB"),
    "core_seconds": ("time of one core, about", " s"),
}
"""How a dry run calls its facts, and their units; JSON has the bare names."""


@click.command(short_help="Find the intruder dimensions of a fine-tune.")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("tuned", type=click.Path(path_type=Path), nargs=-1)
@recipe_options
@click.option(
    "--method",
    type=click.Choice(["auto", "certified", "dense"]),
    help="certified: bounds from products; dense: two SVDs per matrix; auto: certified, then dense "
    "where the bounds leave a verdict open.  [default: auto]",
)
@click.option("--moments", type=click.Path(path_type=Path), metavar="FILE",
              help="Measure drift on these inputs, made by `bulkedge moments BASE`.")  # fmt: skip
@click.option(
    "--critical-scale",
    is_flag=True,
    default=None,
    help="Measure the scale of each update at which the first new direction appears, and try six "
    "smaller scales.  [default: False]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for record.json; - prints the record as JSON.",
)
@click.option("--peft", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the ranks in use as settings for LoraConfig(**…), JSON.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Resume from the journal in the output folder.")
@click.option("-j", "--jobs", type=click.IntRange(min=1), default=1, show_default=True,
              help="Worker processes, one thread each.")  # fmt: skip
@verdict_options
@download_option
@click.option("--cache", type=click.Path(path_type=Path), metavar="DIR",
              help="Keep SVDs of the base here for later audits of it.")  # fmt: skip
@click.option(
    "--shard",
    metavar="I/N",
    callback=_shard_numbers,
    help="Audit only part I of N; see `bulkedge merge`.",
)
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
              help="Compute on this machine or on a Ray cluster.")  # fmt: skip
@click.option(
    "--ray-address", default="auto", show_default=True, help="Address of the Ray cluster."
)
@click.option(
    "--insecure-ray", is_flag=True, help="Use a Ray cluster without token authentication."
)
@click.option(
    "--dry-run", is_flag=True, help="Check everything, print what would be done, and stop."
)
def audit(base: Path, tuned: tuple[Path, ...], **options: Any) -> None:
    """Find the intruder dimensions that a fine-tune wrote into a model.

    BASE is a .safetensors file, a model folder, or the id of a model on the Hugging Face hub.
    TUNED is the same, or an adapter. Several TUNED are audited together, with one record each and
    one table. An adapter alone is audited against the base that it names. The exit code is 0 if
    nothing was found, 1 for findings, and 2 if something could not be judged.
    """
    _check_options(options, several=len(tuned) > 1)
    fetch_if_asked((base, *tuned), options)
    if not tuned:
        base, tuned = base_of(base, options), (base,)
    if len(tuned) == 1:
        _audit_one(base, tuned[0], options)
    else:
        audit_several(base, tuned, {name: options[name] for name in HANDLED})


def _audit_one(base: Path, tuned: Path, options: dict[str, Any]) -> None:
    """Audit one fine-tune, show what was found, and exit."""
    from bulkedge.auditing import JOURNAL_NAME, Shard, hold, keep_out_of_inputs, run_plan

    recipe, gate = recipe_of(options), gate_of(options)
    plan = plan_of(base, tuned, recipe, options)
    if options["peft"] is not None:
        _check_ranks(plan)
    engine = _engine(options)
    engine.check(recipe)
    shard = Shard(*options["shard"]) if options["shard"] else None
    output: Path | None = options["output"]
    if output is not None:
        _check_output(output, options, plan)
    for file in written_files(options):
        check_file(file, options["force"])
        keep_out_of_inputs(file, plan)
    positions = shard.positions(plan.comparisons) if shard else range(len(plan.comparisons))
    if options["dry_run"]:
        part = replace(plan, comparisons=tuple(plan.comparisons[i] for i in positions))
        _print_facts(_describe(part, recipe), options["as_json"])
        return
    with hold(output):
        with show_progress(options["quiet"], len(positions)) as progress, say_what_is_kept(output):
            record = run_plan(
                plan,
                recipe,
                engine=engine,
                cache=options["cache"],
                shard=shard,
                journal=output / JOURNAL_NAME if output else None,
                resume=options["resume"],
                progress=progress,
                notice=_notice,
            )
        write_all(record, options, gate)
        if options["peft"] is not None:
            _write_ranks(record, options["peft"], quiet=options["quiet"])
        show(record, options)
    if shard is not None:  # findings in a part must not stop what waits for it
        if not options["quiet"]:
            _notice(f"part {shard.index} of {shard.count}: `bulkedge merge` judges the whole")
        sys.exit(CLEAN)
    end({"": record}, gate)


def _check_options(options: dict[str, Any], *, several: bool) -> None:
    """UsageError for options that do not go together."""
    if several:
        refuse_for_several(click.get_current_context(), options)
    take_stdout(options)
    if options["output"] is None and (options["resume"] or options["shard"]):
        what = "--resume" if options["resume"] else "--shard"
        raise click.UsageError(f"{what} needs the folder of the journal (--output DIR)")
    if options["max_drift"] is not None and options["moments"] is None:
        raise click.UsageError("--max-drift needs the inputs to measure it on (--moments FILE)")
    if options["peft"] is not None and options["shard"]:
        raise click.UsageError("--peft is of the whole audit, not of a part: leave out --shard")
    if options["max_drift"] is not None and options["shard"]:
        raise click.UsageError("--max-drift judges the whole audit: give it to `bulkedge merge`")
    if options["resume"] and options["force"]:
        raise click.UsageError("--resume continues what --force would replace; give one of the two")
    if options["engine"] != "ray" and (options["insecure_ray"] or options["ray_address"] != "auto"):
        raise click.UsageError("--ray-address and --insecure-ray need --engine ray")
    if options["engine"] == "ray" and options["jobs"] != 1:
        raise click.UsageError("--jobs is for this machine; a Ray cluster decides for itself")
    if options["engine"] == "ray" and options["cache"] is not None:
        raise click.UsageError("--cache is a folder of this machine; a Ray cluster has none")


def _check_ranks(plan: Plan) -> None:
    """UsageError where no update has a rank to tell PEFT."""
    if not any(c.factors is not None and c.factors.rank for c in plan.comparisons):
        raise click.UsageError("--peft is of the ranks of a LoRA: TUNED has no low-rank update")


def _write_ranks(record: Record, file: Path, *, quiet: bool) -> None:
    """The ranks in use, as settings of PEFT."""
    from bulkedge.budgeting import rank_config
    from bulkedge.budgeting.ranks import without_rank

    write(file, json.dumps(rank_config(record), indent=2) + "\n")
    for name in without_rank(record):
        _notice(f"{name}: NOT in {file}: no plain low-rank update of a layer")
    if not quiet:
        _notice(f"written to {file}")


def _engine(options: dict[str, Any]) -> Engine:
    """The engine that the options name."""
    from bulkedge.auditing import LocalEngine, RayEngine

    if options["engine"] == "ray":
        return RayEngine(options["ray_address"], insecure=options["insecure_ray"])
    return LocalEngine(options["jobs"])


def _notice(line: str) -> None:
    """Print a line on stderr."""
    click.echo(printable(line), err=True)


def _print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Print facts on stdout, as lines or as JSON."""
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for name, (label, unit) in LABELS.items():
        click.echo(printable(f"{label:30} {facts[name]}{unit}"))
    settings = ", ".join(f"{name}={value}" for name, value in facts["recipe"].items())
    click.echo(printable(f"{'settings':30} {settings}"))


def _describe(plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """What an audit would do, and what it would need."""
    from bulkedge.auditing import estimate

    bases = [comparison.base for comparison in plan.comparisons]
    largest = max(bases, key=lambda base: base.size, default=None)
    description = "none"
    if largest is not None:
        description = f"{largest.name} {'×'.join(map(str, largest.shape))} {largest.dtype}"
    read = sum(file.stat().st_size for file in set(plan.files))
    return {
        "matrices": len(bases),
        "skipped": len(plan.skipped),
        "lost": sum(row.lost for row in plan.skipped),
        "largest": description,
        "gigabytes_to_read": round(read / 1e9, 2),
        "gigabytes_of_memory": round(estimate.peak_bytes(plan, recipe) / 1e9, 2),
        "core_seconds": round(estimate.core_seconds(plan, recipe), 1),
        "recipe": recipe.model_dump(mode="json"),
    }


def _check_output(output: Path, options: dict[str, Any], plan: Plan) -> None:
    """Find what is wrong with the output before the first computation: an error, if anything is."""
    from bulkedge.auditing import keep_out_of_inputs
    from bulkedge.records import Record

    check_folder(output, options["force"], kind=Record, resume=options["resume"])
    keep_out_of_inputs(output, plan)
    parent = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    needed = 2**20 + 2**15 * len(plan.comparisons) + 2**10 * len(plan.skipped)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(f"{output}: {free} bytes free, record and journal need about {needed}")
