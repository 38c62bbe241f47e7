#!/usr/bin/env bash
# onnxruntime 1.32.0 (CPU): Sigmoid is exactly 0 from -18 downwards in float32 and float16 and from -37 in float64, 17 %
# off at -15, and does not grow with its argument just above. So an exported logsigmoid is -inf where torch says -20.
#
# The kernel keeps an absolute error of 1e-7 (1e-16 in float64), which is all that a gate needs, and no relative one.
# torch.onnx.export (2.13.0) writes F.logsigmoid, which losses on logits and preferences are made of, as Log(Sigmoid), a
# form that torch itself avoids, and the log of 0 ends the sum. -softplus(-x), the same number, is exported as Softplus
# and is right to a rounding. Sum logarithms and rank small probabilities by it.
#
# Seen, float32: sigmoid(-15) 3.6e-7 for 3.1e-7, sigmoid(-16) 0.6e-7 for 1.1e-7, sigmoid(-17) more than that, 0.9e-7,
# sigmoid(-18) 0; logsigmoid(-20) -inf and -softplus(20) -20. float16 is 0 from -18 as well, float64 at -40.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "onnx==1.23.2" "onnxscript==0.7.2" "onnxruntime==1.32.0"
"$work/env/bin/python" -W ignore - 2> "$work/log" <<'PY' || { tail -20 "$work/log"; exit 1; }
import sys

import numpy as np
import onnxruntime
import torch
from torch.nn import functional

NUMBERS = [-5, -15, -16, -17, -18, -20, -40, 3]


class Sigmoid(torch.nn.Module):
    def forward(self, x):
        return torch.sigmoid(x)


class Logarithms(torch.nn.Module):
    def forward(self, x):
        return functional.logsigmoid(x), -functional.softplus(-x)


def ran(module, dtype):
    x = torch.tensor(NUMBERS, dtype=dtype)
    program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    return [y.astype(np.float64) for y in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


x = torch.tensor(NUMBERS, dtype=torch.float64)
right, right_log = torch.sigmoid(x).numpy(), functional.logsigmoid(x).numpy()
(sigmoid,), (half,), (double,) = (ran(Sigmoid(), t) for t in (torch.float32, torch.float16, torch.float64))
log, by_softplus = ran(Logarithms(), torch.float32)
print(f"onnxruntime {onnxruntime.__version__}, float32: sigmoid {sigmoid}; right {right}")
print(f"float16: {half}; logsigmoid {log}; -softplus(-x) {by_softplus}")
print(f"float64: {double}")
seen = (sigmoid[4:7] == 0).all() and (half[4:7] == 0).all() and sigmoid[3] > sigmoid[2] and sigmoid[2] < sigmoid[1] / 4
seen &= 0.1 < abs(sigmoid[1] / right[1] - 1) < 0.25 and np.abs(sigmoid - right).max() < 2e-7
seen &= np.isneginf(log[4:7]).all() and np.allclose(by_softplus, right_log, rtol=1e-6, atol=0)
seen &= double[6] == 0 < right[6] and np.abs(double - right).max() < 1e-15
sys.exit(0 if seen else 1)
PY
