"""What holding and watching a packed model costs in memory, on layers of the size of a 7B model.

    python benchmarks/packed_memory.py          (needs bitsandbytes)

One layer of each shape is packed as nf4 and given a LoRA of rank 16.  The kernel is asked for the
peak of what a holder (its threshold measured) and a monitor (one check) take beyond the layer
itself; what they keep of a layer is counted, and multiplied by the layers of a 7B model.
"""

from __future__ import annotations

import ctypes
import gc
import time
from pathlib import Path
from typing import Any

import peft
import torch
from common import store
from torch import Tensor, nn

from bulkedge.tune import Monitor, SpikeClip

SHAPES = (4096, 4096), (11008, 4096)
WARM_UP = 1100, 2048
PER_BLOCK = 4, 3
"""How many of each shape a block has: q, k, v, o and gate, up, down."""
BLOCKS = 32
RANK = 16


def main() -> None:
    """Measure one layer of each shape."""
    torch.set_num_threads(1)
    measure(*WARM_UP)  # so that what is allocated only once does not count as the cost of a layer
    rows = [measure(m, n) for m, n in SHAPES]
    kept = {
        what: sum(
            BLOCKS * x * row[f"{what}_keeps_bytes"] for x, row in zip(PER_BLOCK, rows, strict=True)
        )
        for what in ("holder", "monitor")
    }
    peaks = {what: max(row[f"{what}_peak_MB"] for row in rows) for what in ("holder", "monitor")}
    store(
        "packed_memory",
        {
            "layers": rows,
            "holder_7B_MB": round(kept["holder"] / 1e6 + peaks["holder"], 1),
            "monitor_7B_MB": round(kept["monitor"] / 1e6 + peaks["monitor"], 1),
            "monitor_keeps_7B_MB": round(kept["monitor"] / 1e6, 1),
        },
    )


def measure(m: int, n: int) -> dict[str, Any]:
    """One packed layer: peaks beyond it, what is kept, and the time."""
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    layer = Linear4bit(n, m, False, quant_type="nf4", compress_statistics=True)
    layer.load_state_dict({"weight": torch.randn(m, n) / n**0.5})
    model = nn.Sequential(layer.to("cpu"))
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    clip, holder_peak, holder_seconds = taken(lambda: SpikeClip(model))
    _, step_peak, _ = taken(clip.step)
    monitor = Monitor(model, thresholds=clip.thresholds)
    _, monitor_peak, monitor_seconds = taken(monitor.check)
    return {
        "shape": [m, n],
        "unpacked_MB": round(4 * m * n / 1e6),
        "holder_peak_MB": max(holder_peak, step_peak),
        "monitor_peak_MB": monitor_peak,
        "holder_keeps_bytes": held_bytes(clip),
        "monitor_keeps_bytes": held_bytes(monitor),
        "threshold_s": round(holder_seconds, 1),
        "check_s": round(monitor_seconds, 1),
    }


def taken(action: Any) -> tuple[Any, float, float]:
    """What an action gives, its peak beyond what was resident before, in MB, and its seconds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide what is taken now
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = resident("VmRSS"), time.process_time()
    found = action()
    return found, round(resident("VmHWM") - before, 1), time.process_time() - start


def resident(what: str) -> float:
    """A figure of this process from the kernel, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(what))


def held_bytes(owner: object) -> int:
    """The bytes of all tensors that an object keeps itself, not those of the model."""
    parts: list[Any] = [*vars(owner).values()]
    total = 0
    while parts:
        part = parts.pop()
        if isinstance(part, Tensor):
            total += part.numel() * part.element_size()
        elif isinstance(part, dict):
            parts += part.values()
        elif isinstance(part, (list, tuple)):
            parts += part
    return total


if __name__ == "__main__":
    main()
