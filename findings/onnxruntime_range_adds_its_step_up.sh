#!/usr/bin/env bash
# onnxruntime 1.32.0 (CPU) computes Range in float32 by adding the step to the number before: of 0 to 100,000 in steps
# of 0.1 the last is 100,958 in place of 99,999.9, beyond the limit. onnx's reference (1.23.2) multiplies.
#
# ONNX defines element i as start + i * delta. Added up, each step is rounded at the size of the sum, and all in one
# direction for as long as the sum stays between two powers of two, so that the error grows with the square of the
# length. Positions that are scaled, times of audio frames and grids come from torch.arange with a step, which is
# exported as Range; halves and quarters are exact, and tests with those pass. Export arange(n) * step: whole numbers
# are exact up to 2 ** 24.
#
# Seen, step 0.1: largest error of 100 numbers 5e-6, of 10,000 0.1, of 1,000,000 958; the reference 5e-3 for a million;
# Range of whole numbers times 0.1 in onnxruntime the same 5e-3. torch.onnx.export (2.13.0) of torch.arange(0, end, 0.1)
# has the numbers of Range.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "numpy==2.4.6" "torch==2.13.0" "onnx==1.23.2" "onnxscript==0.7.2" "onnxruntime==1.32.0"
"$work/env/bin/python" -W ignore - 2> "$work/log" <<'PY' || { tail -20 "$work/log"; exit 1; }
import io
import sys

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator


class Positions(torch.nn.Module):
    def forward(self, x):
        return x + torch.arange(0, x.shape[0] / 10, 0.1)


def run(model, **given):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, given)[0].astype(np.float64)


def made(nodes, constants):
    ends = [helper.make_tensor_value_info("n", TensorProto.FLOAT, []), helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])]
    tensors = [helper.make_tensor(n, TensorProto.FLOAT, [], [v]) for n, v in constants.items()]
    graph = helper.make_graph(nodes, "range", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


node = helper.make_node
added = made([node("Range", ["from", "n", "step"], ["y"])], {"from": 0.0, "step": 0.1})
whole = [node("Range", ["from", "n", "one"], ["i"]), node("Mul", ["i", "step"], ["y"])]
times = made(whole, {"from": 0.0, "one": 1.0, "step": 0.1})
found = {}
for count in (100, 10_000, 1_000_000):
    right = np.arange(count) * 0.1
    given = {"n": np.array(count / 10, np.float32)}
    by_reference = ReferenceEvaluator(added).run(None, given)[0].astype(np.float64)
    numbers = [run(added, **given), by_reference, run(times, n=np.array(count, np.float32))]
    found[count] = [float(f"{np.abs(x - right).max():.2g}") for x in numbers]
    last = numbers[0][-1]
print(f"onnxruntime {onnxruntime.__version__}, onnx {onnx.__version__}: error [Range, reference, whole numbers * 0.1] {found}")
program = torch.onnx.export(Positions(), (torch.zeros(100),), dynamo=True, dynamic_shapes={"x": {0: torch.export.Dim("n")}}, verbose=False)
exported = run(program.model_proto, **{program.model_proto.graph.input[0].name: np.zeros(1_000_000, np.float32)})[-1]
kinds = [n.op_type for n in program.model_proto.graph.node]
print(f"last of a million {last:.1f}; as torch {torch.__version__} exports arange with a step {exported:.1f}, by {kinds}")
right = last > 100_900 and exported > 100_900 and found[100][0] < 1e-5 and found[10_000][0] > 0.05
sys.exit(0 if right and max(found[1_000_000][1:]) < 0.01 else 1)
PY
