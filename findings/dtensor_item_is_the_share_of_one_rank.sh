#!/usr/bin/env bash
# A sum, norm, mean or maximum of a DTensor (torch 2.13.0) that is taken out with .item(), float(), int() or bool() is
# that of the rank's own share. Each rank gets another number, without a warning.
#
# The parameters of a model under fully_shard are DTensors, and reductions of them give one number whose parts are still
# to be added up. What goes on computing with it adds them up; what makes a Python number of it does not. So a checksum
# of the weights after loading depends on the number of ranks, a norm in a log is too small, a counter of zeros counts a
# share, and `if torch.isnan(w).any()` is true on the rank that holds the NaN and on no other: one rank skips the step
# and the rest make it. std, var and median are right, which hides it. Call full_tensor() first.
#
# Seen, a matrix of 0 to 11 in four rows on two ranks: sum().item() 15 and 51 for 66, norm 7.4 and 21.2 for 22.5, mean
# 2.5 and 8.5 for 5.5, max 5 and 11, numbers above 4 counted 1 and 6 for 7; with a NaN in the last row isnan().any() is
# False and True; 66 by sum().full_tensor().item() on both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/shares.py" <<'PY'
import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

RIGHT = {
    "sum": (15.0, 51.0), "norm": (7.4, 21.2), "mean": (2.5, 8.5), "max": (5.0, 11.0), "above 4": (1, 6),
    "NaN": (False, True), "std": (3.6, 3.6), "full": (66.0, 66.0),
}  # fmt: skip


def shares(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    layer = torch.nn.Linear(3, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(12.0).reshape(4, 3))
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    w = layer.weight.detach()
    broken = torch.log(10.5 - w)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = {
            "sum": w.sum().item(), "norm": round(float(w.norm()), 1), "mean": w.mean().item(), "max": w.max().item(),
            "above 4": int((w > 4).sum()), "NaN": bool(torch.isnan(broken).any()), "std": round(w.std().item(), 1),
            "full": w.sum().full_tensor().item(),
        }  # fmt: skip
    every = [None, None]
    dist.all_gather_object(every, (found, len(said)))
    found = {name: (every[0][0][name], every[1][0][name]) for name in found}
    if rank == 0:
        print(f"torch {torch.__version__}, {type(w).__name__} {w.placements}, by rank: {found}, warnings {every[0][1]}", flush=True)
    dist.barrier()
    os._exit(0 if found == RIGHT and not every[0][1] + every[1][1] else 1)


if __name__ == "__main__":
    torch.multiprocessing.spawn(shares, (sys.argv[1],), 2)
PY
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6"
"$work/env/bin/python" "$work/shares.py" "$work"
