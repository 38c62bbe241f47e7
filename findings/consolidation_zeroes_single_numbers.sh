#!/usr/bin/env bash
# Where torch 2.13.0 joins the slices of a distributed save into safetensors (HuggingFaceStorageWriter with
# save_distributed=True, enable_consolidation=True), each tensor of no dimensions becomes 0, without a word.
#
# A scale of an fp8 weight (`weight_scale`, of shape ()), a temperature or a counter among buffers are such tensors.
# The slices that were joined hold the number, and so does the file that the writer makes without joining; the same
# number in a tensor of shape (1,) is kept. The joined file has the right names, dtypes and shapes, so nothing that
# looks at headers sees it, and a model with one scale for each weight computes zeros.
#
# Seen: 0.5 in the slice, 0.0 in the joined file.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "safetensors==0.8.0"
cat > "$work/write.py" <<'PY'
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter

warnings.simplefilter("ignore")
folder = Path(sys.argv[1])
state = {"w": torch.full((4, 4), 2.0), "scale": torch.tensor(0.5), "scale_of_one": torch.tensor([0.5])}
writer = HuggingFaceStorageWriter(str(folder), save_distributed=True, enable_consolidation=True)
dcp.save(state, storage_writer=writer, no_dist=True)
(slices,), (joined,) = folder.glob("sharded/*.safetensors"), folder.glob("*.safetensors")
found = [(load_file(f)["scale"].item(), load_file(f)["scale_of_one"].item()) for f in (slices, joined)]
print(f"torch {torch.__version__}: () and (1,) in the slice and in the joined file: {found}")
sys.exit(0 if found == [(0.5, 0.5), (0.0, 0.5)] else 1)
PY
"$work/venv/bin/python" -W ignore "$work/write.py" "$work/out"
