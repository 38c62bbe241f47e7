#!/usr/bin/env bash
# The joined safetensors that torch 2.13.0 writes (HuggingFaceStorageWriter, enable_consolidation=True) carry no
# `__metadata__`, and transformers 4.37.2 cannot load them; the slices that it joined say `format: pt`.
#
# The writer exists so that a training run ends in a folder that from_pretrained takes. Its plain form does: each file
# says {"format": "pt"}. When ranks wrote slices and the writer joins them, the header is made anew from the tensors
# alone. safetensors itself, 4.57.6 and 5.23.0 do not mind; 4.37.2 asks the missing metadata for its format and
# fails with an AttributeError that names neither file nor cause. Rewriting the header with the key mends the folder.
#
# Seen: the slice has a format, the joined file none; 4.57.6 loads, 4.37.2 raises AttributeError.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/write.py" <<'PY'
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from transformers import GPT2Config, GPT2LMHeadModel

warnings.simplefilter("ignore")
folder = Path(sys.argv[1])
config = GPT2Config(n_embd=8, n_head=2, n_layer=1, n_positions=8, vocab_size=16, architectures=["GPT2LMHeadModel"])
config.save_pretrained(folder)
state = {k: v for k, v in GPT2LMHeadModel(config).state_dict().items() if k != "lm_head.weight"}
names = dict.fromkeys(state, 1)
writer = HuggingFaceStorageWriter(str(folder), names, save_distributed=True, enable_consolidation=True)
dcp.save(state, storage_writer=writer, no_dist=True)
(slices,), (joined,) = folder.glob("sharded/*.safetensors"), folder.glob("*.safetensors")
with safe_open(slices, "pt") as one, safe_open(joined, "pt") as other:
    said = (one.metadata() or {}).get("format"), other.metadata()
print(f"torch {torch.__version__}: format of the slice and metadata of the joined file: {said}")
sys.exit(0 if said == ("pt", None) else 1)
PY
cat > "$work/load.py" <<'PY'
import sys

import transformers
from transformers import AutoModelForCausalLM

try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
    found = "loads"
except Exception as problem:
    found = type(problem).__name__
print(f"transformers {transformers.__version__}: {found}")
expected = "AttributeError" if transformers.__version__.startswith("4.37") else "loads"
sys.exit(0 if found == expected else 1)
PY
for version in 4.57.6 4.37.2; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version" "safetensors==0.8.0"
    if [ "$version" = 4.57.6 ]; then "$work/$version/bin/python" -W ignore "$work/write.py" "$work/gpt2"; fi
    "$work/$version/bin/python" -W ignore "$work/load.py" "$work/gpt2"
done
