#!/usr/bin/env bash
# MobileBERT reads `layer_norm_eps` in most of its norms and not in the first and the last of each stack: those have 1e-5
# whatever config.json says, in transformers 4.37.2 and 5.23.0.
#
# Models with `normalization_type` "layer_norm" (the teachers of the published student) were trained with 1e-12
# everywhere. The class makes the norm of the embeddings, and that after each layer's way back to the full width, without
# handing the epsilon on, so no config can say what the original computes; the difference grows where rows are small.
#
# Seen: with layer_norm_eps 1e-3 these norms have 1e-5 and all others 1e-3, in both releases.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/norms.py" <<'PY'
import sys
from collections import Counter

import transformers
from torch.nn import LayerNorm
from transformers import MobileBertConfig, MobileBertModel

config = MobileBertConfig(normalization_type="layer_norm", layer_norm_eps=1e-3, num_hidden_layers=2)
model = MobileBertModel(config)
norms = {n: m.eps for n, m in model.named_modules() if isinstance(m, LayerNorm)}
other = sorted(n for n, eps in norms.items() if eps != 1e-3)
print(f"transformers {transformers.__version__}: {dict(Counter(norms.values()))}; 1e-05 in {other}")
wanted = ["embeddings.LayerNorm", *(f"encoder.layer.{i}.output.LayerNorm" for i in range(2))]
sys.exit(0 if other == wanted and {norms[n] for n in other} == {1e-5} else 1)
PY
for version in 5.23.0 4.37.2; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/norms.py"
done
