#!/usr/bin/env bash
# onnxruntime 1.32.0 (CPU), Cast to float8 with saturate=0: 480 and 481 become 448 in FLOAT8E4M3FN, between numbers
# below and above that become NaN; 61,440 to 65,535 become NaN in FLOAT8E5M2, and what is larger infinity.
#
# ONNX says NaN for what is out of reach in the first format, which has no infinity, and infinity in the second.
# saturate=0 is chosen so that a scale that was too small is seen afterwards; an activation of 480 is then the largest
# weight, and nothing tells. What rounds up beyond the largest number carries into the exponent, and the bits of the
# carry are taken as they stand. onnx's own reference and ml_dtypes 0.6.0 have the values of the text.
#
# Seen: E4M3FN of 449, 465, 479, 480, 495, 496, 512 is 448, nan, nan, 448, 448, nan, nan, where onnx 1.23.2 and
# ml_dtypes have NaN from 465 on; E5M2 of 61439, 61440, 65535, 65536 is 57344, nan, nan, inf, by the others 57344, inf,
# inf, inf.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "numpy==2.4.6" "onnx==1.23.2" "onnxruntime==1.32.0" "ml_dtypes==0.6.0"
"$work/env/bin/python" - <<'PY'
import sys

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator


def casts(to, dtype, numbers):
    x = np.array(numbers, np.float32)
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(x)]) for name in "xz"]
    nodes = [
        helper.make_node("Cast", ["x"], ["y"], to=to, saturate=0),
        helper.make_node("Cast", ["y"], ["z"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(nodes, "cast", info[:1], info[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    ran = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    return ran, ReferenceEvaluator(model).run(None, {"x": x})[0], x.astype(dtype).astype(np.float32)


nan, inf = np.nan, np.inf
e4m3 = casts(TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn, [449, 465, 479, 480, 495, 496, 512])
e5m2 = casts(TensorProto.FLOAT8E5M2, ml_dtypes.float8_e5m2, [61439, 61440, 65535, 65536])
for name, (ran, reference, numpy) in (("E4M3FN", e4m3), ("E5M2", e5m2)):
    print(f"{name}: onnxruntime {onnxruntime.__version__} {ran}, onnx {onnx.__version__} {reference}, numpy {numpy}")
seen = np.array_equal(e4m3[0], [448, nan, nan, 448, 448, nan, nan], equal_nan=True)
seen &= np.array_equal(e5m2[0], [57344, nan, nan, inf], equal_nan=True)
for found in e4m3[1:]:
    seen &= np.array_equal(found, [448, *[nan] * 6], equal_nan=True)
for found in e5m2[1:]:
    seen &= np.array_equal(found, [57344, inf, inf, inf])
sys.exit(0 if seen else 1)
PY
