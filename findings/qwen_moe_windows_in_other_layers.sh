#!/usr/bin/env bash
# `"use_sliding_window": true` beside `"max_window_layers"` means three sets of layers. Qwen2 and Qwen3 have the window
# from that layer on, in transformers 4.57.6 and 5.24.0. Qwen3-MoE has it in all layers, in both. Qwen2-MoE has it in
# all layers in 4.57.6, and in every second of those before that layer in 5.24.0.
#
# The fields are called alike, and where their documentation explains max_window_layers (Qwen2, Qwen3) it is the number
# of layers of full attention that come first. A mixture with windows that was trained under one reading computes
# another model beyond the window under the other; up to it all agree, so short tests pass. Keys fit and nothing is
# logged. Leave use_sliding_window false for mixtures, as the published ones do, or say `layer_types` for Qwen2-MoE in
# 5.24.0.
#
# Seen, 6 layers, max_window_layers 3: layers 3, 4, 5 for Qwen2 and Qwen3; 0 to 5 for Qwen3-MoE; for Qwen2-MoE 0 to 5 in
# 4.57.6, 0 and 2 in 5.24.0. eager and sdpa agree in each.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/windows.py" <<'PY'
import sys

import torch
import transformers

transformers.utils.logging.set_verbosity_error()
new, good = transformers.__version__.startswith("5."), True
sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4)
sizes |= dict(num_key_value_heads=2, max_position_embeddings=64)
sizes |= dict(use_sliding_window=True, sliding_window=8, max_window_layers=3)
experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
every, later = [0, 1, 2, 3, 4, 5], [3, 4, 5]
cases = {
    "Qwen2": ({}, later),
    "Qwen3": (dict(head_dim=8), later),
    "Qwen3Moe": (experts | dict(head_dim=8), every),
    "Qwen2Moe": (experts | dict(shared_expert_intermediate_size=16), [0, 2] if new else every),
}
ids = torch.arange(3, 35)[None]
for name, (more, wanted) in cases.items():
    made = getattr(transformers, f"{name}ForCausalLM")
    model = made(made.config_class(**sizes, **more, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(0, 0.2, generator=generator)
    with torch.no_grad():
        out = model(ids, output_attentions=True)
        found = [i for i, seen in enumerate(out.attentions) if not seen[0, :, -1, :24].any()]
        full = [i for i, seen in enumerate(out.attentions) if seen[0, :, -1].all()]
        model.set_attn_implementation("sdpa")
        off = (model(ids).logits - out.logits).abs().max().item()
    print(f"transformers {transformers.__version__}, {name}: layers with the window {found}; sdpa off from eager by {off:.2g}")
    good &= found == wanted and sorted(found + full) == every and off < 1e-4
sys.exit(0 if good else 1)
PY
python3 -m venv "$work/env"
for version in 4.57.6 5.24.0; do
    "$work/env/bin/pip" install -q --no-compile "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/env/bin/python" -W ignore "$work/windows.py" 2> "$work/log" || { cat "$work/log"; exit 1; }
done
