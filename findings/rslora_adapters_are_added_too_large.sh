#!/usr/bin/env bash
# add_weighted_adapter of peft 0.21.2 makes a sum of rank-stabilised adapters (use_rslora=True) too large: by the root
# of the new rank, 2.8 for two of rank 4 and 5.7 for two of rank 16, with combination_type="cat" as with "svd".
#
# The scales of the adapters are multiplied into the sum, which is then given the scale 1 by lora_alpha = r. That is
# right for alpha / r. The copy of the config keeps use_rslora, whose scale is alpha / sqrt(r). "cat" is the exact way,
# and is so without use_rslora. The sum is scaled alike when it is saved and loaded, and nothing is logged. Multiply the
# weights given by 1 / sqrt(rank of the sum) instead. "linear" is no sum for either kind: it adds A and B each by
# themselves, so that B of one meets A of the other.
#
# Seen, two adapters of rank 4, weights 1 and 1, change of the weights through the sum of both changes: "cat" 1.0000
# without use_rslora and 2.8284 with it, "svd" at rank 8 1.0000 and 2.8284; with weights of 1 / sqrt(8) 1.0000. "linear"
# without it is off from the sum by 80 to 120 % of its size.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q --no-compile "torch==2.13.0" "numpy==2.4.6" "transformers==5.24.0" "peft==0.21.2" "accelerate==1.15.0"
"$work/env/bin/python" -W ignore - "$work" <<'PY'
import copy
import logging
import sys
import warnings
from pathlib import Path

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model

said = []
warnings.simplefilter("always")
warnings.showwarning = lambda message, *_, **__: said.append(str(message))
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger().addHandler(handler)
good = True


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(32, 32, bias=False)

    def forward(self, x):
        return self.q(x)


def change(model, name):
    model.set_adapter(name)
    return model.base_model.model.q.get_delta_weight(name).detach()


for stabilised in (False, True):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q"], use_rslora=stabilised)
    model = get_peft_model(Model(), config, adapter_name="first")
    model.add_adapter("second", copy.deepcopy(config))
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_(0, 0.1, generator=generator)
    wanted = change(model, "first") + change(model, "second")
    found = {}
    for name, weight, how in (("cat", 1.0, "cat"), ("svd", 1.0, "svd"), ("linear", 1.0, "linear"), ("less", 8**-0.5, "cat")):
        rank = {"svd_rank": 8} if how == "svd" else {}
        model.add_weighted_adapter(["first", "second"], [weight, weight], name, combination_type=how, **rank)
        made = change(model, name)
        times = ((made * wanted).sum() / wanted.square().sum()).item()
        off = ((made - wanted).norm() / wanted.norm()).item()
        rest = ((made - times * wanted).norm() / made.norm()).item()
        model.save_pretrained(sys.argv[1], selected_adapters=[name])
        again = PeftModel.from_pretrained(Model(), Path(sys.argv[1], name), adapter_name=name)
        good &= torch.equal(change(again, name), made)
        found[name] = times, off, rest
    cut = {name: tuple(round(x, 4) for x in numbers) for name, numbers in found.items()}
    print(f"peft {peft.__version__}, use_rslora {stabilised}, times the sum, off from it, what is no multiple: {cut}")
    times = 8**0.5 if stabilised else 1
    good &= all(abs(found[k][0] - times) < 1e-3 and found[k][2] < 1e-3 for k in ("cat", "svd"))
    good &= (found["less"][1] < 1e-3) if stabilised else 0.8 < found["linear"][1] < 1.2
print(f"warnings: {said}")
sys.exit(0 if good and not said else 1)
PY
