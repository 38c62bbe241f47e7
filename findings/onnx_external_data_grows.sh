#!/usr/bin/env bash
# onnx 1.23.2: saving with external data under a name that exists adds the weights behind those in the file. It grows
# with each save, and keeps every older version of them.
#
# save(..., save_as_external_data=True, location="w.bin") reads like a pair of files written anew, as open(path, "wb")
# does for the model itself. The data file is opened to be continued. A script that exports into one folder each time
# has doubled it after the second run; the model is right, as its offsets point at the last copy, so no check of numbers
# sees it, and who is given the file is given the weights before (an unreleased run, one before something was trained
# away). Remove the data file first.
#
# Seen: 16,384 bytes of weights saved three times: 16,384, 32,768, 49,152 bytes; the first version's bytes are still at
# the start; the model loads with the last.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "numpy==2.4.6" "onnx==1.23.2"
"$work/env/bin/python" -W ignore - "$work" <<'PY'
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

path, data, sizes = f"{sys.argv[1]}/m.onnx", Path(sys.argv[1], "w.bin"), []
for version in (1, 2, 3):
    weights = np.full(4096, version, np.float32)
    nodes = [helper.make_node("Identity", ["w"], ["y"])]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4096])
    graph = helper.make_graph(nodes, "g", [], [result], [numpy_helper.from_array(weights, "w")])
    onnx.save(helper.make_model(graph), path, save_as_external_data=True, location="w.bin")
    sizes.append(data.stat().st_size)
kept = np.frombuffer(data.read_bytes(), np.float32)
read = numpy_helper.to_array(onnx.load(path).graph.initializer[0])
print(f"onnx {onnx.__version__}: {sizes} bytes; the file holds {np.unique(kept)}, the model loads {np.unique(read)}")
sys.exit(0 if sizes == [16384, 32768, 49152] and set(kept) == {1, 2, 3} and set(read) == {3} else 1)
PY
