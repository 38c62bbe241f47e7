#!/usr/bin/env bash
# transformers 5.23.0 gives numbers of an fp8 matrix the scale of another block where 128 does not divide its rows or
# columns, whenever it makes numbers of the codes: always where there is no GPU, and with dequantize=True.
#
# config.json says `"weight_block_size": [128, 128]`, and the last block of a matrix of 192 rows has 64 of them. The
# size is not read: the rows are shared out equally among the scales there are, two blocks of 96, so rows 96 to 127 get
# the scale of the rows after them. Where the rows cannot be shared out so (576 in five blocks, as in one matrix a layer
# of DeepSeek-V3) the load ends in an error that says "not divisible by scale grid". Small models are cut this way (960
# columns; experts of 192), no key is missing, and the log says no more than for a load that is right. Multiply by
# scales[row // 128, column // 128].
#
# Seen: rows of 1 up to 127 and of 100 from 128 on come out as 1 up to 95 and 100 from 96 on, by default and with
# FineGrainedFP8Config(dequantize=True); with 256 rows as they are; with 576, RuntimeError.
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

BLOCK = 128


def folder(rows):
    """A Llama whose up_proj has rows of 1 in its first block and of 100 in the others, in fp8 codes and scales."""
    path = Path(sys.argv[1]) / f"rows-{rows}"
    sizes = dict(vocab_size=64, hidden_size=128, intermediate_size=rows, num_hidden_layers=1, num_attention_heads=4)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if "_proj." in name]:
        height, width = tensors[name].shape
        scales = torch.full((-(-height // BLOCK), -(-width // BLOCK)), 100 / 256)
        scales[0] = 1 / 256
        tensors[name] = torch.full((height, width), 256.0).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    words = json.loads((path / "config.json").read_text())
    words["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (path / "config.json").write_text(json.dumps(words))
    return path


def outcome(rows, **options):
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder(rows), dtype=torch.float32, output_loading_info=True, **options
        )
    except RuntimeError:
        return "RuntimeError"
    assert not any(info.values())
    column = model.model.layers[0].mlp.up_proj.weight[:, 0]
    return int((column == 1).sum()), int((column == 100).sum())


made = {"quantization_config": FineGrainedFP8Config(dequantize=True)}
asked = {rows: outcome(rows, **made) for rows in (192, 256, 576)}
default = outcome(192) if not torch.cuda.is_available() else asked[192]
print(f"transformers {transformers.__version__}: rows of 1 and of 100: {asked}; 192 by default: {default}")
sys.exit(0 if asked == {192: (96, 96), 256: (128, 128), 576: "RuntimeError"} and default == (96, 96) else 1)
PY
