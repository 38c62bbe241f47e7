#!/usr/bin/env bash
# A tensor that two shards hold is taken from the later file by transformers 4.57.6 and 5.23.0, whatever the index says,
# and from either by load_torch_model of huggingface_hub 0.36.2 and 2.4.0: which one changes with Python's hash seed.
#
# model.safetensors.index.json names one file for each tensor, and that reads like the answer: a tool that replaces a
# few tensors (merged adapters, a retrained norm, a mended embedding) writes them into a new shard and points the index
# there, without rewriting gigabytes, as one does with a database. Each shard that the index names is read whole, by
# transformers in the order of the names, by huggingface_hub in that of a set, so the correction counts only if its file
# sorts after the old one, or comes later by chance. No key is reported and nothing is logged. Whoever looks the tensor up
# by the index, to check it or to convert from it, sees the other value.
#
# Seen: index pointing at 00001 for a norm of 1, with a norm of 9 in 00002: 9 in both releases of transformers, 1 and 9
# in both of huggingface_hub, by seeds 0 to 7. Index pointing at 00002 for the 1: 1 in both of transformers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/shards.py" <<'PY'
import json
import logging
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=False))
name, found, keys = "model.norm.weight", {}, []
for right, wrong in [(1, 2), (2, 1)]:
    folder = Path(sys.argv[1], str(right))
    model.config.save_pretrained(folder)
    files = {n: f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    head = tensors.pop("lm_head.weight")
    save_file(tensors, folder / files[right], {"format": "pt"})
    save_file({name: torch.full((32,), 9.0), "lm_head.weight": head}, folder / files[wrong], {"format": "pt"})
    places = dict.fromkeys(tensors, files[right]) | {"lm_head.weight": files[wrong]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    read, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    found[right] = read.model.norm.weight[0].item()
    keys += [key for value in info.values() for key in value]
print(f"norm by the shard that the index names: transformers {transformers.__version__} {found}; keys {keys}, logged {said}")
sys.exit(0 if found == {1: 9.0, 2: 1.0} and not keys and not said else 1)
PY
cat > "$work/hub.py" <<'PY'
import sys

import torch
from huggingface_hub import load_torch_model
from safetensors.torch import load_file

folder = sys.argv[1]
names = load_file(f"{folder}/model-00001-of-00002.safetensors") | load_file(f"{folder}/model-00002-of-00002.safetensors")
model = torch.nn.Module()
for name, tensor in names.items():
    *path, last = name.split(".")
    inner = model
    for part in path:
        if not hasattr(inner, part):
            setattr(inner, part, torch.nn.Module())
        inner = getattr(inner, part)
    setattr(inner, last, torch.nn.Parameter(torch.zeros_like(tensor)))
load_torch_model(model, folder)
print(model.model.norm.weight[0].item())
PY
python3 -m venv "$work/env"
for pair in 5.23.0/2.4.0 4.57.6/0.36.2; do
    "$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "safetensors==0.8.0" \
        "transformers==${pair%/*}" "huggingface_hub==${pair#*/}"
    mkdir "$work/${pair%/*}"
    "$work/env/bin/python" -W ignore "$work/shards.py" "$work/${pair%/*}"
    for seed in 0 1 2 3 4 5 6 7; do
        PYTHONHASHSEED=$seed "$work/env/bin/python" -W ignore "$work/hub.py" "$work/${pair%/*}/1"
    done | sort -u > "$work/norms"
    echo "huggingface_hub ${pair#*/}: norms by seeds 0 to 7: $(paste -sd ' ' "$work/norms")"
    [ "$(paste -sd ' ' "$work/norms")" = "1.0 9.0" ]
done
