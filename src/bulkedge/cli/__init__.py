"""The command line: parse, one library call, show.  Exit 0 clean, 1 findings, 2 failure.

Data goes to stdout, progress and messages to stderr.  Nothing heavier than click is imported until
a command needs it, so that ``bulkedge --help`` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import click

from bulkedge._errors import BulkedgeError, printable

from ._audit import audit
from ._budget import budget
from ._compare import compare
from ._frontier import frontier
from ._group import Sections, help_, show_version
from ._inspect import inspect
from ._merge import merge
from ._moments import moments
from ._output import CLEAN, FAILURE, INTERRUPTED, TERMINATED
from ._repair import repair
from ._report import report
from ._show import show
from ._simulate import simulate
from ._streams import guarded

__all__ = [
    "audit",
    "budget",
    "cli",
    "compare",
    "frontier",
    "inspect",
    "main",
    "merge",
    "moments",
    "repair",
    "report",
    "show",
    "simulate",
]


@click.group(cls=Sections, context_settings={"help_option_names": ["-h", "--help"]},
             epilog="`bulkedge help COMMAND` has the options of a command.")  # fmt: skip
@click.option("-V", "--version", is_flag=True, is_eager=True, expose_value=False,
              callback=show_version, help="Show the version and exit.")  # fmt: skip
def cli() -> None:
    """Spectral instruments for neural-network weights.

    Compare a fine-tuned model with its base, find the singular directions that the base did not
    have, and take them out.
    """


COMMANDS = (
    audit, budget, compare, frontier, help_, inspect, merge, moments, repair, report, show,
    simulate,
)  # fmt: skip
for command in COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Run the command line; whatever goes wrong becomes one line and exit code 2.

    The exit code is that of the result, whether or not anybody reads the output.
    """
    with guarded() as stdout, _terminated_like_interrupted():
        code = _run()
        sys.stdout.flush()  # a full disk must be noticed here, not at exit
        if stdout is not None and stdout.full is not None:
            click.echo(f"bulkedge: stdout cannot be written ({stdout.full})", err=True)
            code = FAILURE
    sys.exit(code)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which a CI runner or a scheduler sends: work ends as by Ctrl-C."""


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM say what is kept, and remove what is half written."""

    def end(number: int, frame: object) -> None:
        raise _Terminated

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run() -> int | str | None:
    """Run the command that was asked for; its exit code."""
    try:
        cli(standalone_mode=False)
    except SystemExit as ended:
        return ended.code
    except click.ClickException as error:
        error.show()
        return FAILURE
    except (click.Abort, KeyboardInterrupt) as error:
        by_signal = isinstance(error.__cause__ or error, _Terminated)
        click.echo("terminated" if by_signal else "interrupted", err=True)
        return TERMINATED if by_signal else INTERRUPTED
    except BulkedgeError as error:
        click.echo(f"bulkedge: {printable(str(error))}", err=True)
        return FAILURE
    except Exception as error:  # Python's own exit code would be 1, which here means findings
        if "BULKEDGE_TRACEBACK" in os.environ:
            raise
        what = printable(f"{type(error).__name__}: {error}")
        click.echo(f"bulkedge: {what}; set BULKEDGE_TRACEBACK=1 to see where", err=True)
        return FAILURE
    return CLEAN
