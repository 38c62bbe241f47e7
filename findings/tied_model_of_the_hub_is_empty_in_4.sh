#!/usr/bin/env bash
# A tied model that save_torch_model of huggingface_hub (0.36.2, 2.4.0) saved cannot be computed with in transformers
# 4.57.6: both matrices are without data. 4.37.2 and 5.23.0 load the same folder right.
#
# The writer keeps one name of the two, the first by the alphabet, which is lm_head.weight and not
# model.embed_tokens.weight. 4.57.6 makes the model without memory, reads lm_head.weight, and then ties the head to the
# embedding that was in no file. No key is reported, nothing is logged, and the first call ends in "unsupported
# scalarType", about a device called meta. Rename the tensor in the file to model.embed_tokens.weight: that loads
# everywhere.
#
# Seen: of tied Llamas 4.57.6 has embedding and head on the device meta with no key missing, and raises RuntimeError;
# after renaming, and in 4.37.2 and 5.23.0 with either name, logits are off by 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/tied.py" <<'PY'
import logging
import sys

import torch
import transformers
from huggingface_hub import save_torch_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
folder = sys.argv[1]
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).eval()
ids = torch.arange(8)[None]
model.config.save_pretrained(folder)
save_torch_model(model, folder)
stored = load_file(f"{folder}/model.safetensors")
names = [k for k in stored if k in ("lm_head.weight", "model.embed_tokens.weight")]


def outcome():
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    odd = [k for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]]
    try:
        with torch.no_grad():
            delta = (loaded.eval()(ids).logits - model(ids).logits).abs().max().item()
    except RuntimeError as error:
        delta = str(error)
    return loaded.lm_head.weight.device.type, loaded.model.embed_tokens.weight.device.type, delta, odd


before = outcome()
stored["model.embed_tokens.weight"] = stored.pop("lm_head.weight")
save_file(stored, f"{folder}/model.safetensors", {"format": "pt"})
after = outcome()
print(f"transformers {transformers.__version__}: stored {names}: {before}; renamed: {after}; warnings {said}")
right = ("cpu", "cpu", 0.0, [])
seen = before[:2] == ("meta", "meta") and isinstance(before[2], str) and not before[3]
seen = seen if transformers.__version__ == "4.57.6" else before == right
sys.exit(0 if seen and after == right and names == ["lm_head.weight"] and not said else 1)
PY
for version in 5.23.0 4.57.6 4.37.2; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "safetensors==0.8.0" "transformers==$version"
    mkdir "$work/folder-$version"
    "$work/$version/bin/python" -W ignore "$work/tied.py" "$work/folder-$version"
done
