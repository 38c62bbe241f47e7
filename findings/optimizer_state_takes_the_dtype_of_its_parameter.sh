#!/usr/bin/env bash
# Optimizer.load_state_dict of torch 2.13.0 casts every tensor of the state to the dtype of its parameter, whatever it
# was saved as: float32 master weights that an optimizer keeps for a bfloat16 model are rounded to the model, and
# integers become floats.
#
# An optimizer for bfloat16 keeps its own float32 copy of the weights, float32 moments or 8-bit codes in `state`, and
# torch.save keeps them as they are. Going on from that file is then not going on: ten steps of 1e-4 from a weight of 1
# are gone, as bfloat16 has no number between 0.996 and 1, a counter beyond 2 ** 24 stands still, and codes take four
# times the memory. Only a key called "step" is left alone. The first step after loading works with what is left, and no
# warning is given. Put the saved tensors into opt.state after loading, or override load_state_dict.
#
# Seen: a master of 0.999 float32 is 1 bfloat16 after loading, in a bfloat16 model; for a float32 parameter uint8 codes
# 200 are 200.0 float32 and a counter of 16777217 is 16777216.0; under "step" 16777217 int64 stays; Adam's moments of a
# float32 run are bfloat16 in a bfloat16 model.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6"
"$work/env/bin/python" - "$work/state.pt" <<'PY'
import sys
import warnings

import torch

warnings.simplefilter("error")


class WithMaster(torch.optim.Optimizer):
    """Gradient descent by a float32 copy of each weight."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-4})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                master = self.state[p].setdefault("master", p.float())
                p.copy_(master.sub_(group["lr"] * p.grad.float()))


def weight(dtype):
    return torch.nn.Parameter(torch.ones(4, dtype=dtype))


def reread(optimizer, parameter, made):
    torch.save(optimizer.state_dict(), sys.argv[1])
    other = made([parameter])
    other.load_state_dict(torch.load(sys.argv[1], weights_only=True))
    return {k: (v.flatten()[0].item(), str(v.dtype)) for k, v in other.state[parameter].items()}


p = weight(torch.bfloat16)
optimizer = WithMaster([p])
for _ in range(10):
    p.grad = torch.ones_like(p)
    optimizer.step()
before = round(optimizer.state[p]["master"][0].item(), 4), str(optimizer.state[p]["master"].dtype)
after = reread(optimizer, weight(torch.bfloat16), WithMaster)["master"]

q = weight(torch.float32)
optimizer = WithMaster([q])
count = torch.tensor(2**24 + 1)
optimizer.state[q] |= {"codes": torch.full((4,), 200, dtype=torch.uint8), "seen": count, "step": count}
integers = reread(optimizer, weight(torch.float32), WithMaster)

optimizer = torch.optim.Adam([q])
q.grad = torch.full_like(q, 0.1)
optimizer.step()
moments = {k: v[1] for k, v in reread(optimizer, weight(torch.bfloat16), torch.optim.Adam).items()}
print(f"torch {torch.__version__}: master before saving {before}, after loading {after}")
print(f"integers of a float32 parameter: {integers}; Adam of a float32 run in a bfloat16 model: {moments}")
right = before == (0.999, "torch.float32") and after == (1.0, "torch.bfloat16")
kept = {"codes": (200.0, "torch.float32"), "seen": (2.0**24, "torch.float32"), "step": (2**24 + 1, "torch.int64")}
in_adam = {"step": "torch.float32", "exp_avg": "torch.bfloat16", "exp_avg_sq": "torch.bfloat16"}
sys.exit(0 if right and integers == kept and moments == in_adam else 1)
PY
