#!/usr/bin/env bash
# The gradient of mse_loss, smooth_l1_loss and huber_loss of sharded DTensors (torch 2.13.0) is too large by the number
# of ranks; where the ranks do not hold equally much the loss is wrong as well. l1_loss, and the same mean written out,
# are right.
#
# A loss over a batch or a sequence that is sharded has a mean over all of it. Each rank's backward of these three
# divides by the numbers of its own share, and the parts are then added up. The loss is right where ranks divide the
# rows, so curves look as usual; the learning rate is that of another run, with clipping or Adam hardly to be seen, and
# changes when the run goes on with more ranks. Value heads, distillation and diffusion train on mse_loss. Write
# ((x-y)**2).mean(), or take reduction="sum" and divide.
#
# Seen on two ranks, 1, 1, 4, 0 against 0: mse_loss 4.5 with gradient 4 for the 4, in place of 2; smooth_l1_loss and
# huber_loss 0.5 in place of 0.25; l1_loss, the mean of squares and mse_loss with "sum" right. Of 1, 1, 4 on two ranks
# mse_loss is 8.5 for 6, smooth_l1_loss and huber_loss 2 for 1.5.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/losses.py" <<'PY'
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

LOSSES = {
    "mse_loss": F.mse_loss,
    "smooth_l1_loss": F.smooth_l1_loss,
    "huber_loss": F.huber_loss,
    "l1_loss": F.l1_loss,
    "mean of squares": lambda x, y: ((x - y) ** 2).mean(),
    "mse_loss, sum": lambda x, y: F.mse_loss(x, y, reduction="sum"),
}
DIVIDED, UNEVEN = [1.0, 1.0, 4.0, 0.0], [1.0, 1.0, 4.0]


def of_parts(loss, numbers, mesh):
    x, zeros = (distribute_tensor(t, mesh, [Shard(0)]) for t in (torch.tensor(numbers), torch.zeros(len(numbers))))
    value = loss(x.requires_grad_(), zeros)
    value.backward()
    return value.full_tensor().item(), x.grad.full_tensor()[2].item()


def of_all(loss, numbers):
    x = torch.tensor(numbers, requires_grad=True)
    value = loss(x, torch.zeros(len(numbers)))
    value.backward()
    return value.item(), x.grad[2].item()


def losses(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mesh, ok = init_device_mesh("cpu", (2,)), True
    for name, loss in LOSSES.items():
        found = [of_parts(loss, numbers, mesh) for numbers in (DIVIDED, UNEVEN)]
        right = [of_all(loss, numbers) for numbers in (DIVIDED, UNEVEN)]
        of_four = [round(a / b, 4) for a, b in zip(found[0], right[0])]
        wrong = name in ("mse_loss", "smooth_l1_loss", "huber_loss")
        ok = ok and of_four == ([1, 2] if wrong else [1, 1]) and (abs(found[1][0] - right[1][0]) > 0.4) == wrong
        if rank == 0:
            print(f"{name}: (loss, gradient of the 4) of four numbers {found[0]}, right {right[0]}")
            print(f"{name}: loss of three numbers {found[1][0]:.3g}, right {right[1][0]:.3g}", flush=True)
    dist.barrier()
    os._exit(0 if ok else 1)


if __name__ == "__main__":
    print(f"torch {torch.__version__}, two ranks", flush=True)
    torch.multiprocessing.spawn(losses, (sys.argv[1],), 2)
PY
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6"
"$work/env/bin/python" -W ignore "$work/losses.py" "$work"
