"""What is shipped: the files of a wheel and an sdist, and the README as an index shows it."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import yaml

import bulkedge
from helpers import some

ROOT = Path(__file__).parents[1]
ADDRESS = "https://example.org/o/bulkedge"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_index_finds_every_link_and_image():
    dist = load(ROOT / "scripts/dist.py")
    page = dist.absolute((ROOT / "README.md").read_text(encoding="utf-8"), ADDRESS)
    places = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", page)
    assert all(place.startswith("https://") for _, place in some(places))
    assert f"({ADDRESS}/raw/main/docs/figures/report.png)" in page
    assert f"({ADDRESS}/blob/main/docs/benchmarks.md#the-certified-audit)" in page


def test_the_addresses_are_valid_toml():
    if sys.version_info < (3, 11):
        return
    import tomllib

    dist = load(ROOT / "scripts/dist.py")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    urls = tomllib.loads(text + dist.urls(ADDRESS))["project"]["urls"]
    assert set(urls) == {"Homepage", "Documentation", "Changelog", "Issues"}
    assert all(page.startswith(ADDRESS) for page in some(urls.values()))


def test_one_version_everywhere():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == bulkedge.__version__
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\S+)(?: - (\d{4}-\d\d-\d\d))?$", log, re.MULTILINE)
    versions = [name for name, dated in sections if dated]
    assert sections[0][0] in ("Unreleased", bulkedge.__version__)
    assert bulkedge.__version__ in versions


def test_the_last_run_on_a_cluster_passed():
    """By `make test-ray`, which is no part of CI: with the nodes, of which one was killed."""
    stored = json.loads((ROOT / "benchmarks/results/ray.json").read_text(encoding="utf-8"))
    assert (stored["failures"], stored["errors"], stored["skipped"]) == (0, 0, 0)
    assert "test_a_killed_nodes_matrices_are_computed_elsewhere" in stored["seconds"]


def test_the_last_run_with_the_libraries_of_other_formats_passed():
    """By `make test-formats`, which is no part of CI: nothing failed or was skipped."""
    stored = json.loads((ROOT / "benchmarks/results/formats.json").read_text(encoding="utf-8"))
    assert (stored["failures"], stored["errors"], stored["skipped"]) == (0, 0, 0)
    assert "test_qlora_of_a_real_model_from_audit_to_repair" in stored["seconds"]
    pinned = (ROOT / "tests/checkpoint/requirements.txt").read_text(encoding="utf-8")
    libraries = ("auto-round", "autoawq", "bitsandbytes", "diffusers", "mlx")
    assert all(f"{name}=={stored[name]}" in pinned for name in libraries)


def test_the_oldest_releases_are_those_that_the_project_allows():
    """Of each dependency its lower end, but of torch and of developers' tools none."""
    oldest = load(ROOT / "scripts/oldest.py")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pins = dict(pin.split("==") for pin in some(oldest.oldest(text)))
    assert {"numpy", "pydantic", "transformers", "peft", "matplotlib", "pyarrow", "gguf"} <= set(
        pins
    )
    assert not {"torch", "pytest", "ruff", "bulkedge", "ray"} & set(pins)
    assert all(f"{name}>={version}" in text for name, version in pins.items())
