#!/usr/bin/env bash
# An exponential average of bfloat16 weights with a decay of 0.999 or more never leaves its first weights: AveragedModel
# with get_ema_multi_avg_fn (torch 2.13.0), without a word. float16 gets halfway at 0.999 and nowhere at 0.9999.
#
# The average is kept in the dtype of the model, and a step adds a thousandth of the difference. With eight bits that is
# less than half a unit for every weight whose difference is less than some four times its size, and is rounded away
# each time. Training goes on, the average is saved as what should be published (it is smoother, and scores better where
# it works), and is the initial model, or the base of a fine-tuning. Its loss does not look wrong. The plain mean of
# checkpoints, the default of AveragedModel, stops likewise after some hundreds. Make the average of a float32 copy:
# AveragedModel(copy.deepcopy(model).float(), avg_fn=get_ema_avg_fn(decay)) can be updated from bfloat16 weights.
#
# Seen: weights that double at once and stay; how far the average has come after 20,000 steps, of 1: decay 0.999:
# bfloat16 0.00, float16 0.48, float32 1.00; decay 0.9999: 0.00, 0.00, 0.86; a float32 copy updated from bfloat16: 1.00
# and 0.86. Every weight of bfloat16 is its first one, bit for bit. Mean of one 1 and a thousand 2s: 1.94, of 2.00.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q --no-compile "torch==2.13.0" "numpy==2.4.6"
"$work/env/bin/python" - <<'PY'
import copy
import sys
import warnings

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

said = []
warnings.simplefilter("always")
warnings.showwarning = lambda message, *_, **__: said.append(str(message))
first = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) * 0.02
good = True


def average(dtype, decay, wide=False):
    model = torch.nn.Linear(32, 32, bias=False).to(dtype)
    model.weight.data.copy_(first)
    start = model.weight.detach().clone()
    if wide:
        kept = AveragedModel(copy.deepcopy(model).float(), avg_fn=get_ema_avg_fn(decay))
    else:
        kept = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    kept.update_parameters(model)
    model.weight.data.mul_(2)
    for _ in range(20_000):
        kept.update_parameters(model)
    way = (kept.module.weight.float() - start.float()) @ start.float().T
    return (way.trace() / start.float().square().sum()).item(), torch.equal(kept.module.weight.detach(), start)


wanted = {0.999: (0, 0.48, 1), 0.9999: (0, 0, 0.865)}
for decay, ways in wanted.items():
    for dtype, way in zip((torch.bfloat16, torch.float16, torch.float32), ways):
        come, still = average(dtype, decay)
        print(f"torch {torch.__version__}, decay {decay}, {dtype}: has come {come:.3f} of the way; as at first: {still}")
        good &= abs(come - way) < 0.05 and (still or dtype != torch.bfloat16)
    come, _ = average(torch.bfloat16, decay, wide=True)
    print(f"torch {torch.__version__}, decay {decay}, a float32 copy: has come {come:.3f} of the way")
    good &= abs(come - ways[2]) < 0.05
model = torch.nn.Linear(4, 4, bias=False).to(torch.bfloat16)
mean = AveragedModel(model)
for n in range(1001):
    model.weight.data.fill_(1 if n == 0 else 2)
    mean.update_parameters(model)
got = mean.module.weight[0, 0].item()
print(f"mean of one 1 and a thousand 2s in bfloat16: {got}; warnings: {said}")
sys.exit(0 if good and got < 1.95 and not said else 1)
PY
