"""Making a whole update weaker, beside the repairs that take parts of it: what each costs.

python benchmarks/rescale.py

Both shipped adapters, through ``bulkedge.repair`` or PEFT's function, and files: new directions in
the encoder, ``‖ΔW‖_F`` of all its layers, drift on the base's inputs, accuracy on 1,500 test
glosses, and recall@1 of a synset's example sentence among 1,000, which nobody trained.  Cells are
kept in ``results/rescale.jsonl``; some twenty seconds each.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Cells
from peft import PeftModel
from peft.tuners.lora.intruders import reduce_intruder_dimension
from protect import bench, drift
from protect_adapters import ADAPTERS, BASE, Adapter, example
from protect_model import Tuned
from safetensors.torch import load_file, save_file

import bulkedge
from bulkedge.repairing import Clip, Project, Scale, Shrink

SHIPPED = [adapter for adapter in ADAPTERS if adapter.shipped]
WEIGHTS = "adapter_model.safetensors"
# what is needed most comes first
METHODS: dict[str, Any] = {
    "as trained": None,
    "rescale, level 1 (θ_k)": bulkedge.Rescale(level=1.0),
    "rescale, uniform 0.7": bulkedge.Rescale(uniform=0.7),
    "clip": Clip(),
    "rescale, level 1, of edge (θ_c)": bulkedge.Rescale(level=1.0, of="edge"),
    "PEFT, λ 0.5": 0.5,
    "project": Project(),
    "shrink": Shrink(),
    "scale, keep 0.5": Scale(0.5),
    "rescale, uniform 0.5": bulkedge.Rescale(uniform=0.5),
}


def written(adapter: Adapter, method: Any, folder: Path) -> Path:
    """The adapter that a method makes of it."""
    if method is None:
        return adapter.folder
    if not isinstance(method, float):
        bulkedge.repair(BASE, adapter.folder, folder / "out", method=method, only=["encoder.*"])
        return folder / "out"
    model = PeftModel.from_pretrained(
        example.load_base(BASE, bench(adapter.part).categories), adapter.folder
    )
    reduce_intruder_dimension(model, mitigation_lambda=method, logging_sink=None)
    model.save_pretrained(folder, selected_adapters=["intruder_reduced"])
    out = folder / "intruder_reduced"
    trained = load_file(adapter.folder / WEIGHTS)  # it writes the head of the untrained base
    head = {name: tensor for name, tensor in trained.items() if "lora_" not in name}
    save_file(load_file(out / WEIGHTS) | head, out / WEIGHTS)
    return out


def figures(adapter: Adapter, method: Any) -> dict[str, Any]:
    """All figures of an adapter and a method."""
    with tempfile.TemporaryDirectory() as folder:
        out = written(adapter, method, Path(folder))
        audit = bulkedge.audit(BASE, out, recipe={"include": ["encoder.*"]})
        tuned = Tuned(out)
    updates = tuned.dense
    return {
        "new": sum(row.new_directions for row in audit.matrices),
        "norm": math.sqrt(sum(float(D.square().sum()) for D in updates.values())),
        "drift": drift(adapter, updates),
        **bench(adapter.part).row(updates, tuned),
    }


def main() -> None:
    """Every method on both adapters."""
    torch.set_num_threads(1)
    cells = Cells("rescale")
    for name, method in METHODS.items():
        for adapter in SHIPPED:
            cells.measure(
                {"adapter": adapter.folder.name, "method": name},
                lambda adapter=adapter, method=method: figures(adapter, method),
            )


if __name__ == "__main__":
    main()
