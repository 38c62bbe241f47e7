#!/usr/bin/env bash
# CanineModel computes nothing but NaN in float64, in transformers 4.37.2 and 5.23.0.
#
# float64 is where a conversion is checked when float32 rounding is in the way. The local attention of CANINE makes its
# mask in float32 and multiplies it by the lowest number of the model's dtype; that of float64 overflows to -inf in
# float32, and 0 * -inf, at every position that is to be seen, is NaN. float32 and bfloat16 are finite.
#
# Seen: all of last_hidden_state and pooler_output NaN in float64 for a text of 8 characters without padding, finite in
# float32, in both releases, without a warning.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/canine.py" <<'PY'
import sys

import torch
import transformers
from transformers import CanineConfig, CanineModel

torch.manual_seed(0)
sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
model = CanineModel(CanineConfig(**sizes)).eval()
ids = torch.arange(65, 73)[None]
with torch.no_grad():
    single = model(ids)
    double = model.double()(ids)
nans = [x.isnan().all().item() for x in (double.last_hidden_state, double.pooler_output)]
finite = [x.isfinite().all().item() for x in (single.last_hidden_state, single.pooler_output)]
print(f"transformers {transformers.__version__}: float32 finite {finite}, float64 all NaN {nans}")
sys.exit(0 if all(nans) and all(finite) else 1)
PY
for version in 5.23.0 4.37.2; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/canine.py"
done
