#!/usr/bin/env bash
# torch.onnx.export (torch 2.13.0, dynamo=True) with a dynamic axis named "sequence": where Python chooses by the length,
# the graph holds the branch of the example's length alone. The axis stays dynamic in the file, onnxruntime takes every
# length, and gives other numbers than the module for those of the other branch, without a word.
#
# torch.export with the same axis as a Dim refuses ("Constraints violated (sequence)", with Dim('sequence', max=7) as the
# way out), so one expects its exporter to do so too, or to fix the axis. Layers with chunks or windows choose like this.
#
# Seen: sums inside of chunks of 8 traced with 6 tokens; of 16 ones the module gives 1..8 twice, onnxruntime 1..16.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "numpy==2.4.6" "torch==2.13.0" "onnx==1.23.2" "onnxscript==0.7.2" "onnxruntime==1.32.0"
cat > "$work/branch.py" <<'PY'
import sys

import onnxruntime
import torch


class Chunks(torch.nn.Module):
    def forward(self, x):
        B, T = x.shape
        C = T if T < 8 else 8
        return x.view(B, T // C, C).cumsum(-1).view(B, T)


module, path = Chunks(), sys.argv[1]
axes = ({0: "batch", 1: "sequence"},)
made = torch.onnx.export(
    module, (torch.ones(2, 6),), dynamo=True, dynamic_shapes=axes, input_names=["x"], verbose=False
)
made.save(path)
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
shape, x = session.get_inputs()[0].shape, torch.ones(2, 16)
right, found = module(x)[0], torch.from_numpy(session.run(None, {"x": x.numpy()})[0])[0]
print(f"torch {torch.__version__}, input {shape}: of 16 ones {right.tolist()}, onnxruntime {found.tolist()}")
sys.exit(0 if shape == ["batch", "sequence"] and not torch.equal(right, found) else 1)
PY
"$work/venv/bin/python" -W ignore "$work/branch.py" "$work/model.onnx"
