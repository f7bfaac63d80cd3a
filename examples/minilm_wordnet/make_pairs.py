"""Draw pairs of a definition and an example sentence from WordNet 3.0: none of them a noun.

    python examples/minilm_wordnet/make_pairs.py [--source /usr/share/wordnet]
    python examples/minilm_wordnet/make_pairs.py --parts noun --texts 1500 --out FILE

Each synset of a verb, an adjective or an adverb that has an example sentence gives one pair: its
first definition and its first example.  None of them is in the training data, which has nouns; for
adapters that were trained on verbs, ``--parts noun`` draws pairs of nouns.  The sample is drawn
with a fixed seed and written as gzipped TSV, one ``split, definition, sentence`` a line: ``test``
to find each sentence by its definition, ``texts`` for moments.  More ``--texts`` come after the
same first ones.
"""

from __future__ import annotations

import argparse
import gzip
import random
import re
from pathlib import Path

TEST = 1_500
QUOTED = re.compile(r'"([^"]+)"')


def read_pairs(folder: Path, parts: list[str]) -> list[tuple[str, str]]:
    """``(definition, sentence)`` of every such synset, in file order (wndb(5WN))."""
    pairs = []
    for part in parts:
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence, at the head of the file
                continue
            gloss = line.split(" | ", 1)[1].strip()
            definition, sentences = gloss.split(";")[0].strip(), QUOTED.findall(gloss)
            if sentences and not definition.startswith('"') and len(definition) > 10:
                pairs.append((definition, sentences[0]))
    return pairs


def main() -> None:
    """Write the sample."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--parts", nargs="+", default=["verb", "adj", "adv"])
    parser.add_argument("--texts", type=int, default=400, help="pairs for moments")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("pairs.tsv.gz"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    pairs = read_pairs(arguments.source, arguments.parts)
    random.Random(arguments.seed).shuffle(pairs)
    # mtime=0: the same input gives the same bytes
    with arguments.out.open("wb") as raw, gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as archive:
        for split, count in (("test", TEST), ("texts", arguments.texts)):
            rows, pairs = pairs[:count], pairs[count:]
            for definition, sentence in rows:
                archive.write(f"{split}\t{definition}\t{sentence}\n".encode())
    print(f"wrote {arguments.out} ({arguments.out.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    main()
