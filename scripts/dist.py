"""Build wheel and sdist into ``dist/`` from the tracked files.

python scripts/dist.py [ADDRESS]

ADDRESS is where the repository will be read, such as ``https://host/owner/bulkedge``.  Given one,
the README's links and images become absolute, so that an index can show them, and the package names
its pages.  Without one both stay as they are: the repository itself does not know its address.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)")


def absolute(page: str, address: str) -> str:
    """A page whose links and images lead to an address."""

    def anew(found: re.Match[str]) -> str:
        kind = "raw" if found[1] else "blob"
        return f"{found[1]}[{found[2]}]({address}/{kind}/main/{found[3]})"

    return LINK.sub(anew, page)


def urls(address: str) -> str:
    """The table of addresses of ``pyproject.toml``."""
    pages = {
        "Homepage": address,
        "Documentation": f"{address}/blob/main/docs/index.md",
        "Changelog": f"{address}/blob/main/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }
    return "\n[project.urls]\n" + "".join(f'{name} = "{page}"\n' for name, page in pages.items())


def copy(to: Path, address: str | None) -> None:
    """The tracked files, with the address filled in."""
    shutil.rmtree(to, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    if address is not None:
        readme, project = to / "README.md", to / "pyproject.toml"
        readme.write_text(absolute(readme.read_text(encoding="utf-8"), address), encoding="utf-8")
        project.write_text(project.read_text(encoding="utf-8") + urls(address), encoding="utf-8")


def main(address: str | None = None) -> None:
    """Copy, and build with what ``build`` finds."""
    source = ROOT / "build/dist-source"
    copy(source, None if address is None else address.rstrip("/"))
    command = [sys.executable, "-m", "build", "--outdir", str(ROOT / "dist"), str(source)]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:2])
