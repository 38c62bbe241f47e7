#!/usr/bin/env bash
# A LoRA that was merged and saved into the folder its adapter is in is applied a second time when transformers 5.23.0
# loads that folder with peft 0.21.2 installed. Without peft the same folder loads as it was saved, and in 4.57.6 too.
#
# trainer.save_model(run), then merge_and_unload().save_pretrained(run), leaves model.safetensors beside
# adapter_config.json. 5.23.0 looks for an adapter, and takes the folder's own weights for its base where there is a
# config.json; 4.57.6 follows `base_model_name_or_path` and passes the merged file over. So what is computed depends on
# the release, and on whether peft can be imported: the server without it is right, the evaluation with it is not.
# Nothing is logged. Delete the two adapter files, or merge into a folder of its own.
#
# Seen, by what q_proj multiplies with: 5.23.0 with peft base + 2 delta by AutoModelForCausalLM and LlamaForCausalLM;
# without peft base + delta by both, and in 4.57.6 base + delta with and without.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/twice.py" <<'PY'
import logging
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
transformers.utils.logging.add_handler(handler)
root = Path(sys.argv[1])
step = sys.argv[2]


def effective(model):
    """The matrix that q_proj of the first layer multiplies by: what it makes of the rows of the identity."""
    with torch.no_grad():
        return model.model.layers[0].self_attn.q_proj(torch.eye(32)).T


if step == "make":
    from peft import LoraConfig, get_peft_model

    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(root / "base")
    base = LlamaForCausalLM.from_pretrained(root / "base")
    torch.save(effective(base), root / "base.pt")
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(root / "run")
    merged = tuned.merge_and_unload()
    merged.save_pretrained(root / "run")
    torch.save(effective(merged), root / "merged.pt")
base, merged = torch.load(root / "base.pt"), torch.load(root / "merged.pt")
delta = merged - base
times = {}
for loader in (AutoModelForCausalLM, LlamaForCausalLM):
    found = effective(loader.from_pretrained(root / "run")) - base
    times[loader.__name__] = round((found * delta).sum().item() / (delta * delta).sum().item(), 3)
count = 2 if transformers.__version__ == "5.23.0" and step == "make" else 1
right = {"AutoModelForCausalLM": count, "LlamaForCausalLM": count}
peft = "without peft" if step == "bare" else "with peft"
print(f"transformers {transformers.__version__}, {peft}: base + this times delta: {times}; {said}")
sys.exit(0 if times == right and not said and delta.abs().max() > 0.01 else 1)
PY
for version in 5.23.0 4.57.6; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "accelerate==1.15.0" "peft==0.21.2" \
        "transformers==$version"
    mkdir "$work/folders-$version"
    for step in make bare; do
        "$work/$version/bin/python" -W ignore "$work/twice.py" "$work/folders-$version" "$step" \
            2> "$work/log" || { tail -20 "$work/log"; exit 1; }
        "$work/$version/bin/pip" uninstall -q -y peft
    done
done
