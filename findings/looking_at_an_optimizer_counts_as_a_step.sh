#!/usr/bin/env bash
# get_optimizer_state_dict of torch.distributed.checkpoint (torch 2.13.0) makes a step of an optimizer that has made
# none: Adam's first update afterwards is 0.74 of what it would have been, RAdam's 0.53, Rprop's and ASGD's nothing.
#
# The state must exist before it can be saved or loaded into, so it is made by a step with gradients and a learning rate
# of 0. No weight moves, and the counter does: the correction for the start, 1 - beta ** step, is that of a second step
# whose first gradient was 0, and Rprop takes the learning rate of 0 for its step size. Loading replaces all of it.
# Saving at step 0, looking for a checkpoint that is not there, or one rank more that only saves, leaves it, and a run
# with checkpoints is another run than one without. Save after the first step; or make the optimizer anew.
#
# Seen: first change of a weight with gradient 1 and learning rate 0.1: Adam .100, and .074 after a look; RAdam .1 and
# .053; NAdam .1056 and .1045; Rprop .1 and .000001; ASGD .1 and 0; RMSprop and Adafactor as without; `step` is 2.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6"
"$work/env/bin/python" -W ignore - 2> "$work/log" <<'PY' || { tail -20 "$work/log"; exit 1; }
import sys

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

RIGHT = {
    "Adam": (0.1, 0.0744), "RAdam": (0.1, 0.0526), "NAdam": (0.1056, 0.1045), "Rprop": (0.1, 0), "ASGD": (0.1, 0),
    "RMSprop": (1, 1), "Adafactor": (0.0434, 0.0434),
}  # fmt: skip
good = True
for name, right in RIGHT.items():
    changes = []
    for look in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 2, bias=False)
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
        before = model.weight.detach().clone()
        if look:
            state = get_optimizer_state_dict(model, optimizer)["state"]["weight"]["step"]
            good &= torch.equal(model.weight, before) and state.item() == 1
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        changes.append((before - model.weight.detach()).mean().item())
    steps = next(iter(optimizer.state.values()))["step"].item()
    print(f"torch {torch.__version__}, {name}: {changes[0]:.6f}, after a look {changes[1]:.6f}, step {steps}")
    good &= all(abs(change - expected) < 1e-4 for change, expected in zip(changes, right, strict=True)) and steps == 2
sys.exit(0 if good else 1)
PY
