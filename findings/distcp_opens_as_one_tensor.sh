#!/usr/bin/env bash
# A data file of torch.distributed.checkpoint (torch 2.13.0) opens as a torch file of one tensor: torch.load gives the
# first tensor in it, zipfile the last, and neither says that there are others.
#
# A .distcp file is the torch.save of each tensor after the other. Its start is that of a zip and so is its end, where
# the directory of the last one counts from the start of that one. zipfile corrects for what stands before and shows
# the last; torch reads at the places that the directory says, which are those of the first where their records are of
# one length. A script that takes the file for a state dict, or salvages one without .metadata, gets one tensor of the
# model and no error.
#
# Seen: of three tensors of one shape torch.load gives the first, also with weights_only=True, and zipfile the third.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6"
"$work/env/bin/python" -W ignore - "$work/checkpoint" <<'PY'
import sys
import zipfile
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

folder = Path(sys.argv[1])
model = {name: torch.full((2, 3), float(k)) for k, name in enumerate("abc", start=1)}
dcp.save(model, checkpoint_id=folder)
(file,) = folder.glob("*.distcp")
loaded = [torch.load(file, weights_only=only) for only in (True, False)]
with zipfile.ZipFile(file) as archive:
    record = torch.frombuffer(bytearray(archive.read("archive/data/0")), dtype=torch.float32)
    bad = archive.testzip()
print(
    f"torch {torch.__version__}: torch.load gives {loaded[0].flatten()[:2].tolist()}, zipfile "
    f"{record[:2].tolist()} (faults: {bad}), of tensors of 1, 2 and 3"
)
first = all(torch.equal(x, model["a"]) for x in loaded)
sys.exit(0 if first and torch.equal(record.view(2, 3), model["c"]) and bad is None else 1)
PY
