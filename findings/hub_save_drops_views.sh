#!/usr/bin/env bash
# huggingface_hub 2.4.0 and 0.36.2, save_torch_state_dict: of tensors that share memory one is written and the others
# are left out as if they were equal to it, also where they are a part of it, or another shape or dtype.
#
# Sharing is meant for tied matrices, and `__metadata__` then says {"model.embed_tokens.weight": "lm_head.weight"}. A
# query matrix that is a slice of the fused one, a reshaped table and bits seen as integers get the same line: nothing
# says which part it was, and whoever follows the line takes the whole for it. No warning; load_state_dict_from_file has
# the one name, and load_torch_model, not strict by default, leaves what is missing as it was made. save_file of
# safetensors refuses such tensors. clone() views before saving.
#
# Seen: {qkv (6, 4), q = qkv[:2]} comes back as qkv alone, {a (6, 4), b = a.view(4, 6)} as a alone, {w float32, bits =
# w.view(int32)} as the int32 bits alone, the first by the alphabet; `__metadata__` says "q": "qkv", "b": "a" and "w":
# "bits". save_file raises RuntimeError for the three.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/views.py" <<'PY'
import logging
import sys
import tempfile
import warnings

import huggingface_hub
import torch
from huggingface_hub import load_state_dict_from_file, save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import save_file

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("huggingface_hub").addHandler(handler)
x = torch.arange(24.0).reshape(6, 4)
bits = x.view(torch.int32)
cases = [("qkv", x, "q", x[:2]), ("a", x, "b", x.view(4, 6)), ("bits", bits, "w", x)]
good = True
for kept, whole, left, view in cases:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        save_torch_state_dict({kept: whole, left: view}, folder)
        said += [str(w.message) for w in warned]
        path = f"{folder}/model.safetensors"
        found = {k: (tuple(v.shape), v.dtype) for k, v in load_state_dict_from_file(path).items()}
        with safe_open(path, "pt") as file:
            note = file.metadata()
        try:
            save_file({kept: whole, left: view}, f"{folder}/other.safetensors")
            refused = False
        except RuntimeError:
            refused = True
    print(f"huggingface_hub {huggingface_hub.__version__}: {found}, {note}; refused by save_file: {refused}")
    good &= found == {kept: ((6, 4), whole.dtype)} and note == {left: kept, "format": "pt"} and refused
print(f"warnings: {said}")
sys.exit(0 if good and not said else 1)
PY
for version in 2.4.0 0.36.2; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "safetensors==0.8.0" "huggingface_hub==$version"
    "$work/$version/bin/python" "$work/views.py"
done
