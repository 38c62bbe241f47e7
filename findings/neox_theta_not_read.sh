#!/usr/bin/env bash
# GPT-NeoX reads neither `rope_theta` nor `partial_rotary_factor` of config.json, in transformers 4.57.6 and 5.23.0.
#
# Every other rotary decoder of the library takes its base from a top-level `rope_theta`. The class of GPT-NeoX takes
# it from `rotary_emb_base`, and the share of a head that is turned from `rotary_pct`; beside those (and beside
# `rope_parameters` in 5.x) the generic names are kept as attributes or dropped, nothing is logged, and the defaults
# 10000 and 0.25 are computed with. A tool that writes the names that all others have changes the model.
#
# Seen: logits with rope_theta 1e6 and partial_rotary_factor 0.5 equal those without either in both releases; with
# rotary_emb_base 1e6 and rotary_pct 0.5 they differ by 2.9 of logits up to 5.5.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/logits.py" <<'PY'
import json
import logging
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

transformers.utils.logging.disable_progress_bar()
said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
folder = Path(sys.argv[1])
sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, max_position_embeddings=64))
generator = torch.Generator().manual_seed(0)
for p in model.parameters():
    if p.ndim > 1:
        p.data.normal_(0, 0.2, generator=generator)
model.save_pretrained(folder)
own = {"rotary_emb_base", "rotary_pct", "rope_theta", "partial_rotary_factor", "rope_parameters", "rope_scaling"}
base = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k not in own}


def logits(**told):
    (folder / "config.json").write_text(json.dumps({**base, **told}))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


plain = logits()
generic = (logits(rope_theta=1e6, partial_rotary_factor=0.5) - plain).abs().max().item()
named = (logits(rotary_emb_base=1e6, rotary_pct=0.5) - plain).abs().max().item()
print(
    f"transformers {transformers.__version__}: |delta| of logits up to {plain.abs().max().item():.2g}: "
    f"{generic:.2g} by rope_theta and partial_rotary_factor, {named:.2g} by rotary_emb_base and rotary_pct, "
    f"warnings {said}"
)
sys.exit(0 if generic == 0 and named > 1e-2 and not said else 1)
PY
for version in 5.23.0 4.57.6; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/logits.py" "$work/model-$version"
done
