"""Draw the gloss classification set from WordNet 3.0 (Debian package ``wordnet-base``).

    python examples/minilm_wordnet/make_data.py [--source /usr/share/wordnet/data.noun]

Each noun synset gives one example: its first definition, and the lexicographer file it was filed
under (animal, artifact, food, ...: 25 categories; the 51 "unique beginners" are left out).  The
sample is drawn with a fixed seed and written as gzipped TSV, one ``split, category, gloss`` a line.
"""

from __future__ import annotations

import argparse
import gzip
import random
from pathlib import Path

CATEGORIES = [
    "act",
    "animal",
    "artifact",
    "attribute",
    "body",
    "cognition",
    "communication",
    "event",
    "feeling",
    "food",
    "group",
    "location",
    "motive",
    "object",
    "person",
    "phenomenon",
    "plant",
    "possession",
    "process",
    "quantity",
    "relation",
    "shape",
    "state",
    "substance",
    "time",
]
FIRST_FILE_NUMBER = 4  # lexnames(5WN): 04 is noun.act, then in the order above
SPLITS = {"train": 16_000, "test": 4_000}


def read_glosses(source: Path) -> list[tuple[str, str]]:
    """``(category, first definition)`` of every noun synset, in file order (wndb(5WN))."""
    glosses = []
    for line in source.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence, at the head of the file
            continue
        fields, gloss = line.split(" | ", 1)
        number = int(fields.split(" ", 2)[1]) - FIRST_FILE_NUMBER
        if number >= 0:
            glosses.append((CATEGORIES[number], gloss.split(";")[0].strip()))
    return glosses


def main() -> None:
    """Write the sample beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path("/usr/share/wordnet/data.noun"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    glosses = read_glosses(arguments.source)
    random.Random(arguments.seed).shuffle(glosses)
    target = Path(__file__).with_name("glosses.tsv.gz")
    # mtime=0: the same input gives the same bytes
    with target.open("wb") as raw, gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as archive:
        for split, count in SPLITS.items():
            rows, glosses = glosses[:count], glosses[count:]
            for category, gloss in rows:
                archive.write(f"{split}\t{category}\t{gloss}\n".encode())
    print(f"wrote {target} ({target.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    main()
