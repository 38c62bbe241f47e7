#!/usr/bin/env bash
# torch.distributed.checkpoint.load (torch 2.13.0) compares shapes and not dtypes: what it reads is cast into the
# tensors it is given, integers wrap, and nothing is said.
#
# load() fills a state dict in place. A tensor of another shape is refused by name, so one expects the same of another
# dtype. A model built in bfloat16 that loads a float32 checkpoint loses sixteen bits of every weight; a step counter of
# 300 is 44 in an int8 tensor; float16 has infinities where the file has large numbers. Compare .metadata (its
# `properties.dtype`) with the tensors first, or make the tensors from it.
#
# Seen: 1.0009765625 becomes 1 in bfloat16, 1e30 becomes inf in float16, 300 becomes 44 in int8, each without a warning;
# a tensor of shape (3, 2) for one of (2, 3) is refused.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6"
"$work/env/bin/python" -W ignore - "$work/checkpoint" <<'PY'
import sys
import warnings

import torch
import torch.distributed.checkpoint as dcp

saved = {"w": torch.tensor([1.0009765625, 1e30]), "step": torch.tensor(300), "m": torch.zeros(2, 3)}
dcp.save(saved, checkpoint_id=sys.argv[1])
given = {
    "bfloat16": {"w": torch.zeros(2, dtype=torch.bfloat16)},
    "float16": {"w": torch.zeros(2, dtype=torch.float16)},
    "int8": {"step": torch.zeros((), dtype=torch.int8)},
}
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for state in given.values():
        dcp.load(state, checkpoint_id=sys.argv[1])
said = [str(w.message) for w in said if "dtype" in str(w.message) or "cast" in str(w.message)]
try:
    dcp.load({"m": torch.zeros(3, 2)}, checkpoint_id=sys.argv[1])
    refused = False
except dcp.api.CheckpointException:
    refused = True
found = {name: next(iter(state.values())).tolist() for name, state in given.items()}
print(f"torch {torch.__version__}: {found}; another shape is refused: {refused}; warnings of a cast: {said}")
right = found["bfloat16"][0] == 1 and found["float16"] == [1.0009765625, float("inf")] and found["int8"] == 44
sys.exit(0 if right and refused and not said else 1)
PY
