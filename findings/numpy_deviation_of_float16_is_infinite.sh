#!/usr/bin/env bash
# The standard deviation and the norm of float16 arrays are infinite in numpy 2.4.6 as soon as the sum of the squares
# passes 65,504: 5,000 weights with a deviation of 4 are enough, and for the norm one number of 256. mean() of the same
# array is right.
#
# mean() adds float16 in float32, which one takes for a rule. var() and std() add the numbers themselves, and then their
# squares, in float16; norm() does so too, where it is one vector or the whole matrix as well as along an axis.
# Statistics of a float16 checkpoint, relative errors of a conversion and cosine similarities are inf, nan or 0, and a
# ratio of two norms that both fit has three digits. With squares that sum up to less, along the first axis, a sum stops
# at 2,048 of equal size instead. std(dtype=np.float32) is right; norm() has no dtype, so widen first.
#
# Seen: 70,000 numbers of deviation 1: mean right, std inf; of 1,000 times 100 std inf in place of 0; norm of [256] inf;
# of 2**16 rows of ones norm along the first axis 45.25 in place of 256, std of +1 and -1 0.18 in place of 1; torch
# 2.13.0, in float16, 256, 1 and 1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "numpy==2.4.6" "torch==2.13.0"
"$work/env/bin/python" -W ignore - <<'PY'
import math
import sys

import numpy as np
import torch

half = np.float16
normal = np.random.default_rng(0).standard_normal(70_000).astype(half)
signs = np.where(np.arange(2**16) % 2, 1, -1).astype(half)[:, None] * np.ones((1, 2), half)
found = {
    "mean": round(abs(float(normal.mean())), 2),
    "std": normal.std(),
    "std of equals": np.full(1000, 100, half).std(),
    "norm of 256": np.linalg.norm(np.array([256], half)),
    "norm of a row": np.linalg.norm(np.array([[256]], half), axis=1)[0],
    "norm of rows of 1": np.linalg.norm(np.ones((2**16, 2), half), axis=0)[0],
    "std of rows of 1, -1": signs.std(axis=0)[0],
    "std in float32": normal.std(dtype=np.float32),
}
found = {name: float(f"{value:.2g}") for name, value in found.items()}
tensors = torch.from_numpy(normal), torch.tensor([256.0]).half(), torch.from_numpy(signs)
by_torch = [tensors[0].std().item(), torch.linalg.vector_norm(tensors[1]).item(), tensors[2].std(dim=0)[0].item()]
by_torch = [round(x, 2) for x in by_torch]
print(f"numpy {np.__version__}, float16: {found}")
print(f"torch {torch.__version__}, float16: std, norm of [256], std of 2**16 rows of +1 and -1: {by_torch}")
inf = math.inf
right = [0.0, inf, inf, inf, inf, 45.0, 0.18, 1.0]
sys.exit(0 if list(found.values()) == right and by_torch == [1.0, 256.0, 1.0] else 1)
PY
