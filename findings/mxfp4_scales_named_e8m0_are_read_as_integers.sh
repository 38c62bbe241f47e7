#!/usr/bin/env bash
# transformers 5.23.0 makes nearly zero of MXFP4 experts whose scales a file stores as F8_E8M0, without a word.
#
# A scale of MXFP4 is a power of two in one byte. gpt-oss is published with those bytes as U8; safetensors and torch have a
# dtype that says what they are, F8_E8M0. The same bytes under that name are loaded without a missing or unexpected key,
# and taken for integers by value: 2**-7 becomes 0, and 0 less 127 the exponent. The experts of such a model give their
# biases alone, and its text is fluent nonsense.
#
# Seen: a block of ones under the byte 120 is 2**-7 as uint8, and 2**-127 or 0 as float8_e8m0fnu.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "transformers==5.23.0" "numpy==2.4.6"
"$work/env/bin/python" -W ignore - 2>/dev/null <<'PY'
import sys

import torch
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors as made

blocks = torch.full((1, 1, 1, 16), 0x22, dtype=torch.uint8)  # 32 times the code of 1
scales = torch.full((1, 1, 1), 120, dtype=torch.uint8)
found = {str(s.dtype): made(blocks, s, dtype=torch.float32).max().item()
         for s in (scales, scales.view(torch.float8_e8m0fnu))}
print(found)
sys.exit(0 if found["torch.uint8"] == 2**-7 and found["torch.float8_e8m0fnu"] <= 2**-127 else 1)
PY
