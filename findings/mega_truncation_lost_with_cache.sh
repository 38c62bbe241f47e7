#!/usr/bin/env bash
# MegaForCausalLM leaves `truncation` out when it is called as usual, in transformers 4.37.2 and 4.57.6: with `use_cache`,
# whose default is true, the moving average sees the whole text.
#
# The config says how many taps of the damped moving average count. A plain forward of a decoder takes the recurrent form
# of the average, which knows no truncation, and the convolution only with use_cache=False, so one model computes two
# things, and generation differs from training. Models that were not truncated are not affected.
#
# Seen: logits of the two calls apart by 1.1 with truncation 2, by 0 without, in both releases.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/mega.py" <<'PY'
import sys

import torch
import transformers
from transformers import MegaConfig, MegaForCausalLM


def apart(truncation):
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, intermediate_size=12, ema_projection_size=3)
    more = dict(shared_representation_size=8, nffn_hidden_size=20, truncation=truncation)
    model = MegaForCausalLM(MegaConfig(is_decoder=True, bidirectional=False, **sizes, **more)).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(0, 0.7, generator=generator)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        return (model(ids).logits - model(ids, use_cache=False).logits).abs().max().item()


with_, without = apart(2), apart(None)
print(
    f"transformers {transformers.__version__}: logits with and without use_cache apart by {with_:.2g} with "
    f"truncation 2, by {without:.2g} without"
)
sys.exit(0 if with_ > 0.1 and without < 1e-4 else 1)
PY
for version in 4.57.6 4.37.2; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/mega.py"
done
