#!/usr/bin/env bash
# RecurrentGemma in transformers 4.57.6 has no window without a cache, and with one, the default, sees the future: in a
# text longer than attention_window_size (2,048 in the published models) each token is shown the last tokens of the text
# in place of those before it. 5.24.0 has the window in both.
#
# The keys are cut to the last ones for the cache and the mask is not moved with them, so that its first columns, made
# for the first tokens, let the last ones through. Losses and perplexities of a plain call with long texts are those of
# a model that has seen what it should predict; training, which goes without a cache, is that of a model without a
# window; and a long prompt is read one way and continued another. Texts up to the window are alike. Nothing is logged.
# Cut texts at the window under release 4.
#
# Seen, 32 tokens, window 8: other tokens from position 20 on move the logits before by more than 1 in a plain call of
# 4.57.6 and by 0 in the other calls; other tokens at positions 0 to 7 move the last by more than 0.1 without a cache in
# 4.57.6, and in a model of one layer of attention alone by 0 in 5.24.0. Window 64: logits are equal in all.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/future.py" <<'PY'
import sys
from pathlib import Path

import torch
import transformers
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
new, good = transformers.__version__.startswith("5."), True
ids = torch.arange(3, 35)[None]
later, earlier = ids.clone(), ids.clone()
later[:, 20:], earlier[:, :8] = 5, 5
for window in (8, 64):
    folder = Path(sys.argv[1], f"window-{window}")
    if not new:
        sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
        sizes |= dict(lru_width=32, attention_window_size=window, block_types=["attention"])
        model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**sizes))
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.data += torch.empty_like(p).normal_(0, 0.2, generator=generator)
        model.save_pretrained(folder)
    model, info = RecurrentGemmaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    for cache in (True, False):
        with torch.no_grad():
            logits, after, before = (model.eval()(x, use_cache=cache).logits[0] for x in (ids, later, earlier))
        ahead = (after - logits)[:20].abs().max().item()
        back = (before - logits)[-1].abs().max().item()
        if not new:
            torch.save(logits, folder / f"{cache}.pt")
        off = (logits - torch.load(folder / f"{cache}.pt")).abs().max().item()
        print(
            f"transformers {transformers.__version__}, window {window}, use_cache {cache}: the last 12 tokens move those "
            f"before by {ahead:.2g}, the first 8 move the last by {back:.2g}; off from 4.57.6 by {off:.2g}"
        )
        short = window == 8
        good &= (ahead > 1) if short and cache and not new else ahead < 1e-4
        good &= (back > 0.1) if not short or (not cache and not new) else back < 1e-4
        good &= (off > 0.1) if short and new else off < 1e-4
sys.exit(0 if good else 1)
PY
python3 -m venv "$work/env"
for version in 4.57.6 5.24.0; do
    "$work/env/bin/pip" install -q --no-compile "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/env/bin/python" -W ignore "$work/future.py" "$work" 2> "$work/log" || { cat "$work/log"; exit 1; }
done
