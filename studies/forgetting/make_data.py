"""Draw the study's texts from WordNet 3.0 (Debian's ``wordnet-base``).

    python studies/forgetting/make_data.py [--source /usr/share/wordnet]

``data/pairs.tsv.gz``: the pairs of examples/minilm_wordnet/make_pairs.py, in its order, with their
part of speech.  ``data/B.tsv.gz``: verb glosses and their 15 categories.  ``data/C.tsv.gz``:
glosses of adjectives, relational and participial adjectives, and adverbs.  No gloss of B or C is a
definition of a pair.  Task A has the data of the example.  The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "examples/minilm_wordnet"))
import make_pairs  # noqa: E402
from make_data import read_glosses  # noqa: E402

TRAIN, TEST, TEXTS = 3_000, 1_000, 400
KINDS = {"00": "adjective", "01": "relational", "44": "participial", "02": "adverb"}
"""lexnames(5WN) of adjectives and adverbs."""
LARGEST = 1_200
"""No kind has more glosses in the sample, so that the smaller ones count."""
PARTS = ("verb", "adj", "adv")


def pairs(source: Path) -> list[tuple[str, ...]]:
    """``(split, part, definition, sentence)``, those of the example first."""
    found = [
        (part, definition, sentence)
        for part in PARTS
        for definition, sentence in make_pairs.read_pairs(source, [part])
    ]
    random.Random(0).shuffle(found)
    test, texts = found[: make_pairs.TEST], found[make_pairs.TEST :][:TEXTS]
    return [("test", *pair) for pair in test] + [("texts", *pair) for pair in texts]


def kinds(source: Path) -> list[tuple[str, str]]:
    """``(kind, first definition)`` of adjectives and adverbs, in file order."""
    found = []
    for part in ("adj", "adv"):
        for line in (source / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if not line.startswith("  "):  # the licence
                fields, gloss = line.split(" | ", 1)
                found.append((KINDS[fields.split(" ", 2)[1]], gloss.split(";")[0].strip()))
    return found


def sample(rows: list[tuple[str, str]], apart: set[str], largest: int) -> list[tuple[str, ...]]:
    """``(split, category, gloss)``, none of them in ``apart``."""
    random.Random(0).shuffle(rows)
    known, counts, kept = set(apart), dict.fromkeys({row[0] for row in rows}, 0), []
    for category, gloss in rows:
        if gloss not in known and counts[category] < largest:
            kept.append((category, gloss))
            known.add(gloss)
            counts[category] += 1
    random.Random(1).shuffle(kept)
    train, test = kept[:TRAIN], kept[TRAIN:][:TEST]
    return [("train", *row) for row in train] + [("test", *row) for row in test]


def write(name: str, rows: list[tuple[str, ...]]) -> None:
    """``data/NAME.tsv.gz``."""
    path = HERE / "data" / f"{name}.tsv.gz"
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as raw, gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as archive:
        archive.writelines(("\t".join(row) + "\n").encode() for row in rows)
    print(f"{path.name}: {len(rows)} lines, {path.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    """Write all three."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path("/usr/share/wordnet"))
    source = parser.parse_args().source
    drawn = pairs(source)
    apart = {definition for _, _, definition, _ in drawn}
    write("pairs", drawn)
    write("B", sample(read_glosses(source, "verb"), apart, TRAIN + TEST))
    write("C", sample(kinds(source), apart, LARGEST))


if __name__ == "__main__":
    main()
