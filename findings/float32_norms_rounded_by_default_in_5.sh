#!/usr/bin/env bash
# transformers 5.23.0 rounds the float32 tensors of a mixed checkpoint to the dtype of config.json when it is asked for
# nothing; 4.57.6 widened everything to float32 instead, which is exact. Neither says a word.
#
# Checkpoints with bfloat16 matrices and float32 norms exist (trainers keep norms and routers wide). With
# `from_pretrained(folder)` and no dtype, release 5 takes `dtype` of config.json for the whole model, as
# `dtype="auto"` always has, so that norms lose sixteen bits that are in the file; in 4.57.6 the same call loses
# nothing. Whoever upgrades, or proves a conversion by loading it and comparing, compares other weights than are stored.
#
# Seen: largest |delta| of the norms against the file 3.8e-3 in 5.23.0, 0 in 4.57.6, both without a warning.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/norms.py" <<'PY'
import json
import logging
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

transformers.utils.logging.disable_progress_bar()
said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
folder = Path(sys.argv[1])
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).save_pretrained(folder)
weights = load_file(folder / "model.safetensors")
generator = torch.Generator().manual_seed(0)
norms = [name for name in weights if "norm" in name]
for name in norms:
    weights[name] = 1 + 0.1 * torch.randn(weights[name].shape, generator=generator)
save_file(weights, folder / "model.safetensors", {"format": "pt"})
document = json.loads((folder / "config.json").read_text())
held = AutoModelForCausalLM.from_pretrained(folder).state_dict()
delta = max((held[name].float() - weights[name]).abs().max().item() for name in norms)
print(
    f"transformers {transformers.__version__}: config.json says {document.get('dtype', document.get('torch_dtype'))}, "
    f"loaded as {sorted({str(t.dtype) for t in held.values()})}, norms off by up to {delta:.2g}, warnings {said}"
)
narrowed = transformers.__version__.startswith("5.")
sys.exit(0 if (delta > 1e-3) == narrowed and (delta == 0) != narrowed and not said else 1)
PY
for version in 5.23.0 4.57.6; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/norms.py" "$work/model-$version"
done
