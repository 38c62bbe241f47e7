#!/usr/bin/env bash
# safetensors 0.8.0 writes `x.conj()` as x: torch (2.13.0) conjugates and negates by a bit beside the memory, which the
# writer does not ask for.
#
# Complex tensors in checkpoints are rotary tables (`freqs_cis`) and the roots of state space models. conj() copies
# nothing: the tensor keeps its memory and is marked, is_contiguous() is true, and save_file takes the bytes. The
# imaginary part of one is marked negative in the same way. torch.save keeps the marks; `.numpy()` refuses such a tensor
# by name. A turn by the conjugate is a turn the other way round, so a model loaded from such a file has its positions
# backwards. resolve_conj() and resolve_neg() before saving.
#
# Seen: 1-2j comes back as 1+2j and -2 as 2 from safetensors, both as they were from torch.save.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "safetensors==0.8.0"
"$work/env/bin/python" -W error - "$work" <<'PY'
import sys

import safetensors
import torch
from safetensors.torch import load_file, save_file

table = torch.tensor([1 + 2j], dtype=torch.complex64).conj()
tensors = {"turn": table, "sine": torch.tensor([1 + 2j]).conj().imag, "solid": table.resolve_conj()}
save_file(tensors, f"{sys.argv[1]}/a.safetensors")
torch.save(tensors, f"{sys.argv[1]}/a.pt")
ours, theirs = load_file(f"{sys.argv[1]}/a.safetensors"), torch.load(f"{sys.argv[1]}/a.pt")
for name, t in tensors.items():
    print(f"safetensors {safetensors.__version__}, {name}: {t.item()} is {ours[name].item()}; torch.save: {theirs[name].item()}")
kept = all(theirs[n].item() == t.item() for n, t in tensors.items()) and ours["solid"].item() == 1 - 2j
right = ours["turn"].item() == 1 + 2j and ours["sine"].item() == 2 and tensors["sine"].item() == -2
sys.exit(0 if kept and right else 1)
PY
