#!/usr/bin/env bash
# A float32 sum along the first of two axes stops at 16777216 in numpy 2.4.6 and onnxruntime 1.32.0: of 17,825,792 ones
# in each of two columns, and their mean is 0.94. Along the last axis both have all of them.
#
# numpy is known to add in pairs, so that its sums are good to the last digits. It does so along the axis that lies
# close together in memory; along others it adds row after row into one float32, and 2**24 + 1 is 2**24. Long before
# that the digits go: means over tokens, samples or rows (statistics of activations, averages of gradients, scales for
# each column) are of this form, and a test on a few thousand rows sees nothing. onnxruntime does likewise, also for a
# single column, where numpy is right. Add in float64 (dtype=np.float64), or transpose and copy first.
#
# Seen: columns of ones: sum 16777216 and mean 0.9411765 in both; of the transposed copy 17825792 and 1; one column:
# numpy 17825792, onnxruntime 16777216; of numbers around 1, 2**20 rows, relative errors of the first form more than
# ten times those of the second.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "numpy==2.4.6" "onnx==1.23.2" "onnxruntime==1.32.0"
"$work/env/bin/python" -W ignore - 2> "$work/log" <<'PY' || { tail -20 "$work/log"; exit 1; }
import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

ROWS = 2**24 + 2**20


def reduced(x, axis, operator="ReduceSum"):
    node = helper.make_node(operator, ["x", "axes"], ["y"], keepdims=0)
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)]
    ends += [helper.make_tensor_value_info("y", TensorProto.FLOAT, [x.shape[1 - axis]])]
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [axis])
    graph = helper.make_graph([node], "reduced", ends[:1], ends[1:], [axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


ones = np.ones((ROWS, 2), np.float32)
by_columns = np.ones((2, ROWS), np.float32)
seen = {
    "numpy": (ones.sum(0)[0], round(float(ones.mean(0)[0]), 3), by_columns.sum(1)[0], ones[:, :1].copy().sum(0)[0]),
    "onnxruntime": (
        reduced(ones, 0)[0], round(float(reduced(ones, 0, "ReduceMean")[0]), 3), reduced(by_columns, 1)[0],
        reduced(ones[:, :1].copy(), 0)[0],
    ),
}  # fmt: skip
seen = {name: tuple(float(x) for x in numbers) for name, numbers in seen.items()}
small = (1 + 0.1 * np.random.default_rng(0).standard_normal((2**20, 2))).astype(np.float32)
right = small.sum(0, dtype=np.float64)
first = np.abs(small.sum(0) / right - 1).max()
last = np.abs(np.ascontiguousarray(small.T).sum(1) / right - 1).max()
print(f"numpy {np.__version__}, onnxruntime {onnxruntime.__version__}, {ROWS} rows")
print(f"sum and mean of the first axis, sum of the last, sum of one column: {seen}")
print(f"2**20 numbers around 1, relative errors: first axis {first:.1e}, last {last:.1e}")
right = {"numpy": (2.0**24, 0.941, ROWS, ROWS), "onnxruntime": (2.0**24, 0.941, ROWS, 2.0**24)}
sys.exit(0 if seen == right and first > 10 * last else 1)
PY
