"""Texts for `bulkedge moments`, from the data of this example: what to keep, and what was learned.

    python examples/minilm_wordnet/texts.py

Writes `keep.txt`, 800 definitions and sentences that the fine-tune never saw, and `task.txt`, 600
of the definitions that it was trained on, into the folder where it runs.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
OF_THE_TASK = 600


def rows(name: str, split: str) -> Iterator[list[str]]:
    """The lines of a split, without its name."""
    with gzip.open(HERE / name, "rt", encoding="utf-8") as lines:
        for line in lines:
            first, *rest = line.rstrip("\n").split("\t")
            if first == split:
                yield rest


def main() -> None:
    """Write both files, one text per line."""
    texts = {
        "keep.txt": [text for pair in rows("pairs.tsv.gz", "texts") for text in pair],
        "task.txt": [gloss for _, gloss in rows("glosses.tsv.gz", "train")][:OF_THE_TASK],
    }
    for name, lines in texts.items():
        Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(lines)} texts")


if __name__ == "__main__":
    main()
