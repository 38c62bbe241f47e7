#!/usr/bin/env bash
# GPT-Neo with a static cache (cache_implementation="static") sees less of its text the more room is left in the cache,
# in transformers 4.57.6 and 5.24.0, without a word.
#
# Every second layer has a window, 256 tokens in the published models. The part of the mask for it is cut out by the
# length of the keys, which is that of the text with the default cache and that of the whole buffer with a static one:
# each row is taken for one further down by as many places as are free. The window is shorter by those, and where they
# are more than the window, nothing is left of it. With room for 256 more tokens the local layers of a prompt see
# nothing of it. The model's layers of full attention are right, and so are texts and buffers that fit the window.
#
# Seen: a prompt of 32 tokens, window 8: logits of a static cache off by 0 with 32 places, by more than 0.1 with 36 and
# with 64; window 128, or no local layers: by 0 with each; the same in both releases.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/window.py" <<'PY'
import sys

import torch
import transformers
from transformers import GPTNeoConfig, GPTNeoForCausalLM, StaticCache

transformers.utils.logging.set_verbosity_error()
ids, good = torch.arange(3, 35)[None], True
for kinds, window in ((["global", "local"], 8), (["global", "local"], 128), (["global", "global"], 8)):
    sizes = dict(vocab_size=40, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=128)
    model = GPTNeoForCausalLM(GPTNeoConfig(**sizes, attention_types=[[kinds, 1]], window_size=window)).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += torch.empty_like(p).normal_(0, 0.2, generator=generator)
    found = []
    with torch.no_grad():
        wanted = model(ids).logits
        for room in (32, 36, 64):
            cache = StaticCache(config=model.config, max_cache_len=room)
            out = model(ids, past_key_values=cache, use_cache=True).logits
            found.append((out - wanted).abs().max().item())
    print(f"transformers {transformers.__version__}, {kinds}, window {window}: off by {[f'{off:.2g}' for off in found]}")
    local = window == 8 and "local" in kinds
    good &= found[0] < 1e-4 and all(off > 0.1 if local else off < 1e-4 for off in found[1:])
sys.exit(0 if good else 1)
PY
python3 -m venv "$work/env"
for version in 4.57.6 5.24.0; do
    "$work/env/bin/pip" install -q --no-compile "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/env/bin/python" -W ignore "$work/window.py" 2> "$work/log" || { cat "$work/log"; exit 1; }
done
