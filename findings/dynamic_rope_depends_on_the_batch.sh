#!/usr/bin/env bash
# With rope_type "dynamic" or "longrope" the logits of a text depend on the length of the longest row of its batch,
# padding included, in transformers 4.57.6 and 5.23.0; and what was generated step by step is not what one forward
# computes.
#
# Both scalings change the rotary frequencies when the row is longer than the original context, for all rows and all
# positions at once. A short text alone has the short frequencies, beside a long one the long ones; logits of a causal
# model at position 3 change with what comes at position 40. Keys in a cache keep the frequencies of their time. So a
# batch of prompts of several lengths, the usual test of a conversion, has no one right answer: compare row by row.
#
# Seen: logits up to 5 of 12 tokens apart by 1 when padded to 48, and when a row of 48 stands beside them; forward and
# steps apart by up to 2.3 (dynamic) and 2.5 (longrope); by less than 1e-4 without scaling. The same in both releases.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/batch.py" <<'PY'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.utils.logging.set_verbosity_error()
sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
factors = dict(short_factor=[1.0] * 4, long_factor=[1.0, 2.0, 4.0, 8.0], original_max_position_embeddings=16)
scalings = {
    "none": None,
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {"rope_type": "longrope", "factor": 4.0} | factors,
}


@torch.no_grad()
def apart(scaling):
    more = {} if scaling is None else {"rope_scaling": scaling}
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=16, **more)).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(0, 0.5, generator=generator)
    long = torch.randint(1, 40, (1, 48), generator=generator)
    padded, mask = long.clone(), torch.ones_like(long)
    padded[:, 12:] = mask[:, 12:] = 0
    alone = model(long[:, :12]).logits
    filled = model(padded, attention_mask=mask).logits[:, :12]
    both = torch.cat([torch.ones_like(mask), mask])
    beside = model(torch.cat([long, padded]), attention_mask=both).logits[1:, :12]
    cache, steps = None, []
    for i in range(48):
        out = model(long[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    stepped = torch.cat(steps, 1) - model(long).logits
    return [round(x.abs().max().item(), 5) for x in (filled - alone, beside - alone, stepped)]


found = {name: apart(scaling) for name, scaling in scalings.items()}
print(f"transformers {transformers.__version__}; logits apart when padded, beside a long row, by steps: {found}")
sys.exit(0 if max(found.pop("none")) < 1e-4 and all(min(f) > 0.2 for f in found.values()) else 1)
PY
for version in 4.57.6 5.23.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/batch.py" 2> "$work/log" || { cat "$work/log"; exit 1; }
done
