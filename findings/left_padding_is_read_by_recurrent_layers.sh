#!/usr/bin/env bash
# A text that is padded on the left alone in its batch is another text for Mamba-2, Bamba and Qwen3-Next in transformers
# 4.57.6, attention_mask or not: the padding goes through their convolutions and states. Beside a second text it does
# not. LFM2 reads it always in 4.57.6; 5.24.0 reads it in none of the four. RecurrentGemma does so in both releases.
#
# Attention leaves padding out by the mask. A state that is carried along must be told to, by zeros in its input, and
# release 4 did that for batches of more than one only. Padding to a fixed length or to a multiple of 8, and the last
# batch of an evaluation, which holds one text, are such calls: the numbers change with what else is in the batch, and a
# prompt gets another answer. Nothing is logged. Do not pad a single text, and do not pad RecurrentGemma on the left.
#
# Seen: logits of a text of 32 tokens behind 4 of padding, off from those without: alone / beside a text of 36, in
# 4.57.6 by more than 1 / less than 1e-4 for the first three and more than 1 / more than 1 for LFM2, in 5.24.0 by less
# than 1e-4 for all four; RecurrentGemma by more than 1 in all cases.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/padding.py" <<'PY'
import sys

import torch
import transformers

transformers.utils.logging.set_verbosity_error()
new = transformers.__version__.startswith("5.")
sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
sizes |= dict(num_key_value_heads=2, max_position_embeddings=64)
experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
heads = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
bamba = dict(attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8)
mamba = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=1)
gemma = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
cases = {  # class, config, off alone and off beside another text in 4.57.6, and in 5.24.0
    "Mamba2": (mamba | dict(chunk_size=8), (True, False), (False, False)),
    "Bamba": (sizes | bamba, (True, False), (False, False)),
    "Qwen3Next": (sizes | experts | heads | dict(head_dim=8), (True, False), (False, False)),
    "Lfm2": (sizes | dict(full_attn_idxs=[1, 3]), (True, True), (False, False)),
    "RecurrentGemma": (gemma | dict(lru_width=32, attention_window_size=64), (True, True), (True, True)),
}
text = torch.arange(3, 35)[None]
padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), text], 1)
other = torch.arange(3, 39)[None]
good = True
for name, (config, old, now) in cases.items():
    made = getattr(transformers, f"{name}ForCausalLM")
    model = made(made.config_class(**config)).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += torch.empty_like(p).normal_(0, 0.2 if p.ndim > 1 else 0.06, generator=generator)
    found = []
    with torch.no_grad():
        wanted = model(text).logits
        for ids in (padded, torch.cat([padded, other])):
            mask = torch.ones_like(ids)
            mask[0, :4] = 0
            where = {} if name == "Mamba2" else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
            found.append((model(ids, attention_mask=mask, **where).logits[:1, 4:] - wanted).abs().max().item())
    print(f"transformers {transformers.__version__}, {name}: off alone {found[0]:.2g}, beside another text {found[1]:.2g}")
    good &= all(off > 1 if bad else off < 1e-4 for off, bad in zip(found, now if new else old))
sys.exit(0 if good else 1)
PY
python3 -m venv "$work/env"
for version in 4.57.6 5.24.0; do
    "$work/env/bin/pip" install -q --no-compile "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/env/bin/python" -W ignore "$work/padding.py" 2> "$work/log" || { cat "$work/log"; exit 1; }
done
