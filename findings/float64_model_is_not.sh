#!/usr/bin/env bash
# transformers 5.23.0, LlamaForCausalLM in float64: norms and rotary angles are float32 numbers in float64 tensors.
#
# `model.double()` makes every parameter and buffer float64 and the outputs are float64, so a comparison in float64
# seems to promise 1e-15. RMSNorm casts its input to float32 and the rotary embedding computes cosines in float32,
# both cast back: each is off by a float32 rounding, and no bar below about 1e-7 can be met by a right reading.
#
# Seen: norm off by 1.3e-07 (relative), cosines off by 3.3e-08.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==5.23.0"
"$work/env/bin/python" -W ignore - <<'PY'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64, attn_implementation="eager"))
model = model.double().eval()
dtypes = {x.dtype for x in (*model.parameters(), *model.buffers())}
x = torch.randn(1, 5, 32, dtype=torch.float64)
with torch.no_grad():
    norm = model.model.norm
    wanted = norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    off_norm = float(((norm(x) - wanted) / wanted).abs().max())
    cosines, _ = model.model.rotary_emb(x, torch.arange(5)[None])
    angles = torch.arange(5.0, dtype=torch.float64)[:, None] / 1e4 ** (torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    off_cosines = float((cosines[0, :, :4] - angles.cos()).abs().max())
print(f"transformers {transformers.__version__}, parameters and buffers {dtypes}, cosines {cosines.dtype}: "
      f"norm off by {off_norm:.2g} (relative), cosines off by {off_cosines:.2g}")
float64 = dtypes == {torch.float64} and norm(x).dtype == cosines.dtype == torch.float64
sys.exit(0 if float64 and 1e-9 < off_norm < 1e-6 and 1e-9 < off_cosines < 1e-6 else 1)
PY
