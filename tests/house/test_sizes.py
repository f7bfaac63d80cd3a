"""A file does one thing: it stays short enough to be read at once."""

from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src/bulkedge"
MOST = 400  # lines


def test_no_file_is_longer_than_the_limit():
    lines = {
        str(path.relative_to(SOURCE)): len(path.read_text(encoding="utf-8").splitlines())
        for path in SOURCE.rglob("*.py")
    }
    assert len(lines) > 100
    assert [name for name, count in lines.items() if count > MOST] == []
