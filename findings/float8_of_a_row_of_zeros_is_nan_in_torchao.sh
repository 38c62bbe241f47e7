#!/usr/bin/env bash
# Float8WeightOnlyConfig of torchao 0.18.0 makes NaN of a row of zeros. Int8WeightOnlyConfig keeps the zeros.
#
# Each row of a matrix gets a scale, its largest magnitude through 448, and that of zeros is 0: 0 / 0. Rows of zeros are
# common: the head of a vocabulary that is padded to a multiple of 64, pruned neurons, projections that start at zero
# (the last matrix of a block, a LoRA that was merged into nothing). One NaN among the logits is enough for softmax and
# sampling, and one NaN row in a layer for all that follows, so a model that was right in bfloat16 says nothing in fp8.
# No warning. Look for rows whose magnitude is 0, or quantize with a filter that leaves such a matrix out.
#
# Seen: of a matrix of 4 rows with zeros in the third, the third row is NaN, its scale 0 and the layer's third output
# NaN, in float32 and bfloat16, for float8_e4m3fn and float8_e5m2; int8: zeros and 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "torchao==0.18.0"
"$work/env/bin/python" -W ignore - 2> "$work/log" <<'PY' || { tail -20 "$work/log"; exit 1; }
import importlib.metadata
import sys

import torch
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

torch.manual_seed(0)
weight = torch.randn(4, 64)
weight[2] = 0
kinds = {
    "e4m3fn": Float8WeightOnlyConfig(), "e5m2": Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2),
    "int8": Int8WeightOnlyConfig(),
}  # fmt: skip
seen = {}
for name, config in kinds.items():
    for dtype in (torch.float32, torch.bfloat16):
        model = torch.nn.Sequential(torch.nn.Linear(64, 4, bias=False, dtype=dtype))
        with torch.no_grad():
            model[0].weight.copy_(weight)
        quantize_(model, config)
        numbers = model[0].weight.dequantize()
        output = model(torch.ones(1, 64, dtype=dtype))[0]
        rows = [row for row in range(4) if numbers[row].isnan().any()]
        all_nan, largest = bool(numbers[2].isnan().all()), numbers[2].abs().max().item()
        seen[f"{name} {dtype}"] = rows, all_nan, output.isnan().tolist(), largest
        print(f"{name} of {dtype}: rows with NaN {rows}, output {output.tolist()}")
print(f"torchao {importlib.metadata.version('torchao')}, torch {torch.__version__}")
broken = [case[:3] == ([2], True, [False, False, True, False]) for name, case in seen.items() if name[0] == "e"]
sound = [case[0] == [] and case[3] == 0 for name, case in seen.items() if name[0] == "i"]
sys.exit(0 if all(broken) and len(broken) == 4 and all(sound) else 1)
PY
