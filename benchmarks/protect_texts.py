"""Texts for C_b: of the kind to be kept, fewer or more of them, and of other kinds."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable
from functools import partial

from protect_model import load_pairs

KEPT = 800
"""Texts of the kind to be kept, unless a table says otherwise."""


def kept(part: str, count: int = KEPT) -> list[str]:
    """Texts of the kind to be kept; none of them is in a test."""
    texts = [text for pair in load_pairs(part)["texts"] for text in pair]
    if len(texts) < count:
        raise SystemExit(f"expected {count} texts, got {len(texts)}; draw more from WordNet")
    return texts[:count]


def docstrings(count: int = KEPT) -> list[str]:
    """First lines of Python's own documentation."""
    import argparse
    import asyncio
    import collections
    import email
    import http
    import json
    import logging
    import os
    import statistics
    import subprocess
    import tarfile
    import unittest
    import zipfile

    modules = (argparse, asyncio, collections, email, http, json, logging, os, statistics,
               subprocess, tarfile, unittest, zipfile, random, inspect, re)  # fmt: skip
    found: set[str] = set()
    for module in modules:
        for thing in vars(module).values():
            for each in (thing, *(vars(thing).values() if inspect.isclass(thing) else ())):
                known = getattr(each, "__doc__", None)
                text = known.strip().split("\n")[0] if isinstance(known, str) else ""
                if text.count(" ") > 2:
                    found.add(text)
    return random.Random(0).sample(sorted(found), min(count, len(found)))


def shuffled() -> list[str]:
    """The words of the texts to be kept, in any order over all of them."""
    texts = kept("noun")
    words = [word for text in texts for word in text.split()]
    random.Random(0).shuffle(words)
    left = iter(words)
    return [" ".join(next(left) for _ in text.split()) for text in texts]


TEXTS: dict[str, Callable[[], list[str]]] = {
    **{str(count): partial(kept, "noun", count) for count in (50, 3_000, 200)},
    "sentences with nouns": lambda: [sentence for _, sentence in load_pairs("verb")["texts"]][:800],
    "shuffled words": shuffled,
    "Python's docstrings": docstrings,
    str(KEPT): partial(kept, "noun", KEPT),
}
"""Texts for C_b of the adapters of nouns."""
