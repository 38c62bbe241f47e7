#!/usr/bin/env bash
# torch.distributed.checkpoint (torch 2.13.0) writes a transposed tensor as it lies in memory, and .metadata does not
# say so.
#
# safetensors refuses a tensor that is no contiguous one. Here a matrix kept as a view (`w.t()`, Conv1D weights turned for a Linear) goes into the file column
# by column; shape and length in .metadata are those of a matrix stored by rows, and only the pickle inside the item has
# the strides. Whoever reads ranges of bytes by the metadata, as one does to load a share of a tensor, gets other numbers
# of the right shape.
#
# Seen: shape [4, 3] in .metadata, strides (1, 4) in the item, and numbers by rows that differ from the tensor's.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6"
"$work/env/bin/python" -W ignore - "$work/checkpoint" <<'PY'
import io
import sys
import zipfile
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

folder = Path(sys.argv[1])
weight = torch.arange(12.0).view(3, 4).t()
dcp.save({"weight": weight}, checkpoint_id=folder)
told = dcp.FileSystemReader(folder).read_metadata()
(place,) = told.storage_data.values()
data = (folder / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
item = torch.load(io.BytesIO(data), weights_only=True)
stored = zipfile.ZipFile(io.BytesIO(data)).read("archive/data/0")
by_rows = torch.frombuffer(bytearray(stored), dtype=torch.float32).view(tuple(told.state_dict_metadata["weight"].size))
print(
    f"torch {torch.__version__}: shape {list(told.state_dict_metadata['weight'].size)}, strides {item.stride()}; "
    f"first row {weight[0].tolist()}, the bytes by rows {by_rows[0].tolist()}"
)
sys.exit(0 if item.stride() == (1, 4) and torch.equal(item, weight) and not torch.equal(by_rows, weight) else 1)
PY
