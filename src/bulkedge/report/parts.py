"""What every page is made of: its policy, its data, and the parts that come with the package."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from bulkedge._errors import InputError

PLOTLY = "79542150855a52c567260e3137095dbe2b744e6d702a5cabe67da246942fba7a"
"""The SHA-256 digest of plotly.js-cartesian-dist-min 4.1.1, as published."""


def part(name: str) -> str:
    """A part of a page that comes with the package.

    Args:
        name: Of its file.

    Returns:
        Its text.
    """
    package = resources.files(__name__.rpartition(".")[0])
    return (package / "page" / name).read_text(encoding="utf-8")


def plotly() -> str:
    """The library of the charts.

    Returns:
        Its text.

    Raises:
        InputError: If it is not the file that was published.
    """
    text = part("plotly-cartesian.min.js")
    if hashlib.sha256(text.encode()).hexdigest() != PLOTLY:
        raise InputError("plotly-cartesian.min.js is not the file that was published; reinstall")
    return text


def policy(*scripts: str) -> str:
    """Own scripts by their digests, inline styles and data images; nothing else.

    Args:
        scripts: Their texts.

    Returns:
        The content of a ``Content-Security-Policy``.
    """
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src 'none'; form-action 'none'; base-uri 'none'"
    )


def as_data(values: Any) -> str:
    """Plain values as JSON in which no character is markup: a name must not end the data.

    Args:
        values: What the page shows.

    Returns:
        Text for a script of the type ``application/json``.
    """
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def filled(page: str, slots: Mapping[str, str]) -> str:
    """A page with its slots filled; what is in a slot is not looked at again.

    Args:
        page: Text with slots such as ``{{title}}``.
        slots: What goes into each.

    Returns:
        The page.
    """
    head, *rest = page.split("{{")
    found = [head]
    for piece in rest:
        name, _, text = piece.partition("}}")
        found += [slots[name], text]
    return "".join(found)


def document(
    body: str,
    command: str,
    *,
    title: str,
    subtitle: str,
    script: str,
    css: str,
    shown: Any,
    unscripted: str,
) -> str:
    """A whole page: the frame that all have, with a body and its data in it.

    Args:
        body: HTML of what stands between the headline and the note on the page.
        command: The command of bulkedge that it is of.
        title: Plain text after the command, in the title of the window.
        subtitle: The same in the headline.
        script: The name of the page's own script, beside those that all have.
        css: All of its styles.
        shown: Plain values for the scripts.
        unscripted: HTML of what stands there where no script runs.

    Returns:
        HTML that asks nothing of the network.

    Raises:
        InputError: If the package is damaged.
    """
    scripts = {"plotly": plotly(), "charts": part("charts.js"), "script": part(script)}
    slots = {
        "policy": policy(*scripts.values()),
        "command": command,
        "title": html.escape(f"bulkedge {command}: {title}"),
        "subtitle": html.escape(subtitle),
        "css": css,
        "body": body,
        "unscripted": unscripted,
        "data": as_data(shown),
        **scripts,
    }
    return filled(part("frame.html"), slots)
