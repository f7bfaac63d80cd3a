"""Draw the gloss classification set from WordNet 3.0 (Debian package ``wordnet-base``).

    python examples/minilm_wordnet/make_data.py [--part verb --out FILE] [--source FOLDER]

Each noun synset gives one example: its first definition, and the lexicographer file it was filed
under (animal, artifact, food, ...: 25 categories; the 51 "unique beginners" are left out).  Verbs
have 15 (body, change, ...).  The sample is drawn with a fixed seed and written as gzipped TSV, one
``split, category, gloss`` a line.
"""

from __future__ import annotations

import argparse
import gzip
import random
from pathlib import Path

CATEGORIES = {
    "noun": [
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
    ],
    "verb": [
        "body",
        "change",
        "cognition",
        "communication",
        "competition",
        "consumption",
        "contact",
        "creation",
        "emotion",
        "motion",
        "perception",
        "possession",
        "social",
        "stative",
        "weather",
    ],
}
# lexnames(5WN): 04 is noun.act and 29 verb.body, then in the orders above
FIRST_FILE_NUMBER = {"noun": 4, "verb": 29}
SPLITS = {"noun": {"train": 16_000, "test": 4_000}, "verb": {"train": 10_000, "test": 3_000}}


def read_glosses(folder: Path, part: str) -> list[tuple[str, str]]:
    """``(category, first definition)`` of every synset of a part of speech, in file order."""
    glosses = []
    for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence, at the head of the file
            continue
        fields, gloss = line.split(" | ", 1)
        number = int(fields.split(" ", 2)[1]) - FIRST_FILE_NUMBER[part]
        if number >= 0:
            glosses.append((CATEGORIES[part][number], gloss.split(";")[0].strip()))
    return glosses


def main() -> None:
    """Write the sample."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--part", choices=sorted(CATEGORIES), default="noun")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("glosses.tsv.gz"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    glosses = read_glosses(arguments.source, arguments.part)
    random.Random(arguments.seed).shuffle(glosses)
    # mtime=0: the same input gives the same bytes
    with arguments.out.open("wb") as raw, gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as archive:
        for split, count in SPLITS[arguments.part].items():
            rows, glosses = glosses[:count], glosses[count:]
            for category, gloss in rows:
                archive.write(f"{split}\t{category}\t{gloss}\n".encode())
    print(f"wrote {arguments.out} ({arguments.out.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    main()
