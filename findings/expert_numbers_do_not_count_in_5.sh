#!/usr/bin/env bash
# transformers 5.23.0 stacks the experts of a Mixtral in the order of their numbers and does not look at the numbers:
# experts 0, 2, 5 and 7 of a file become 0, 1, 2 and 3 of a model of four. One tensor less, and nothing loads.
#
# Release 4 had a module an expert and reported numbers it did not know as unexpected and those it lacked as missing. In
# 5 a list of tensors is gathered by a pattern and stacked, and only the shape of the stack is compared. So a share of
# the experts that kept its numbers (pruned to four, or one rank's share of an expert-parallel run) loads under a config
# that says four, without a word, and the rows of the router that choose them are others unless they were moved too.
# Where the count is wrong the whole load fails: a file that lacks one expert's w1, which 4.57.6 filled with random
# numbers and a warning, ends in a RuntimeError, whatever else is in it.
#
# Seen: 5.23.0 reports nothing for experts 0, 2, 5, 7 and computes what it computes with 0, 1, 2, 3; 4.57.6 reports 6
# missing and 6 unexpected keys. Without one w1: RuntimeError in 5.23.0, one missing key in 4.57.6.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/experts.py" <<'PY'
import re
import shutil
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

transformers.logging.set_verbosity_error()
folder, release = sys.argv[1], int(transformers.__version__[0])
torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 4}
sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
model = MixtralForCausalLM(MixtralConfig(**sizes)).eval()
ids = torch.arange(12)[None]
model.save_pretrained(f"{folder}/plain")
stored = load_file(f"{folder}/plain/model.safetensors")


def loaded(name, tensors):
    shutil.copytree(f"{folder}/plain", f"{folder}/{name}")
    save_file(tensors, f"{folder}/{name}/model.safetensors", {"format": "pt"})
    read, info = MixtralForCausalLM.from_pretrained(f"{folder}/{name}", output_loading_info=True)
    delta = (read.eval()(ids).logits - model(ids).logits).abs().max().item()
    return len(info["missing_keys"]), len(info["unexpected_keys"]), delta


def renumbered(key):
    return re.sub(r"experts\.(\d)", lambda m: f"experts.{[0, 2, 5, 7][int(m[1])]}", key)


print(f"transformers {transformers.__version__}", end=": ")
moved = loaded("moved", {renumbered(k): v for k, v in stored.items()})
print("experts 0, 2, 5, 7: missing, unexpected, delta of logits", moved)
try:
    fewer = loaded("fewer", {k: v for k, v in stored.items() if not k.endswith("experts.1.w1.weight")})[:2]
except RuntimeError as error:
    fewer = str(error).split("!")[0]
print("without one w1:", fewer)
if release == 5:
    good = moved == (0, 0, 0.0) and isinstance(fewer, str) and "conversion" in fewer
else:
    good = moved[:2] == (6, 6) and fewer == (1, 0)
sys.exit(0 if good else 1)
PY
python3 -m venv "$work/env"
for version in 5.23.0 4.57.6; do
    "$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version" "safetensors==0.8.0"
    mkdir "$work/$version"
    "$work/env/bin/python" -W ignore "$work/experts.py" "$work/$version"
done
