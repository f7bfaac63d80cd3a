"""Draw pairs of a definition and an example sentence from WordNet 3.0: none of them a noun.

    python examples/minilm_wordnet/make_pairs.py [--source /usr/share/wordnet]

Each synset of a verb, an adjective or an adverb that has an example sentence gives one pair: its
first definition and its first example.  None of them is in the training data, which has nouns.  The
sample is drawn with a fixed seed and written as gzipped TSV, one ``split, definition, sentence`` a
line: ``test`` to find each sentence by its definition, ``texts`` for moments.
"""

from __future__ import annotations

import argparse
import gzip
import random
import re
from pathlib import Path

SPLITS = {"test": 1_500, "texts": 400}
QUOTED = re.compile(r'"([^"]+)"')


def read_pairs(folder: Path) -> list[tuple[str, str]]:
    """``(definition, sentence)`` of every such synset, in file order (wndb(5WN))."""
    pairs = []
    for part in ("verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence, at the head of the file
                continue
            gloss = line.split(" | ", 1)[1].strip()
            definition, sentences = gloss.split(";")[0].strip(), QUOTED.findall(gloss)
            if sentences and not definition.startswith('"') and len(definition) > 10:
                pairs.append((definition, sentences[0]))
    return pairs


def main() -> None:
    """Write the sample beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    pairs = read_pairs(arguments.source)
    random.Random(arguments.seed).shuffle(pairs)
    target = Path(__file__).with_name("pairs.tsv.gz")
    # mtime=0: the same input gives the same bytes
    with target.open("wb") as raw, gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as archive:
        for split, count in SPLITS.items():
            rows, pairs = pairs[:count], pairs[count:]
            for definition, sentence in rows:
                archive.write(f"{split}\t{definition}\t{sentence}\n".encode())
    print(f"wrote {target} ({target.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    main()
