#!/usr/bin/env bash
# transformers 4.57.6 reads a config.json that 5.23.0 wrote, without a word, and takes another rotary base.
#
# 5.x writes rope_theta inside `rope_parameters`. The last 4.x release keeps that object as an unknown attribute,
# takes rope_theta 10000, its class's default, logs nothing at load (no missing or unexpected key), and computes
# another model. A folder that must serve both needs rope_theta beside it, or instead.
#
# Seen: rope_theta 1e6 in 5.23.0, 1e4 in 4.57.6; largest |delta| of logits 2 of logits up to 3.7.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/logits.py" <<'PY'
import logging
import sys

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

transformers.utils.logging.disable_progress_bar()
folder = sys.argv[1]
if sys.argv[2] == "write":
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64, rope_parameters=rope))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.ndim > 1:
            p.data.normal_(0, 0.2, generator=generator)
    model.save_pretrained(folder)
said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
model, info = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
with torch.no_grad():
    logits = model.eval()(torch.arange(20)[None]).logits[0].numpy()
theta = getattr(model.config, "rope_theta", None) or model.config.rope_parameters["rope_theta"]
odd = [k for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]]
print(f"transformers {transformers.__version__}: rope_theta {theta:g}, warnings {said}, keys that do not fit {odd}")
np.savez(sys.argv[3], logits=logits, theta=theta, silent=not said and not odd)
PY
for pair in 5.23.0:write 4.57.6:read; do
    version=${pair%%:*}
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/logits.py" "$work/model" "${pair##*:}" "$work/$version.npz"
done
"$work/4.57.6/bin/python" - "$work" <<'PY'
import sys

import numpy as np

new, old = (np.load(f"{sys.argv[1]}/{v}.npz") for v in ("5.23.0", "4.57.6"))
delta = np.abs(new["logits"] - old["logits"]).max()
print(f"largest |delta| of logits {delta:.2g} of logits up to {np.abs(new['logits']).max():.2g}")
seen = new["theta"] == 1e6 and old["theta"] == 1e4 and bool(old["silent"]) and delta > 1e-2
sys.exit(0 if seen else 1)
PY
