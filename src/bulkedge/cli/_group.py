"""The group of all commands: listed by what people want, each with an example at the end."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

import click

from bulkedge import __version__
from bulkedge._fields import SCHEMA_VERSION

SECTIONS = {
    "Look at a fine-tune": ("audit", "show", "compare", "report", "inspect"),
    "Change a fine-tune": ("repair", "moments", "frontier"),
    "Before you train": ("budget",),
    "Large models": ("merge",),
    "Study random matrices": ("simulate",),
}
"""What people want, and the commands for it; any other command is listed last."""

OTHERS = "Others"
EXAMPLES = {
    "audit": (
        "bulkedge audit BASE TUNED --report report.html",
        "bulkedge audit BASE TUNED -o out",
        "bulkedge audit BASE run/checkpoint-* -o several",
    ),
    "show": ("bulkedge show out",),
    "report": ("bulkedge report out -o summary.md",),
    "inspect": ("bulkedge inspect TUNED",),
    "repair": ("bulkedge repair BASE TUNED -o repaired",),
    "compare": (
        "bulkedge compare out repaired",
        "bulkedge compare out repaired -o compare.html",
    ),
    "moments": ("bulkedge moments BASE keep.txt -o base.moments",),
    "frontier": (
        "bulkedge frontier BASE TUNED -o points --moments base.moments "
        "--evaluate 'python evaluate.py {model}'",
    ),
    "budget": ("bulkedge budget BASE --rank 8 --alpha 16 --peft lora.json",),
    "merge": (
        "bulkedge audit BASE TUNED --shard 1/2 -o part1",
        "bulkedge audit BASE TUNED --shard 2/2 -o part2",
        "bulkedge merge part1 part2 -o whole",
    ),
    "simulate": ("bulkedge simulate transition --set repeats=1 --json",),
    "help": ("bulkedge help audit",),
}
"""Commands that work one after the other, in this order; the tests run them."""


class Sections(click.Group):
    """A group whose help lists its commands by what people want."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command; its help ends with its examples."""
        super().add_command(cmd, name)
        if lines := EXAMPLES.get(cmd.name or ""):
            title = "Example" if len(lines) == 1 else "Examples"
            cmd.epilog = "\n".join(("\b", f"{title}:", *(f"  {line}" for line in lines)))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands, section by section."""
        listed = {name for names in SECTIONS.values() for name in names}
        rest = tuple(name for name in self.list_commands(ctx) if name not in listed)
        for title, names in {**SECTIONS, OTHERS: rest}.items():
            found = [(name, self.commands[name]) for name in names if name in self.commands]
            if found:
                with formatter.section(title):
                    formatter.write_dl([(n, c.get_short_help_str(80)) for n, c in found])


@click.command("help", short_help="Show the help of a command.")
@click.argument("name", required=False)
@click.pass_context
def help_(ctx: click.Context, name: str | None) -> None:
    """Show the help of a command, or the list of commands."""
    parent = ctx.parent or ctx
    group = parent.command
    if name is None or not isinstance(group, click.Group):
        click.echo(parent.get_help())
        return
    command = group.get_command(parent, name)
    if command is None:
        raise click.UsageError(f"no command {name!r}; `bulkedge help` lists the commands")
    click.echo(command.get_help(click.Context(command, info_name=name, parent=parent)))


def show_version(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    """Print the versions that a bug report needs, and stop."""
    if not value or ctx.resilient_parsing:
        return
    click.echo(
        f"bulkedge {__version__} (record schema {SCHEMA_VERSION}, torch "
        f"{_version('torch')}, Python {platform.python_version()}, {sys.platform})"
    )
    ctx.exit()


def _version(package: str) -> str:
    """The version of an installed package, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
