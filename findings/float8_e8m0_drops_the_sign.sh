#!/usr/bin/env bash
# torch 2.13.0 makes float8_e8m0fnu, the scales of MXFP4 and MXFP8, of negative numbers and of 0: the sign is dropped, 0
# becomes 2**-127. ml_dtypes 0.6.0 makes NaN of both, as there is no code for either.
#
# A scale is the largest magnitude of a block, and 0 for a block of zeros: one tool writes code 0 for it and its
# neighbour 255, and a block with a NaN as its scale is NaN when it is read, whatever its codes are. A negative "scale"
# is a mistake before the cast that torch turns into a plausible scale. Values that lie between two powers of two agree
# in both, halves and all. Set the scale of an empty block to 1 before the cast.
#
# Seen: -3, -0.5, 0, 3, 1.5 become 4, 0.5, 5.9e-39, 4, 2 in torch and nan, nan, nan, 4, 2 by ml_dtypes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "ml_dtypes==0.6.0"
"$work/env/bin/python" -W ignore - <<'PY'
import sys

import ml_dtypes
import numpy as np
import torch

scales = np.array([-3, -0.5, 0, 3, 1.5], np.float32)
ours = torch.from_numpy(scales).to(torch.float8_e8m0fnu).float().numpy()
theirs = scales.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
print(f"float8_e8m0fnu of {scales.tolist()}: torch {torch.__version__} {ours}, ml_dtypes {ml_dtypes.__version__} {theirs}")
right = ours.tolist() == [4, 0.5, 2**-127, 4, 2] and theirs[3:].tolist() == [4, 2]
sys.exit(0 if right and np.isnan(theirs[:3]).all() else 1)
PY
