"""A training by LLaMA-Factory itself, with the callbacks that its ``run_exp`` takes.

llama_factory.py HOLDER KIND FOLDER OUT

It runs in a process of its own, with the versions of other libraries that it asks for.
"""

import json
import sys
import types
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import small


def main():
    holder, kind, folder, out = sys.argv[1:]
    torch.set_num_threads(1)
    # LLaMA-Factory imports it to read audio, which is not used; its wheels do not load here
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    from llamafactory.train.tuner import run_exp

    out = Path(out)
    rows = [{"instruction": x, "input": "", "output": "w1 w2 w3"} for x in small.texts()]
    (out / "rows.json").write_text(json.dumps(rows))
    (out / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    settings = {
        "stage": "sft", "do_train": True, "model_name_or_path": f"{folder}/base",
        "dataset": "rows", "dataset_dir": str(out), "template": "empty", "cutoff_len": 32,
        "output_dir": str(out / "tuned"), "overwrite_cache": True, "preprocessing_num_workers": 1,
    }  # fmt: skip
    lora = {
        "finetuning_type": "lora", "lora_rank": 4, "lora_alpha": 16,
        "lora_target": ",".join(small.TARGETS), "use_dora": kind == "DoRA",
    }  # fmt: skip
    own = {"finetuning_type": "full"} if kind == "in full" else lora
    run_exp(settings | own | small.TRAINING, callbacks=[small.hold(holder, folder)])


if __name__ == "__main__":
    main()
