#!/usr/bin/env bash
# A boolean attention mask of four dimensions works with sdpa in transformers 4.57.6 and 5.23.0, and masks nothing with
# eager attention, which adds it: every forbidden key gets 0 and every allowed one 1.
#
# Masks for packed texts, prefixes or trees of candidates are given as (batch, 1, queries, keys), and True for "may be
# seen" is what torch's attention takes, so such code is right until attention weights are asked for (eager only), or a
# comparison of a conversion is made in the eager reading. The model then sees the future. With two dimensions booleans
# are right in both. A mask of float 0 and 1 is added by both. The form that both read alike is additive: 0, and
# torch.finfo(dtype).min.
#
# Seen: logits off from those of a causal call by 0 with sdpa and by 5.7 (of up to 4.3) with eager attention, in both
# releases, without a warning; the additive mask is off by 0 in both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/masks.py" <<'PY'
import logging
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
ids = torch.arange(8)[None]
causal = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
masks = {
    "boolean": causal,
    "float": causal.float(),
    "additive": torch.where(causal, 0.0, torch.finfo(torch.float32).min),
    "two dimensions": torch.ones(1, 8, dtype=torch.bool),
}
off = {}
for attention in ("eager", "sdpa"):
    config = LlamaConfig(**sizes, attn_implementation=attention)
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.ndim > 1:
            p.data.normal_(0, 0.3, generator=generator)
    with torch.no_grad():
        right = model(ids).logits
        for name, mask in masks.items():
            off[attention, name] = (model(ids, attention_mask=mask).logits - right).abs().max().item()
    found = {name: f"{off[attention, name]:.2g}" for name in masks}
    print(f"transformers {transformers.__version__}, {attention}, logits up to {right.abs().max():.2g}, off by {found}")
print(f"warnings: {said}")
wrong = {k for k, delta in off.items() if delta > 3}
good = wrong == {("eager", "boolean"), ("eager", "float"), ("sdpa", "float")}
sys.exit(0 if good and not said and all(d < 1e-4 for k, d in off.items() if k not in wrong) else 1)
PY
for version in 5.23.0 4.57.6; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/masks.py"
done
