#!/usr/bin/env bash
# Gemma 2 in transformers 4.57.6, loaded as usual, leaves out the cap of its attention scores: the default attention is
# sdpa, which has none. With attn_implementation="eager" it is there. 5.23.0 does not offer sdpa for it.
#
# `attn_logit_softcapping` (50 in the published models) is part of what was trained. 4.57.6 reads it, hands it to the
# attention and the fast one drops it; nothing is logged, and generate() reads fluent, as few scores reach the cap. A
# conversion that is compared with 4.57.6 at its default is off where it is right, by how much depends on the prompt.
#
# Seen: the default is sdpa in 4.57.6, off from eager by 5 of logits up to 25 without a warning, and equal to what eager
# gives with a cap of null; in 5.23.0 the default is eager.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/cap.py" <<'PY'
import json
import logging
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
transformers.utils.logging.add_handler(handler)
folder, ids = Path(sys.argv[1]), torch.arange(1, 33)[None]
sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
sizes |= dict(num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, max_position_embeddings=64)
model = Gemma2ForCausalLM(Gemma2Config(**sizes, attn_logit_softcapping=50.0))
generator = torch.Generator().manual_seed(0)
for p in model.parameters():
    p.data.normal_(0, 1, generator=generator)  # so that scores reach the cap
model.save_pretrained(folder)
said.clear()


def logits(**more):
    model = AutoModelForCausalLM.from_pretrained(folder, **more).eval()
    with torch.no_grad():
        return model.config._attn_implementation, model(ids).logits


kind, usual = logits()
capped = logits(attn_implementation="eager")[1]
config = json.loads((folder / "config.json").read_text())
(folder / "config.json").write_text(json.dumps(config | {"attn_logit_softcapping": None}))
free = logits(attn_implementation="eager")[1]
off, same = ((usual - x).abs().max().item() for x in (capped, free))
print(
    f"transformers {transformers.__version__}: {kind}; off from eager by {off:.2g} of up to {capped.abs().max().item():.2g}, "
    f"from eager without a cap by {same:.2g}; {said}"
)
new = transformers.__version__.startswith("5.")
right = (kind == "eager" and off == 0 and same > 0.5) if new else (kind == "sdpa" and off > 0.5 and same < 1e-3)
sys.exit(0 if right and not said else 1)
PY
for version in 4.57.6 5.23.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/cap.py" "$work/model-$version" \
        2> "$work/log" || { cat "$work/log"; exit 1; }
done
