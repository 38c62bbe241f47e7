#!/usr/bin/env bash
# compressed-tensors 0.20.1 writes int8 weights packed into int32 words under "format": "int-quantized" where only
# weights are quantized, and unpacked under "pack-quantized" where activations are too: the format that is asked for is
# not followed, and is what config.json says all the same.
#
# The compressor takes the layout from what is quantized (an 8-bit weight alone is packed; with 8-bit activations it is
# not) and from a `format` inside of each group, null where nothing is said. The `format` of the whole config is handed
# through to config.json. Whoever reads the file by what config.json says looks for `weight` of int8 and finds
# `weight_packed`, or the other way round. Say the format in each group: that one is followed.
#
# Seen, by the `format` of the config: int-quantized with weights alone: weight_packed I32, and "int-quantized" in
# config.json; pack-quantized with activations: weight I8 and "pack-quantized". With the same format in the group:
# weight I8 and weight_packed I32, as asked for.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==5.23.0" "compressed-tensors==0.20.1"
cat > "$work/layout.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
from compressed_tensors import __version__
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, apply_quantization_config
from compressed_tensors.quantization.utils.helpers import calculate_qparams
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}


def written(folder, activations, layout, in_group):
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**INT8, strategy="channel"),
        input_activations=QuantizationArgs(**INT8, strategy="token", dynamic=True) if activations else None,
        format=layout if in_group else None,
    )
    config = QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], format=layout, quantization_status="frozen")
    apply_quantization_config(model, config)
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            low, high = layer.weight.detach().aminmax(dim=1, keepdim=True)
            layer.weight_scale.data.copy_(calculate_qparams(low, high, layer.quantization_scheme.weights)[0])
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    said = json.loads(Path(folder, "config.json").read_text())["quantization_config"]["format"]
    with safe_open(Path(folder, "model.safetensors"), "pt") as file:
        stem = "model.layers.0.self_attn.q_proj."
        kinds = {n: file.get_slice(stem + n).get_dtype() for n in ("weight", "weight_packed") if stem + n in file.keys()}
    return said, kinds


found = []
for number, (activations, layout) in enumerate([(False, "int-quantized"), (True, "pack-quantized")]):
    for in_group in (False, True):
        found.append(written(f"{sys.argv[1]}/{number}{in_group}", activations, layout, in_group))
        where = "config and group" if in_group else "config alone"
        print(f"compressed-tensors {__version__}, activations too: {activations}, format in {where}: {found[-1]}")
packed, plain = {"weight_packed": "I32"}, {"weight": "I8"}
asked, other = "int-quantized", "pack-quantized"
sys.exit(0 if found == [(asked, packed), (asked, plain), (other, plain), (other, packed)] else 1)
PY
"$work/env/bin/python" -W ignore "$work/layout.py" "$work" 2> "$work/log" || { tail -20 "$work/log"; exit 1; }
