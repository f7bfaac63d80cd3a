"""The picture of a watched run in docs/fine-tuning.md.

python docs/figures/monitor.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib  # noqa: TID253
import peft  # noqa: TID253
import torch
from torch import nn
from transformers import Trainer, TrainingArguments  # noqa: TID253

from bulkedge.tune import IntruderMonitor

STEPS, WIDTH, CLASSES = 100, 64, 10


class Network(nn.Module):
    """Two layers that are adapted, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 96), nn.Linear(96, 80)
        self.head = nn.Linear(80, CLASSES)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss and logits."""
        logits = self.head(self.second(self.first(x).relu()).relu())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def main() -> None:
    """Train, watch and draw."""
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["first", "second"])
    data = [{"x": torch.randn(WIDTH), "labels": i % CLASSES} for i in range(320)]
    arguments = TrainingArguments(
        "build/monitor", max_steps=STEPS, learning_rate=0.01, report_to="none",
        label_names=["labels"], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    monitor = IntruderMonitor(every=5)
    model = peft.get_peft_model(Network(), lora)
    Trainer(model, arguments, train_dataset=data, callbacks=[monitor]).train()
    matplotlib.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "bulkedge",
        "font.sans-serif": ["DejaVu Sans"],
    }  # text stays text
    monitor.figure().savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
