"""A training in two processes of gloo; begun by ``torch.distributed.run``.

two_processes.py Accelerate|FSDP2 HOLDER KIND FOLDER OUT

A refusal is written to OUT/refused.
"""

import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import small

from bulkedge import InputError

STEPS = 4


def main():
    way, holder, kind, folder, out = sys.argv[1:]
    torch.set_num_threads(1)
    train = {"Accelerate": accelerated, "FSDP2": sharded}[way]
    try:
        train(model_of(kind, small.load_base(folder)), small.hold(holder, folder), kind, Path(out))
    except InputError as error:
        (Path(out) / "refused").write_text(str(error))
    if dist.is_initialized():
        dist.destroy_process_group()


def model_of(kind, base):
    config = small.config_of(kind)
    return base if config is None else peft.get_peft_model(base, config)


def accelerated(model, hold, kind, out):
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
        inner.save_pretrained(out / "tuned")
    accelerator.end_training()


def sharded(model, hold, kind, out):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    holder = hold._build(model)  # of whole weights: its moments are checked against them
    for layer in [x for x in model.modules() if type(x).__name__.endswith("DecoderLayer")]:
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
        whole = model_of(kind, small.make_model())
        whole.load_state_dict(state)
        whole.save_pretrained(out / "tuned")
    dist.barrier()


def own_batches(rank):
    return [x for i, x in enumerate(small.batches(2 * STEPS)) if i % 2 == rank]


if __name__ == "__main__":
    main()
