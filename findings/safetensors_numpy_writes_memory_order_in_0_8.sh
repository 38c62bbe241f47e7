#!/usr/bin/env bash
# safetensors 0.8.0, numpy: a transposed array is written as it lies in memory, under its own shape; 0.7.0 wrote the
# array. safetensors.torch refuses such a tensor in both.
#
# `w.T` is how Conv1D weights are turned for a Linear, and what comes out of LAPACK (an SVD that shrinks a model, a PCA)
# lies by columns. Names, shapes, dtypes and sums are right in the file, so everything that looks at headers or at
# statistics passes, and the numbers are in other places. np.ascontiguousarray before save_file is the way.
#
# Seen: [[0, 1, 2], [3, 4, 5]] transposed comes back as [[0, 3], [1, 4], [2, 5]] in 0.7.0 and as [[0, 1], [2, 3], [4,
# 5]] in 0.8.0, without a warning; safetensors.torch raises ValueError in both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/turned.py" <<'PY'
import sys
import warnings

warnings.simplefilter("error")
import numpy as np
import safetensors
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
save_file({"w": turned}, sys.argv[1])
back = load_file(sys.argv[1])["w"].tolist()
try:
    save_torch({"w": torch.from_numpy(turned)}, sys.argv[1])
    refused = False
except ValueError:
    refused = True
print(f"safetensors {safetensors.__version__}: {turned.tolist()} comes back as {back}; refused by its torch writer: {refused}")
right = safetensors.__version__ == "0.7.0"
sys.exit(0 if refused and back == (turned.tolist() if right else [[0, 1], [2, 3], [4, 5]]) else 1)
PY
for version in 0.7.0 0.8.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "packaging==26.3" "safetensors==$version"
    "$work/$version/bin/python" "$work/turned.py" "$work/w.safetensors"
done
