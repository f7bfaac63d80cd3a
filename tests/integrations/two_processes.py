"""A training in two processes of gloo; begun by ``torch.distributed.run``.

two_processes.py Accelerate|FSDP2 HOLDER FOLDER OUT
"""

import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import small

STEPS = 4


def main():
    way, holder, folder, out = sys.argv[1:]
    torch.set_num_threads(1)
    model = peft.get_peft_model(small.load_base(folder), small.config_of("LoRA"))
    {"Accelerate": accelerated, "FSDP2": sharded}[way](model, small.hold(holder, folder), out)


def accelerated(model, hold, out):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    model, optimizer = accelerator.prepare(model, optimizer)
    inner = accelerator.unwrap_model(model)
    hold._build(inner).attach(optimizer)
    for batch in own_batches(accelerator.process_index):
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        inner.save_pretrained(Path(out) / "tuned")
    accelerator.end_training()


def sharded(model, hold, out):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    holder = hold._build(model)  # of whole weights: its moments are checked against them
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    holder.attach(optimizer)
    for batch in own_batches(dist.get_rank()):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {
        name: (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().contiguous()
        for name, x in model.state_dict().items()
    }
    if dist.get_rank() == 0:
        whole = peft.get_peft_model(small.make_model(), small.config_of("LoRA"))
        whole.load_state_dict(state)
        whole.save_pretrained(Path(out) / "tuned")
    dist.barrier()
    dist.destroy_process_group()


def own_batches(rank):
    return [x for i, x in enumerate(small.batches(2 * STEPS)) if i % 2 == rank]


if __name__ == "__main__":
    main()
