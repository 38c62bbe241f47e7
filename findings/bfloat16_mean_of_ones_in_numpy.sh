#!/usr/bin/env bash
# numpy 2.4.6 with ml_dtypes 0.6.0: the mean of 100,000 bfloat16 ones is 0.0026. float16 gives 1.
#
# numpy adds float16 in float32 when it takes a mean, and in pairs otherwise, which hides its eight bits less. It knows
# nothing of bfloat16: sums run in bfloat16 one by one, and stop where one more is less than half a step, at 256 for
# ones. Means, variances and norms of weights that were read as bfloat16 (safetensors, JAX) are wrong by orders, and the
# larger the tensor the more; matrix products are right. max() of an array with a NaN is a NaN, but sort() leaves the
# array as it was. Widen first: x.astype(np.float32) is exact.
#
# Seen: bfloat16 sum 256, mean 0.0026, product of two vectors of ones right; float16 mean 1, torch's bfloat16 mean 1;
# [3, nan, 1, 2] sorted is [3, nan, 1, 2].
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "ml_dtypes==0.6.0"
"$work/env/bin/python" - <<'PY'
import sys

import ml_dtypes
import numpy as np
import torch

ones = np.ones(100_000, ml_dtypes.bfloat16)
total, mean = float(ones.sum()), float(ones.mean())
product = float((ones[None, :1000] @ ones[:1000, None])[0, 0])
half, theirs = float(np.ones(100_000, np.float16).mean()), torch.ones(100_000, dtype=torch.bfloat16).mean().item()
mixed = np.sort(np.array([3, np.nan, 1, 2], ml_dtypes.bfloat16)).astype(np.float32)
plain = np.sort(np.array([3, np.nan, 1, 2], np.float16)).astype(np.float32)
print(f"numpy {np.__version__}, bfloat16: sum {total}, mean {mean:.2g}, product of 1000 {product}; sorted {mixed}")
print(f"float16: mean {half}, sorted {plain}; torch, bfloat16: mean {theirs}")
right = half == theirs == 1 and product == 1000 and plain.tolist()[:3] == [1, 2, 3]
sys.exit(0 if right and total == 256 and mean < 0.01 and np.isnan(mixed[1]) and mixed[0] == 3 else 1)
PY
