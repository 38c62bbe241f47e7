#!/usr/bin/env bash
# transformers 4.37.2, Qwen2ForCausalLM with eager attention: the sliding window works when it is switched off.
#
# config.json of Qwen1.5 and Qwen2 says `"use_sliding_window": false` beside `"sliding_window": 32768`. The first
# release with the class puts `sliding_window` into the mask of every layer whatever the switch says, and whatever
# `max_window_layers` says; later releases obey both. So one config.json has two meanings beyond the window, and a
# comparison of a conversion with 4.37.2 differs there although the conversion is right.
#
# Seen: largest |delta| of logits 5.6 (off) and 5.6 (on from a layer that does not exist) in 4.37.2; 0 and 0 in 4.57.6.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/measure.py" <<'PY'
import sys
import warnings

warnings.simplefilter("ignore")
import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM


def last_logits(**window):
    """Of 20 tokens, with the same weights each time."""
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    config = Qwen2Config(**sizes, **heads, attn_implementation="eager", **window)
    model = Qwen2ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.ndim > 1:
            p.data.normal_(0, 0.3, generator=generator)
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits[0, -1]


wide = last_logits(use_sliding_window=False, sliding_window=4096)
off = last_logits(use_sliding_window=False, sliding_window=4)
beyond = last_logits(use_sliding_window=True, sliding_window=4, max_window_layers=2)
deltas = [float((x - wide).abs().max()) for x in (off, beyond)]
print(f"transformers {transformers.__version__}: max |delta| with a window of 4: off {deltas[0]:.2g}, "
      f"on from layer 2 of 2 {deltas[1]:.2g}")
slides = sys.argv[1] == "slides"
sys.exit(0 if all((d > 0.1) == slides and (slides or d == 0) for d in deltas) else 1)
PY
for pair in 4.37.2:slides 4.57.6:obeys; do
    version=${pair%%:*}
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version" "huggingface_hub==0.36.2"
    "$work/$version/bin/python" "$work/measure.py" "${pair##*:}"
done
