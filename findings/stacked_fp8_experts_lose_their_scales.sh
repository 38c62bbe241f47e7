#!/usr/bin/env bash
# transformers 5.23.0 cannot read its own fp8 folder of a Mixtral back where there is no GPU, if it was saved with
# save_original_format=False: the codes of the experts become numbers, without their scales.
#
# On a GPU codes stay codes and all keys fit. Without one they are made numbers while they are loaded, by rules for
# `NAME.weight` beside `NAME.weight_scale_inv`; stacked experts are called `experts.gate_up_proj` beside
# `experts.gate_up_proj_scale_inv`, for which there is no rule. The scales are listed as UNEXPECTED ("can be ignored when
# loading from different task/architecture"), nothing is missing, and the model computes. The folder that
# save_pretrained() writes by default, one tensor an expert, is read right.
#
# The model is loaded as on a machine with a GPU first (the check for one is left out; nothing is computed there), saved
# both ways, and both folders are loaded as they would be here.
#
# Seen: with the check left out all keys of both folders fit. Here, of logits up to 1.27: off by 0 from the default folder;
# from the other off by 1.36, with the first choice of 1 of 38 positions right, and 4 tensors of scales not used.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==5.23.0" "accelerate==1.15.0"
"$work/env/bin/python" -W ignore - "$work" <<'PY'
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer as Quantizer

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
work = Path(sys.argv[1])
sizes = dict(vocab_size=40, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
sizes |= dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64)
model = MixtralForCausalLM(MixtralConfig(**sizes))
generator = torch.Generator().manual_seed(0)
for p in model.parameters():
    p.data.normal_(0, 0.2, generator=generator)
numbers, codes = work / "numbers", work / "codes"
model.save_pretrained(numbers)
made, exact = {}, {}
for name, w in load_file(numbers / "model.safetensors").items():
    made[name] = exact[name] = w
    if ".layers." in name and w.ndim == 2 and ".gate." not in name:
        blocks = w.view(w.shape[0] // 32, 32, w.shape[1] // 32, 32)
        scales = blocks.abs().amax((1, 3)) / 448
        wide = scales[:, None, :, None]
        eights = (blocks / wide).to(torch.float8_e4m3fn)
        made[name], made[f"{name}_scale_inv"] = eights.view(w.shape), scales
        exact[name] = (eights.float() * wide).view(w.shape)
codes.mkdir()
save_file(made, codes / "model.safetensors", metadata={"format": "pt"})
save_file(exact, numbers / "model.safetensors", metadata={"format": "pt"})
config = json.loads((numbers / "config.json").read_text())
plain = ["lm_head", *(f"model.layers.{i}.block_sparse_moe.gate" for i in range(2))]
said = dict(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[32, 32], modules_to_not_convert=plain)
(codes / "config.json").write_text(json.dumps({**config, "quantization_config": said}))


def loaded(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    return model.eval(), len(info["unexpected_keys"])


def as_with_a_gpu(folder):
    check = Quantizer.validate_environment
    Quantizer.validate_environment = lambda *_, **__: None
    try:
        model, unused = loaded(folder)
    finally:
        Quantizer.validate_environment = check
    assert not unused and any(p.dtype == torch.float8_e4m3fn for p in model.parameters())
    return model


ids = torch.arange(2, 40)[None]
kept = as_with_a_gpu(codes)
with torch.no_grad():
    wanted = loaded(numbers)[0](ids).logits
    found = {}
    for original in (True, False):
        folder = work / f"saved-{original}"
        kept.save_pretrained(folder, save_original_format=original)
        as_with_a_gpu(folder)  # which fits
        model, unused = loaded(folder)
        out = model(ids).logits
        same = (out.argmax(-1) == wanted.argmax(-1)).float().mean().item()
        found[original] = (out - wanted).abs().max().item(), same, unused
print(f"transformers {transformers.__version__}, logits up to {wanted.abs().max().item():.3g}; off by, the same first choice,")
print(f"tensors not used: saved as by default {found[True]}, with save_original_format=False {found[False]}")
sys.exit(0 if found[True] == (0, 1, 0) and found[False][0] > 0.5 and found[False][2] == 4 else 1)
PY
