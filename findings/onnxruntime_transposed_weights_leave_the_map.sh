#!/usr/bin/env bash
# onnxruntime 1.32.0 (CPU) maps weights of an external data file, and still holds a copy of each matrix packed for its
# own kernels. session.disable_prepacking leaves them in the map; not where the graph transposes them: those it computes
# while it loads, and keeps, packed or not.
#
# A Linear's matrix lies transposed, and a graph that says so (Transpose, then MatMul) looks free, as the node has no
# weight of its own. It is the difference between a session that shares its weights with every other process and the
# page cache, and one that holds more than the file once more. Gemm with transB=1 computes the same numbers from the
# map.
#
# Seen: for 128 MiB of weights, memory that is backed by no file grows by 129 MiB with Gemm, by 1 MiB with Gemm and
# disable_prepacking, and by more than 170 MiB with Transpose, either way; right after loading, before anything is
# computed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "numpy==2.4.6" "onnx==1.23.2" "onnxruntime==1.32.0"
cat > "$work/session.py" <<'PY'
import sys

import onnxruntime


def private():
    """MiB of this process that are backed by no file."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


options = onnxruntime.SessionOptions()
if sys.argv[2] == "mapped":
    options.add_session_config_entry("session.disable_prepacking", "1")
before = private()
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(private() - before)
PY
cat > "$work/graphs.py" <<'PY'
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

folder, width, count = sys.argv[1], 2048, 8
random = np.random.default_rng(0)
weights = [numpy_helper.from_array(random.standard_normal((width, width), np.float32), f"w{i}") for i in range(count)]
for name in ("transpose", "gemm"):
    nodes, last = [], "x"
    for i in range(count):
        if name == "gemm":
            nodes.append(helper.make_node("Gemm", [last, f"w{i}"], [f"y{i}"], transB=1))
        else:
            nodes.append(helper.make_node("Transpose", [f"w{i}"], [f"t{i}"], perm=[1, 0]))
            nodes.append(helper.make_node("MatMul", [last, f"t{i}"], [f"y{i}"]))
        last = f"y{i}"
    given, made = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", width]) for n in ("x", last))
    graph = helper.make_graph(nodes, name, [given], [made], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save_model(model, f"{folder}/{name}.onnx", save_as_external_data=True, location=f"{name}.data")
found = {}
for name in ("gemm", "transpose"):
    for kind in ("usual", "mapped"):
        command = [sys.executable, f"{folder}/session.py", f"{folder}/{name}.onnx", kind]
        found[name, kind] = round(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
print(f"onnxruntime {onnxruntime.__version__}, {width * width * 4 * count >> 20} MiB of weights; MiB more of its own: {found}")
gemm, mapped, *transposed = found.values()
sys.exit(0 if 110 < gemm < 150 and mapped < 20 and min(transposed) > 120 else 1)
PY
"$work/env/bin/python" -W ignore "$work/graphs.py" "$work"
