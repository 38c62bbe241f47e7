#!/usr/bin/env bash
# A folder whose config.json says `"tie_word_embeddings": true` and whose file holds an lm_head of its own is two
# models: transformers 5.23.0 keeps the head that is stored, 4.57.6 puts the embedding in its place. What 5.23.0 saves
# again is such a folder.
#
# Fine-tuning that unfreezes the head, and merges of adapters into it, make such files. 5.23.0 says so in one line of
# the log when it loads the folder; then config.json of its own copy says true again beside a head that differs, and
# 4.57.6 loads that without a word and without a missing key. Set config.tie_word_embeddings to False before saving.
#
# Seen: 5.23.0 computes with the stored head, and its copy has it beside "tie_word_embeddings": true; 4.57.6, with the
# copy, has logits off by 1.2 of up to 1.1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/head.py" <<'PY'
import json
import logging
import sys
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
transformers.utils.logging.add_handler(handler)
first, copy = Path(sys.argv[1], "first"), Path(sys.argv[1], "copy")
new, ids = transformers.__version__.startswith("5."), torch.arange(1, 33)[None]
if new:
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(0, 0.2, generator=generator)
    model.save_pretrained(first)
    with torch.no_grad():
        torch.save(model(ids).logits, first / "logits.pt")
    config = json.loads((first / "config.json").read_text())
    # 4.57.6 reads the rotary base from the top of the file
    config |= {"tie_word_embeddings": True, "rope_theta": 10000.0}
    (first / "config.json").write_text(json.dumps(config))
    said.clear()
    AutoModelForCausalLM.from_pretrained(first).save_pretrained(copy)
model, info = AutoModelForCausalLM.from_pretrained(copy, output_loading_info=True)
assert not any(info.values())
with torch.no_grad():
    wanted = torch.load(first / "logits.pt")
    off = (model.eval()(ids).logits - wanted).abs().max().item()
with safe_open(copy / "model.safetensors", "pt") as f:
    stored = "lm_head.weight" in f.keys()
tied = json.loads((copy / "config.json").read_text())["tie_word_embeddings"]
print(
    f"transformers {transformers.__version__}: the copy stores a head {stored}, and says tied {tied}; logits off by {off:.2g} "
    f"of up to {wanted.abs().max().item():.2g}; warnings: {len(said)}"
)
right = (off < 1e-5 and said) if new else (off > 0.5 and not said)
sys.exit(0 if stored and tied and right else 1)
PY
for version in 5.23.0 4.57.6; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/head.py" "$work" 2> "$work/log" || { cat "$work/log"; exit 1; }
done
