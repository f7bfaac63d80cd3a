"""Print the oldest supported release of every dependency but torch, as requirements of pip.

python scripts/oldest.py

They are the lower ends of the ranges in ``pyproject.toml``.  torch has a pin of its own in
``constraints.txt``: an old one is a download of gigabytes.  Tools of developers alone are left out.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
OWN_ENVIRONMENT = ("torch", "tomli", "build", "vermin", "playwright", "ray")
TOOLS = ("pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "ruff", "pyright", "bulkedge")
RANGE = re.compile(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)")


def oldest(project: str) -> list[str]:
    """The requirements, from the text of a ``pyproject.toml``."""
    tables = tomllib.loads(project)["project"]
    extras = tables["optional-dependencies"].values()
    wanted = [*tables["dependencies"], *(item for extra in extras for item in extra)]
    found = {match[1]: match[2] for item in wanted if (match := RANGE.match(item))}
    left_out = {*OWN_ENVIRONMENT, *TOOLS}
    return [f"{name}=={version}" for name, version in found.items() if name not in left_out]


if __name__ == "__main__":
    print("\n".join(oldest((ROOT / "pyproject.toml").read_text(encoding="utf-8"))))
