#!/usr/bin/env bash
# transformers 5.23.0 refuses the int4 folder with zero points that compressed-tensors 0.20.1 has just written from its
# own model: it makes room for zero points of one number each, and finds eight in a word.
#
# Codes that are not symmetric have a zero point for each group, packed like the codes, along the rows. The writer and
# the compressor agree; the model that is built to load into does not pack them, so that every layer is a MISMATCH and
# the load ends in an error that proposes ignore_mismatched_sizes, with which all zero points would be made anew.
# Symmetric codes load. CompressedTensorsConfig(run_compressed=False) reads the folder right.
#
# Seen: q_proj.weight_zero_point int32 (8, 2) in the file, (64, 2) in the model, RuntimeError; with run_compressed=False
# logits off by 0 from those of the numbers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==5.23.0" "accelerate==1.15.0" \
    "compressed-tensors==0.20.1"
"$work/env/bin/python" -W ignore - "$work" 2> "$work/log" <<'PY' || { cat "$work/log"; exit 1; }
import sys
from pathlib import Path

import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors import safe_open
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

sizes = dict(vocab_size=40, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
ids = torch.arange(1, 33)[None]


def folder(symmetric):
    """A folder that compressed-tensors writes, and the logits before it packed."""
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(0, 0.2, generator=generator)
    weights = dict(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=32)
    group = dict(targets=["Linear"], weights=weights)
    said = QuantizationConfig(
        format="pack-quantized", quantization_status="frozen", ignore=["lm_head"], config_groups={"group_0": group}
    )
    apply_quantization_config(model, said)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            w = module.weight.data.view(module.weight.shape[0], -1, 32)
            low, high = (w.amin(-1), w.amax(-1)) if not symmetric else (-w.abs().amax(-1), w.abs().amax(-1))
            module.weight_scale.data.copy_((high - low) / 15)
            if not symmetric:
                module.weight_zero_point.data.copy_((-8 - low / module.weight_scale).round().clamp(-8, 7))
    with torch.no_grad():
        logits = model(ids).logits
    compressor = ModelCompressor(quantization_config=said)
    compressor.compress_model(model)
    made = Path(sys.argv[1], f"symmetric-{symmetric}")
    model.save_pretrained(made)
    compressor.update_config(made)
    return made, logits


def off(made, logits, **more):
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32, **more).eval()
    with torch.no_grad():
        return (model(ids).logits - logits).abs().max().item()


plain = off(*folder(True))
made, logits = folder(False)
with safe_open(made / "model.safetensors", "pt") as f:
    points = f.get_slice("model.layers.0.self_attn.q_proj.weight_zero_point").get_shape()
try:
    refused = f"loaded, off by {off(made, logits)}"
except RuntimeError as error:
    refused = "refused" if "mismatch" in str(error) else str(error)
unpacked = off(made, logits, quantization_config=CompressedTensorsConfig(run_compressed=False))
print(
    f"transformers {transformers.__version__}: symmetric codes off by {plain:.1g}; zero points {points}: {refused}; with "
    f"run_compressed=False off by {unpacked:.1g}"
)
sys.exit(0 if plain < 1e-4 and points == [8, 2] and refused == "refused" and unpacked < 1e-4 else 1)
PY
