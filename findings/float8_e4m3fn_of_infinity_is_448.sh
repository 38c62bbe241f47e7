#!/usr/bin/env bash
# torch 2.13.0 casts infinity to float8_e4m3fn as 448, and to the float8 dtypes beside it as infinity or NaN. ml_dtypes
# 0.6.0 (numpy, JAX) makes NaN of it.
#
# The format has a NaN and no infinity, and 448 is the largest weight of a well scaled tensor: after the cast nothing
# tells that a sum had overflown. Where a check for damage runs on the fp8 tensor (isfinite after the cast, as it takes
# a fourth of the memory) it passes, and the same weights cast by numpy or JAX have other bytes from 464 on. Look before
# the cast.
#
# Seen: of inf, 1e6, 465, 464 float8_e4m3fn makes 448 each, float8_e5m2 inf, inf, 448, 448, float8_e4m3fnuz NaN each; by
# ml_dtypes float8_e4m3fn is nan, nan, nan, 448, and both other dtypes are as torch's.
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

wide = np.array([np.inf, 1e6, 465, 464], np.float32)
seen = {}
for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"):
    ours = torch.from_numpy(wide).to(getattr(torch, name)).float().tolist()
    theirs = wide.astype(getattr(ml_dtypes, name)).astype(np.float32).tolist()
    seen[name] = str(ours), str(theirs)
    print(f"{name} of {wide.tolist()}: torch {torch.__version__} {ours}, ml_dtypes {ml_dtypes.__version__} {theirs}")
first = seen.pop("float8_e4m3fn") == ("[448.0, 448.0, 448.0, 448.0]", "[nan, nan, nan, 448.0]")
rest = {"float8_e5m2": "[inf, inf, 448.0, 448.0]", "float8_e4m3fnuz": "[nan, nan, nan, nan]"}
sys.exit(0 if first and seen == {name: (value, value) for name, value in rest.items()} else 1)
PY
