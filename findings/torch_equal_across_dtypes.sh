#!/usr/bin/env bash
# torch.equal (torch 2.13.0) says True of two tensors of different dtypes, and of integers that are not equal.
#
# Its documentation says "same size and elements", and the check that a conversion kept the weights is often
# `torch.equal(a[k], b[k])` for every name. Both sides are promoted to one dtype first, silently: a float32 model and
# its bfloat16 original are "equal" where the values allow it, and int64 is promoted to the float beside it, so that
# 16777217 equals 16777216.0 in float32 (2**53 + 1 and 2.0**53 in float64). -0.0 equals 0.0, and a tensor with a NaN is
# not equal to itself. So it tells neither a changed dtype nor changed bits, and fails on identical files with a NaN.
# torch.testing.assert_close compares dtypes; for bits compare `x.view(torch.uint8)` beside dtype and shape.
#
# Seen: True, True, True, True; False for the tensor with a NaN and itself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6"
"$work/env/bin/python" -W ignore - <<'PY'
import sys

import torch

narrow = torch.tensor([0.5, -3.0], dtype=torch.bfloat16)
told = {
    "bfloat16 and its float32": torch.equal(narrow, narrow.float()),
    "16777217 and 16777216.0 in float32": torch.equal(torch.tensor([2**24 + 1]), torch.tensor([2.0**24])),
    "2**53 + 1 and 2.0**53 in float64": torch.equal(
        torch.tensor([2**53 + 1]), torch.tensor([2.0**53], dtype=torch.float64)
    ),
    "-0.0 and 0.0": torch.equal(torch.tensor([-0.0]), torch.tensor([0.0])),
}
nan = torch.tensor([float("nan")])
itself = torch.equal(nan, nan)
print(f"torch {torch.__version__}: torch.equal says", told, f"of a NaN and itself: {itself}")
sys.exit(0 if all(told.values()) and not itself else 1)
PY
