#!/usr/bin/env bash
# torch 2.13.0 rounds float64 to float16, bfloat16 and float8 twice, by way of float32, and so not to the nearest.
#
# `x.to(torch.float16)` of a float64 tensor first becomes float32. A number just above the middle of two neighbours
# is rounded onto the middle there, and from the middle to the even one. numpy 2.4.6 rounds once. So a float64 model
# (double precision training, averages of checkpoints, merges that are computed in float64) cast by torch and the
# same cast by numpy differ in single numbers, about one in 30,000 for float16, and a bit-for-bit comparison of two
# right tools fails. `x.float().half()` gives the same twice rounded numbers, which hides it from tests within torch.
#
# Seen: 1 + 2**-11 + 2**-30 becomes 1.0 in torch and 1.0009765625 in numpy, the nearest; 1 + 2**-8 + 2**-30 becomes 1.0
# in bfloat16 (nearest: 1.0078125), 1 + 2**-4 + 2**-30 becomes 1.0 in float8_e4m3fn (nearest: 1.125). Of a million
# random normal numbers some differ from numpy's float16.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6"
"$work/env/bin/python" -W ignore - <<'PY'
import sys
from fractions import Fraction

import numpy as np
import torch


def cast(number, dtype):
    return torch.tensor([number], dtype=torch.float64).to(dtype).double().item()


def nearer(number, a, b):
    return abs(Fraction(number) - Fraction(a)) < abs(Fraction(number) - Fraction(b))


seen = []
for bits, dtype in ((11, torch.float16), (8, torch.bfloat16), (4, torch.float8_e4m3fn)):
    number, above = 1 + 2.0**-bits + 2.0**-30, 1 + 2.0 ** (1 - bits)
    got = cast(number, dtype)
    seen.append(got == 1.0 and nearer(number, above, got))
    print(f"torch {torch.__version__}, {dtype}: {number!r} becomes {got}, the nearest is {above}")
by_numpy = float(np.array([1 + 2.0**-11 + 2.0**-30]).astype(np.float16)[0])
many = np.random.default_rng(0).standard_normal(1_000_000)
ours, theirs = torch.from_numpy(many).to(torch.float16), torch.from_numpy(many.astype(np.float16))
apart = int((ours != theirs).sum())
best = sum(nearer(many[k], float(theirs[k]), float(ours[k])) for k in (ours != theirs).nonzero().flatten().tolist())
print(f"numpy {np.__version__} gives {by_numpy}; of a million, {apart} differ, numpy's is the nearer in {best}")
sys.exit(0 if all(seen) and by_numpy == 1 + 2.0**-10 and apart > 0 and best == apart else 1)
PY
