#!/usr/bin/env bash
# A safetensors file without any `__metadata__` is loaded by transformers 4.57.6; one with a note in it, as
# {"step": "1000"}, is refused, and {"format": "tf"} asks for TensorFlow. 5.23.0 loads all three, and the same numbers.
#
# `__metadata__` is free text by the format's description, and `save_file(tensors, file, metadata={...})` invites notes
# of training. Release 4 takes the key `format` in it for the program that wrote the file: absent metadata mean torch,
# metadata without that key are an error. So adding a line of text to a file that loads makes it one that does not, and
# whoever tests with 5.x does not see it. Tools that rewrite headers must keep or add {"format": "pt"}.
#
# Seen: 4.57.6 loads none, raises ValueError for a note, ModuleNotFoundError (tensorflow) for tf; 5.23.0 loads all.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/load.py" <<'PY'
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
folder, wanted = sys.argv[1], sys.argv[2].split(",")
config = GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2)
GPT2LMHeadModel(config).save_pretrained(folder)
file = f"{folder}/model.safetensors"
tensors = load_file(file)
told = []
for metadata in (None, {"step": "1000"}, {"format": "tf"}):
    save_file(tensors, file, metadata=metadata)
    try:
        weights = GPT2LMHeadModel.from_pretrained(folder).state_dict()
        same = all(torch.equal(weights[k], v) for k, v in tensors.items())
        told.append("loads" if same else "other numbers")
    except (ValueError, ImportError, OSError) as error:
        told.append(type(error).__name__)
print(f"transformers {transformers.__version__}: none: {told[0]}, a note: {told[1]}, format tf: {told[2]}")
sys.exit(0 if told == wanted else 1)
PY
for pair in 5.23.0:loads,loads,loads 4.57.6:loads,ValueError,ModuleNotFoundError; do
    version=${pair%%:*}
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version" "safetensors==0.8.0"
    "$work/$version/bin/python" -W ignore "$work/load.py" "$work/model-$version" "${pair##*:}"
done
