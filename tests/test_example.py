"""The example trains what it says, and what it writes can be audited."""

import gzip
import json
import subprocess
import sys

import bulkedge
from helpers import EXAMPLE, MINILM


def test_training_writes_an_adapter_that_the_audit_reads(tmp_path):
    command = [sys.executable, EXAMPLE / "train.py", MINILM, tmp_path / "out"]
    options = ["--method", "lora", "--rank", "2", "--steps", "2", "--batch", "4", "--test", "200"]
    subprocess.run([*command, *options], check=True, capture_output=True)
    report = json.loads((tmp_path / "out/training.json").read_text())
    assert (report["rank"], report["alpha"], report["steps"]) == (2, 4.0, 2)
    assert 0 < report["accuracy"] < 0.5
    record = bulkedge.audit(MINILM, tmp_path / "out")
    assert {matrix.rank for matrix in record.matrices} == {2}
    assert {row.name for row in record.skipped} == {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"


def test_the_glosses_are_what_the_readme_says():
    rows = [
        line.split("\t")
        for line in gzip.decompress((EXAMPLE / "glosses.tsv.gz").read_bytes()).decode().splitlines()
    ]
    splits = [split for split, _, _ in rows]
    assert (splits.count("train"), splits.count("test")) == (16_000, 4_000)
    assert len({category for _, category, _ in rows}) == 25


def test_the_shipped_adapters_are_small():
    sizes = [path.stat().st_size for path in EXAMPLE.glob("lora-r*/adapter_model.safetensors")]
    assert len(sizes) == 2
    assert sum(sizes) < 2.5e6
