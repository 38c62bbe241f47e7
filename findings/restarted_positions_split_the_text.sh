#!/usr/bin/env bash
# position_ids that start again at 0 split the text in transformers 4.57.6 and 5.23.0: with use_cache=False and without
# attention_mask, tokens no longer see what is before the restart. With the default use_cache, or a mask of ones, they
# do.
#
# Position ids used to say where a token is turned to and nothing more. Several texts packed into one row are now
# recognised by them, in one of the three calls alone, so evaluation (use_cache is true unless it is turned off) and
# training (gradient checkpointing turns it off) of one model on one row compute different things, as do a comparison of
# logits that passes a mask and one that does not.
#
# Seen: logits of one Llama, positions 0..15 twice, apart from those with a mask of ones by 0.8 (use_cache=False, no
# mask), 0 (use_cache=True, no mask), and by 0 for positions 0..31 in any call; the same in both releases.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/positions.py" <<'PY'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
generator = torch.Generator().manual_seed(0)
for p in model.parameters():
    p.data.normal_(0, 0.2, generator=generator)
ids = torch.arange(1, 33)[None]


def apart(positions, use_cache):
    with torch.no_grad():
        masked = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=use_cache).logits
        plain = model(ids, position_ids=positions, use_cache=use_cache).logits
    return (plain - masked).abs().max().item()


twice, once = torch.arange(16).repeat(2)[None], torch.arange(32)[None]
found = {f"{n}, {c}": apart(p, c) for n, p in (("twice", twice), ("once", once)) for c in (False, True)}
print(f"transformers {transformers.__version__}, logits apart (positions, use_cache): {found}")
split = found.pop("twice, False")
sys.exit(0 if split > 0.1 and max(found.values()) < 1e-5 else 1)
PY
for version in 4.57.6 5.23.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/positions.py" 2> "$work/log" || { cat "$work/log"; exit 1; }
done
