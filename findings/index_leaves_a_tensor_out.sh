#!/usr/bin/env bash
# A tensor that the index of the shards leaves out is drawn at random by transformers 4.57.6, though a shard holds it.
#
# model.safetensors.index.json says which file holds each tensor. A shard that is written again by another tool, or an
# index that is, can lack an entry. 4.57.6 takes the index's names for all that there is: the tensor counts as missing,
# is initialised, and what the shard holds is passed over; nothing but a warning says so. 4.37.2 reports it missing and
# loads it all the same, 5.23.0 goes by the files and says nothing.
#
# Seen: largest difference of the matrix to what was saved: 0 in 4.37.2 and 5.23.0, about 0.1 in 4.57.6.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/index.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
folder, drawn = Path(sys.argv[1]), sys.argv[2] == "drawn"
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**sizes))
model.save_pretrained(folder, max_shard_size="20KB")
index, name = folder / "model.safetensors.index.json", "model.layers.1.mlp.up_proj.weight"
said = json.loads(index.read_text())
del said["weight_map"][name]
index.write_text(json.dumps(said))
again = LlamaForCausalLM.from_pretrained(folder)
delta = (again.state_dict()[name] - model.state_dict()[name]).abs().max().item()
print(f"transformers {transformers.__version__}: off by {delta:.3g}")
sys.exit(0 if (delta > 0) == drawn else 1)
PY
for said in 4.57.6=drawn 4.37.2=kept 5.23.0=kept; do
    version=${said%=*}
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/index.py" "$work/of-$version" "${said#*=}"
done
