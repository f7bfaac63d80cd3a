"""What a page says where no script runs: mail programs, strict browsers, previews."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def without_script(
    headline: str,
    sentences: Iterable[str],
    *,
    label: str = "",
    steps: Iterable[tuple[str, str | None]] = (),
    table: Sequence[Sequence[str]] = (),
    about: str = "",
) -> str:
    """One record as plain HTML.

    Args:
        headline: What was found.
        sentences: The paragraph below it.
        label: What the record is called, where there are several.
        steps: What to do next, each with its command or None.
        table: Rows of cells; the first are the headings.
        about: Where the record comes from.

    Returns:
        A section; whatever was given is text in it, never markup.

    Example:
        >>> print(without_script("1 new <direction>", ["Look."]))
        <section>
        <p class="verdict">1 new &lt;direction&gt;</p>
        <p>Look.</p>
        </section>
    """
    lines = [f"<h2>{_text(label)}</h2>"] if label else []
    lines += [f'<p class="verdict">{_text(headline)}</p>', f"<p>{_text(' '.join(sentences))}</p>"]
    listed = [
        f"<li>{_text(what)}{'' if command is None else f' <code>{_text(command)}</code>'}</li>"
        for what, command in steps
    ]
    if listed:
        lines += ["<h3>What to do next</h3>", "<ol>", *listed, "</ol>"]
    lines += _table(table)
    lines += [f'<p class="faint">{_text(about)}</p>'] if about else []
    return "\n".join(("<section>", *lines, "</section>"))


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; none without a row below its headings."""
    if len(rows) < 2:
        return []
    head, *body = rows
    cells = [f"<tr>{''.join(f'<td>{_text(x)}</td>' for x in row)}</tr>" for row in body]
    heads = "".join(f'<th scope="col">{_text(x)}</th>' for x in head)
    return ['<div class="scroll"><table>', f"<thead><tr>{heads}</tr></thead>",
            "<tbody>", *cells, "</tbody></table></div>"]  # fmt: skip


def _text(text: str) -> str:
    """Text as HTML."""
    return html.escape(text, quote=False)
