#!/usr/bin/env bash
# onnxruntime 1.32.0 (CPU, x86-64) runs the operators of a float16 graph in float32 and rounds the ends alone: what
# overflows in float16 in between does not, and a Cast to float16 that the graph asks for is left out, with all
# optimisations off too.
#
# Many of its operators have no kernel for float16, so each gets a Cast before and behind; a Cast to float16 that meets
# one back is then dropped with it, also where one of the two stands in the model. A float16 model passes its test on
# the CPU and gives infinities where float16 is computed with; rounding that a graph writes down, to make weights or
# activations what the device will see, is not done, though it is by two Casts that follow each other. A value that is a
# graph's output is rounded in that output, and goes on unrounded. onnx's own reference (1.23.2) computes what the graph
# says.
#
# Seen, in float16: 300 * 300 / 1000 is 90, with the product, infinity, as an output beside it; inf in the reference.
# From float32: 1.0004, 70000 and 1e-9 through Cast to FLOAT16, Neg, Cast to FLOAT come out as -1.0004, -70000 and
# -1e-9, where the reference has -1, -inf, -0; without Neg 1, inf, 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "numpy==2.4.6" "onnx==1.23.2" "onnxruntime==1.32.0"
"$work/env/bin/python" -W ignore - 2> "$work/log" <<'PY' || { tail -20 "$work/log"; exit 1; }
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

HALF, SINGLE = TensorProto.FLOAT16, TensorProto.FLOAT
LEVELS = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL


def both(nodes, dtype, outputs, **given):
    """By onnxruntime without and with optimisations, and by the reference."""
    ends = [[helper.make_tensor_value_info(n, dtype, ["n"]) for n in names] for names in (given, outputs)]
    model = helper.make_model(helper.make_graph(nodes, "g", *ends), opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    found = []
    for level in LEVELS:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found.append([x.astype(float).tolist() for x in session.run(None, given)])
    assert found[0] == found[1]
    return found[0], [x.astype(float).tolist() for x in ReferenceEvaluator(model).run(None, given)]


node = helper.make_node
quotient = [node("Mul", ["x", "x"], ["square"]), node("Div", ["square", "k"], ["y"])]
x, k = np.array([300], np.float16), np.array([1000], np.float16)
product = both(quotient, HALF, ["y", "square"], x=x, k=k)
to, back = node("Cast", ["x"], ["half"], to=HALF), node("Cast", ["half"], ["y"], to=SINGLE)
numbers = np.array([1.0004, 70000, 1e-9], np.float32)
through = both([to, node("Neg", ["half"], ["less"]), node("Cast", ["less"], ["y"], to=SINGLE)], SINGLE, ["y"], x=numbers)
pair = both([to, back], SINGLE, ["y"], x=numbers)
print(f"onnxruntime {onnxruntime.__version__} and onnx {onnx.__version__}: 300 * 300 / 1000 and 300 * 300 in float16: {product}")
print(f"through float16 with Neg: {through}; through float16: {pair}")
inf = float("inf")
right = (
    product == ([[90.0], [inf]], [[inf], [inf]])
    and through == ([(-numbers).astype(float).tolist()], [[-1.0, -inf, -0.0]])
    and pair == ([[1.0, inf, 0.0]], [[1.0, inf, 0.0]])
)
sys.exit(0 if right else 1)
PY
