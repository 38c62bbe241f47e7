#!/usr/bin/env bash
# An fp8 model that transformers 5.23.0 has made numbers of (where there is no GPU, or with dequantize=True) is saved as
# fp8 codes and scales again, under a config.json without `quantization_config`. What that folder loads as is the codes.
#
# Loading an fp8 download with dequantize=True and saving is how one makes a folder to train, merge or convert from. The
# matrices in memory are bfloat16 or float32, and what is written is codes again, so that whatever was trained or merged
# in between is rounded to eight bits. The next load takes codes up to 448 for
# weights, lists the scales as UNEXPECTED ("can be ignored") and goes on. save_pretrained(folder,
# save_original_format=False) writes the numbers.
#
# Seen: seven matrices of one layer F8_E4M3 in the file, no quantization_config, 7 unexpected and no missing keys, the
# largest weight 448 in place of 0.1; with save_original_format=False float32 and the same weights.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==5.23.0" "accelerate==1.15.0"
"$work/env/bin/python" -W ignore - "$work" 2> "$work/log" <<'PY' || { tail -20 "$work/log"; exit 1; }
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

root = Path(sys.argv[1])
sizes = dict(vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4)
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(root / "fp8")
tensors = load_file(root / "fp8/model.safetensors")
for name in [name for name in tensors if "_proj." in name]:
    blocks = tensors[name].reshape(tensors[name].shape[0] // 128, 128, -1, 128)
    scales = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    tensors[name] = codes.reshape(tensors[name].shape)
    tensors[f"{name}_scale_inv"] = scales
save_file(tensors, root / "fp8/model.safetensors", {"format": "pt"})
words = json.loads((root / "fp8/config.json").read_text())
words["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
(root / "fp8/config.json").write_text(json.dumps(words))

config = FineGrainedFP8Config(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(root / "fp8", dtype=torch.float32, quantization_config=config)
right = model.model.layers[0].mlp.up_proj.weight
model.save_pretrained(root / "default")
model.save_pretrained(root / "plain", save_original_format=False)
seen = {}
for name in ("default", "plain"):
    saved = load_file(root / name / "model.safetensors")
    dtypes = [str(tensor.dtype) for key, tensor in saved.items() if key.endswith("_proj.weight")]
    said = "quantization_config" in json.loads((root / name / "config.json").read_text())
    loaded, info = AutoModelForCausalLM.from_pretrained(root / name, output_loading_info=True)
    weight = loaded.model.layers[0].mlp.up_proj.weight
    keys = len(info["missing_keys"]), len(info["unexpected_keys"])
    seen[name] = sorted(set(dtypes)), said, keys, weight.abs().max().item(), torch.equal(weight, right)
print(f"transformers {transformers.__version__}: {seen}; in memory {right.dtype}, up to {right.abs().max().item():.2f}")
good = seen["default"][:4] == (["torch.float8_e4m3fn"], False, (0, 7), 448.0)
good &= seen["plain"][:3] == (["torch.float32"], False, (0, 0)) and seen["plain"][4]
sys.exit(0 if good and right.dtype == torch.float32 and right.abs().max() < 1 else 1)
PY
