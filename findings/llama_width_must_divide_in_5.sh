#!/usr/bin/env bash
# transformers 5.23.0: LlamaConfig refuses a width that the heads do not divide although `head_dim` is given, which the
# model computes with; Mistral's config takes it.
#
# Models whose heads are of another width than width / heads (pruned ones, distilled ones) are published as Llama with
# an explicit head_dim. 4.57.6 loads them; in 5 the config cannot be made, so that config.json of a working model is an
# error, and a converter that writes `llama` for it passes its own tests in one release only.
#
# Seen: hidden_size 40, 6 heads, head_dim 8: 4.57.6 computes finite logits; in 5.23.0 LlamaConfig is refused, and a
# Mistral of the same numbers computes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/heads.py" <<'PY'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

sizes = dict(vocab_size=64, hidden_size=40, intermediate_size=48, num_hidden_layers=1)
heads = dict(num_attention_heads=6, num_key_value_heads=2, head_dim=8)


def computes(config, model):
    try:
        made = config(**sizes, **heads)
    except Exception as error:
        return f"refused: {str(error).strip().splitlines()[-1].strip()}"
    with torch.no_grad():
        return bool(model(made).eval()(torch.arange(9)[None]).logits.isfinite().all())


llama, mistral = computes(LlamaConfig, LlamaForCausalLM), computes(MistralConfig, MistralForCausalLM)
print(f"transformers {transformers.__version__}: Llama {llama}, Mistral {mistral}")
refuses = "not a multiple" in str(llama)
sys.exit(0 if mistral is True and (refuses if sys.argv[1] == "refuses" else llama is True) else 1)
PY
for pair in 5.23.0:refuses 4.57.6:computes; do
    version=${pair%%:*}
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/heads.py" "${pair##*:}"
done
