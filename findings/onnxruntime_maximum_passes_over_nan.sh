#!/usr/bin/env bash
# onnxruntime 1.32.0 (CPU, x86-64): the maximum of numbers with a NaN is a NaN only if it stands first. ReduceMax,
# ReduceMin, MaxPool and GlobalMaxPool pass over it elsewhere; onnx's own reference (1.23.2) has NaN for both reductions
# wherever it stands.
#
# Max of two tensors, Softmax, ReduceSum and TopK of the same runtime keep a NaN, so graphs are trusted to. A scale
# taken as the largest magnitude of a row, a maximum over time (a pooled embedding), and a check for damage that looks
# at the smallest and the largest number are sound for broken weights, but for those that happen to be broken at the
# start. Look by IsNaN, or at a sum.
#
# Seen, of [1, NaN, 3] and [1, 3, NaN] in float16, float32 and float64: ReduceMax 3, ReduceMin 1; of [NaN, 1, 3] NaN;
# MaxPool and GlobalMaxPool of [1, NaN, 3] 3; ReduceSum and Max with 0 NaN.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "numpy==2.4.6" "onnx==1.23.2" "onnxruntime==1.32.0"
"$work/env/bin/python" -W ignore - 2> "$work/log" <<'PY' || { tail -20 "$work/log"; exit 1; }
import math
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

DTYPES = {np.float16: TensorProto.FLOAT16, np.float32: TensorProto.FLOAT, np.float64: TensorProto.DOUBLE}


def both(operator, numbers, dtype=np.float32, axes=None, least=None, **attributes):
    """By onnxruntime and by the reference, flat."""
    x, constants = np.array(numbers, dtype), []
    if axes is not None:
        constants.append(helper.make_tensor("axes", TensorProto.INT64, [1], [axes]))
    if least is not None:
        constants.append(helper.make_tensor("least", DTYPES[dtype], [], [least]))
    node = helper.make_node(operator, ["x", *(c.name for c in constants)], ["y"], **attributes)
    ends = [helper.make_tensor_value_info(n, DTYPES[dtype], s) for n, s in [("x", x.shape), ("y", None)]]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x}), ReferenceEvaluator(model).run(None, {"x": x})
    return [[np.ravel(a).astype(float).tolist() for a in run] for run in found]


nan, ok = math.nan, True
for dtype in DTYPES:
    found = {}
    for operator in ("ReduceMax", "ReduceMin"):
        for numbers in ([1, nan, 3], [nan, 1, 3], [1, 3, nan]):
            here, reference = both(operator, numbers, dtype, axes=0, keepdims=0)
            found[operator, str(numbers)] = here[0][0]
            ok = ok and math.isnan(reference[0][0])
    print(f"onnxruntime {onnxruntime.__version__}, {dtype.__name__}: {found}")
    ok = ok and [str(v) for v in found.values()] == ["3.0", "nan", "3.0", "1.0", "nan", "1.0"]
pooled = [both("MaxPool", [[[1, nan, 3]]], kernel_shape=[3])[0], both("GlobalMaxPool", [[[1, nan, 3]]])[0]]
kept = [both("ReduceSum", [1, nan, 3], axes=0)[0][0][0], both("Max", [1, nan, 3], least=0)[0][0][1]]
print(f"MaxPool and GlobalMaxPool of [1, nan, 3]: {pooled}; ReduceSum and Max with 0: {kept}")
sys.exit(0 if ok and pooled == [[[3.0]], [[3.0]]] and all(map(math.isnan, kept)) else 1)
PY
