#!/usr/bin/env bash
# int4 arrays of ml_dtypes 0.6.0 in numpy 2.4.6 wrap round without a word: 8 becomes -8 in a cast, and twenty ones add
# up to 4. onnx's make_tensor stores 300 as -4 in the same way; QuantizeLinear of onnxruntime, and the small floats of
# ml_dtypes, stop at the largest.
#
# numpy adds int8 in int64 and refuses a Python number that does not fit, and the float4 beside it saturates, so one
# expects one or the other of int4. A weight at the positive end of a symmetric scale (w / (max / 8), rounded) gets the
# other sign and full size. Sums of codes, which zero points and row corrections are made of, dot products, means and
# deviations are computed in four bits. Clip before the cast, and widen before anything is added: x.astype(np.int32).
#
# Seen: 7, 7.6, 8, 9, -9, 300 become 7, 7, -8, -7, 7, -4 as int4 and 7, 7, 8, 9, 7, 12 as uint4; float4_e2m1fn 6, 6, 6,
# 6, -6, 6. Of twenty int4 ones sum and dot 4, mean 0; int8 20, 1. onnx 1.23.2 makes 8, 300 into -8, -4 of INT4; numbers
# 8, 300 are 7, 7 by QuantizeLinear of onnxruntime 1.32.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "numpy==2.4.6" "ml_dtypes==0.6.0" "onnx==1.23.2" "onnxruntime==1.32.0"
"$work/env/bin/python" - 2> "$work/log" <<'PY' || { tail -20 "$work/log"; exit 1; }
import sys
import warnings

import ml_dtypes
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

warnings.simplefilter("error")
numbers = np.array([7, 7.6, 8, 9, -9, 300], np.float32)
cast = {}
for name in ("int4", "uint4", "float4_e2m1fn"):
    cast[name] = numbers.astype(getattr(ml_dtypes, name)).astype(float).tolist()
ones = np.ones(20, ml_dtypes.int4)
sums = [int(ones.sum()), int(np.dot(ones, ones)), int(ones.mean())]
wide = np.ones(20, np.int8)
of_int8 = [int(wide.sum()), int(wide.mean())]
stored = numpy_helper.to_array(helper.make_tensor("t", TensorProto.INT4, [2], [8, 300])).astype(int).tolist()

nodes = [helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]), helper.make_node("DequantizeLinear", ["q", "one"], ["y"])]
ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy"]
constants = [helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]), helper.make_tensor("zero", TensorProto.INT4, [], [0])]
graph = helper.make_graph(nodes, "quantized", ends[:1], ends[1:], constants)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
quantized = session.run(None, {"x": np.array([8, 300], np.float32)})[0].tolist()
print(f"numpy {np.__version__}, ml_dtypes {ml_dtypes.__version__}: {numbers.tolist()} cast {cast}")
print(f"twenty ones: int4 sum, dot, mean {sums}, int8 sum, mean {of_int8}; 8 and 300: onnx {stored}, onnxruntime {quantized}")
right = cast == {"int4": [7, 7, -8, -7, 7, -4], "uint4": [7, 7, 8, 9, 7, 12], "float4_e2m1fn": [6, 6, 6, 6, -6, 6]}
sys.exit(0 if right and sums == [4, 4, 0] and of_int8 == [20, 1] and stored == [-8, -4] and quantized == [7, 7] else 1)
PY
