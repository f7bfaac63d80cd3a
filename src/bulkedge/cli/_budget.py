"""``bulkedge budget``."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bulkedge._errors import RecipeError, count, printable

from ._hub import download_option, fetch_if_asked
from ._output import (
    CLEAN,
    FAILURE,
    check_file,
    check_folder,
    refuse_twice,
    show_as,
    take_stdout,
    write,
)
from ._progress import say_what_is_kept, show_progress

if TYPE_CHECKING:
    from bulkedge.records.budget import BudgetRecord


DEFAULT_TOP_K = 10


@click.command(short_help="Find how strong an update of each layer may be.")
@click.argument("base", type=click.Path(path_type=Path))
@click.option("-r", "--rank", type=int, help="Rank of the LoRA that you plan.")
@click.option("--alpha", type=float, help="Its α (lora_alpha).")
@click.option("--rslora", is_flag=True, help="Scale by α/√r in place of α/r.")
@click.option("--like", type=click.Path(path_type=Path), metavar="ADAPTER",
              help="Find the α that suits each layer of this trained adapter.")  # fmt: skip
@click.option("--level", type=float, default=1.0, show_default=True,
              help="The fraction of θ_k that an update may reach.")  # fmt: skip
@click.option("--target", multiple=True, metavar="GLOB",
              help="Measure only these matrices; repeatable.  [default: all but embeddings, heads]",
              )  # fmt: skip
@click.option("--exclude", multiple=True, metavar="GLOB",
              help="Leave these matrices out; repeatable.")  # fmt: skip
@click.option("-k", "--top-k", type=int, default=DEFAULT_TOP_K, show_default=True,
              help="How many leading directions an audit will judge.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random vectors.")
@click.option("--peft", type=click.Path(path_type=Path), metavar="FILE",
              help="Write settings for LoraConfig(**…), as JSON.")  # fmt: skip
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for budget.json; - prints it as JSON.",
)
@click.option("--resume", is_flag=True, help="Resume from the journal in the output folder.")
@click.option("-j", "--jobs", type=click.IntRange(min=1), default=1, show_default=True,
              help="How many matrices at a time, one thread each.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
@click.option("--csv", type=click.Path(path_type=Path), metavar="FILE",
              help="Write one row per matrix, for spreadsheets.")  # fmt: skip
@click.option("-q", "--quiet", is_flag=True, help="Print only the last line, no progress.")
@download_option
def budget(base: Path, **options: Any) -> None:
    """Find how strong an update of each matrix may be, before you train.

    BASE is a .safetensors file or a model folder.  Above the strength θ_c an update makes a new
    singular direction; above θ_k that direction is among the k leading ones.  The exit code is 2 if
    a matrix that you asked for has no limit.
    """
    from bulkedge.auditing import JOURNAL_NAME, hold, keep_out
    from bulkedge.budgeting import BudgetRecord
    from bulkedge.budgeting import budget as run
    from bulkedge.budgeting.run import check_like
    from bulkedge.report import print_budget

    _check_options(options)
    fetch_if_asked(filter(None, (base, options["like"])), options)
    if None not in (options["peft"], options["like"]):
        check_like(options["like"])
    output: Path | None = options["output"]
    if output is not None:
        check_folder(output, options["force"], kind=BudgetRecord, resume=options["resume"])
    inputs = [path for path in (base, options["like"]) if path is not None]
    refuse_twice([x for x in (options["csv"], options["peft"]) if x is not None], output)
    for file in filter(None, (output, options["csv"], options["peft"])):
        keep_out(file, inputs)
        if file != output:
            check_file(file, options["force"])
    settings = ("rank", "alpha", "rslora", "like", "level", "target", "exclude", "top_k", "seed")
    with hold(output):
        with show_progress(options["quiet"], 0, "measuring") as progress, say_what_is_kept(output):
            record = run(
                base,
                **{name: options[name] for name in settings},
                jobs=options["jobs"],
                journal=output / JOURNAL_NAME if output else None,
                resume=options["resume"],
                progress=progress,
                notice=None if options["quiet"] else _notice,
            )
        _write_all(record, options)
        show_as(record, print_budget, options)
        if not options["quiet"]:
            for line in _next(record, base, options):
                _notice(line)
    sys.exit(CLEAN if record.complete else FAILURE)


def _next(record: BudgetRecord, base: Path, options: dict[str, Any]) -> list[str]:
    """What to do with a budget, and how; nothing where no matrix has a limit."""
    from bulkedge.report.commands import WEAKER, free
    from bulkedge.report.merging import MERGED

    if not any(row.top_k_threshold is not None for row in record.matrices):
        return []
    quoted, asked = shlex.quote(str(base)), _settings(options)
    judged = "" if record.settings.top_k == DEFAULT_TOP_K else f" -k {record.settings.top_k}"
    if options["like"] is not None:
        chosen = _globs(options, "include")
        like, level = shlex.quote(str(options["like"])), f"{options['level']:g}"
        if not record.above:
            found = "no update is above its limit"
            if unknown := sum(row.allowed is None for row in record.matrices):
                found = f"how strong {count(unknown, 'update')} may be is NOT known"
            return [
                f"next: {found}: see what it made",
                f"  bulkedge audit {quoted} {like}{judged}{chosen}",
            ]
        first = _merge_first(base, options["like"])
        tuned = free(MERGED, os.path.lexists) if first else like
        command = f"bulkedge repair {quoted} {tuned} --method rescale --level {level}"
        command += f"{judged}{chosen} -o {free(WEAKER, os.path.lexists)}"
        return [*first, "next: weaken the layers above their limit", f"  {command}"]
    if options["peft"] is not None:
        return [
            f'next: train with {options["peft"]} and Hold("leading"), which keeps updates below '
            "θ_k",
            f"  bulkedge audit {quoted} ADAPTER{judged}",
        ]
    rank = 8 if options["rank"] is None else options["rank"]
    alpha = "16" if options["alpha"] is None else f"{options['alpha']:g}"
    return [
        "next: write the settings for LoraConfig",
        f"  bulkedge budget {quoted} --rank {rank} --alpha {alpha}{asked} "
        f"--peft {free('lora.json', os.path.lexists)}",
    ]


def _merge_first(base: Path, like: Path) -> list[str]:
    """How an adapter is merged that rescale refuses as it is stored; nothing of any other."""
    from bulkedge.checkpoint import Adapter
    from bulkedge.comparison import make_plan
    from bulkedge.records import make_recipe
    from bulkedge.report.commands import free
    from bulkedge.report.merging import MERGED, adapter_not_scaled, merge_adapter

    plan = make_plan(base, like, make_recipe({}))
    if not isinstance(plan.tuned, Adapter):
        return []
    beside = any(comparison.factors is None for comparison in plan.comparisons)
    if (part := adapter_not_scaled(plan.tuned, beside)) is None:
        return []
    folder = free(MERGED, os.path.lexists)
    told = f"α does not scale all of it ({part}): merge it into the model first, into {folder}"
    return merge_adapter(str(base), plan.tuned, folder).lines(told)


def _settings(options: dict[str, Any]) -> str:
    """The settings of a budget that are not the defaults, as options of the next one."""
    words = ["--rslora"] if options["rslora"] else []
    if options["top_k"] != DEFAULT_TOP_K:
        words += ["-k", str(options["top_k"])]
    if options["seed"] != 0:
        words += ["--seed", str(options["seed"])]
    return _globs(options, "target") + "".join(f" {shlex.quote(word)}" for word in words)


def _globs(options: dict[str, Any], target: str) -> str:
    """The matrices that were asked for, as options of a command that calls them ``target``."""
    words = [word for glob in options["target"] for word in (f"--{target}", glob)]
    words += [word for glob in options["exclude"] for word in ("--exclude", glob)]
    return "".join(f" {shlex.quote(word)}" for word in words)


def _check_options(options: dict[str, Any]) -> None:
    """What does not go together."""
    take_stdout(options)
    if options["resume"] and options["output"] is None:
        raise click.UsageError("--resume needs the folder of the journal (--output DIR)")
    if options["resume"] and options["force"]:
        raise click.UsageError("--resume continues what --force would replace; give one of the two")
    if options["peft"] and options["like"] is None and None in (options["rank"], options["alpha"]):
        raise RecipeError("--peft needs --rank and --alpha of the LoRA, or --like an adapter")
    if (options["rank"] is None) != (options["alpha"] is None):
        raise click.UsageError("--rank needs --alpha, and the reverse")
    if options["level"] != 1 and options["like"] is None:
        if options["rank"] is None:
            raise click.UsageError("--level needs --rank and --alpha, or --like: θ_k has none")
        if options["peft"] is not None:
            raise click.UsageError(
                "--level changes no α that --rank and --alpha give, which are relative: leave it "
                "out, or --peft; `bulkedge repair --method rescale --level` lowers a trained one"
            )


def _write_all(record: BudgetRecord, options: dict[str, Any]) -> None:
    """Record, table and settings, where they were asked for."""
    from bulkedge.budgeting import lora_config
    from bulkedge.budgeting.patterns import without_pattern
    from bulkedge.report import budget_csv

    written = {}
    if options["output"] is not None:
        written[options["output"] / record.file_name] = record.to_json()
    if options["csv"] is not None:
        written[options["csv"]] = budget_csv(record)
    if options["peft"] is not None:
        written[options["peft"]] = json.dumps(lora_config(record), indent=2) + "\n"
        for name in without_pattern(record):
            _notice(f"{name}: NOT in {options['peft']}: a bare parameter has no α of its own there")
        for row in record.untrained:
            _notice(
                f"{row.name}: NOT in {options['peft']}: its base looks untrained, so there is "
                "nothing to forget, and all that is trained is new; train it in full "
                "(modules_to_save), or name what you want in --target"
            )
    for file, text in written.items():
        write(file, text)
        if not options["quiet"]:
            _notice(f"written to {file}")


def _notice(line: str) -> None:
    """Print a line on stderr."""
    click.echo(printable(line), err=True)
