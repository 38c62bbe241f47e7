#!/usr/bin/env bash
# onnx.save_model (1.23.2) with a location for external data writes behind what is in that file: saved twice, the file
# has twice the size, and the model reads the second half.
#
# The .onnx file is replaced, so one expects the same of the file it names. Nothing is lost and nothing is wrong in the
# model, which is why it is not seen: a loop that saves after each change fills the disk, and a published folder holds
# weights of an earlier state that no tensor points at. Remove the file first.
#
# Seen: 360,000 bytes after one save of one matrix, 720,000 and 1,080,000 after two and three; the offset of the last is
# 720,000, and the first 360,000 bytes are the matrix of the first save.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "numpy==2.4.6" "onnx==1.23.2"
"$work/env/bin/python" -W error - "$work" <<'PY'
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

folder, sizes = Path(sys.argv[1]), []
given, made = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 300]) for n in ("x", "y"))
for value in (1, 2, 3):
    w = numpy_helper.from_array(np.full((300, 300), value, np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", [given], [made], [w])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save_model(model, folder / "m.onnx", save_as_external_data=True, location="m.data")
    sizes.append((folder / "m.data").stat().st_size)
stored = onnx.load(folder / "m.onnx", load_external_data=False).graph.initializer[0]
offset = next((int(e.value) for e in stored.external_data if e.key == "offset"), 0)
first = np.fromfile(folder / "m.data", np.float32, 90_000)
last = numpy_helper.to_array(onnx.load(folder / "m.onnx").graph.initializer[0])
print(f"onnx {onnx.__version__}: bytes after each save {sizes}; offset {offset}, first number {first[0]}, loaded {last[0, 0]}")
right = sizes == [360_000, 720_000, 1_080_000] and offset == 720_000
sys.exit(0 if right and (first == 1).all() and (last == 3).all() else 1)
PY
