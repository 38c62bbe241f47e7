#!/usr/bin/env bash
# gpt-oss that transformers 5.23.0 has made numbers of (Mxfp4Config(dequantize=True), or any load where MXFP4 cannot be
# computed) is saved under the names of its codes: bfloat16 experts called `_blocks`, without `_scales`. Nothing loads
# that: the experts are made anew.
#
# Loading with dequantize=True and saving is how one makes a bfloat16 folder to train or to convert from. The names are
# turned back into those of the file that was read, the values are not, and `quantization_config` is gone.
# from_pretrained then lists the experts as MISSING and `_blocks` as UNEXPECTED in a table of its log and gives a model
# whose experts are random. save_pretrained(folder, save_original_format=False) writes names that load.
#
# Seen: by default gate_up_proj_blocks and down_proj_blocks in bfloat16 and 2 missing keys when loaded again; with
# save_original_format=False no missing key and the same experts.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==5.23.0" "accelerate==1.15.0"
"$work/env/bin/python" -W ignore - "$work" 2> "$work/log" <<'PY' || { cat "$work/log"; exit 1; }
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Mxfp4Config

work = Path(sys.argv[1])
sizes = dict(vocab_size=40, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, head_dim=16)
sizes |= dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"])
packed = work / "packed"
GptOssForCausalLM(GptOssConfig(**sizes)).save_pretrained(packed)
tensors, generator = {}, torch.Generator().manual_seed(0)
for name, w in load_file(packed / "model.safetensors").items():
    if name.endswith("_proj") and "experts" in name:
        experts, columns, rows = w.shape
        shape = experts, rows, columns // 32
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(120, 126, shape, dtype=torch.uint8, generator=generator)
    else:
        tensors[name] = w.bfloat16()
save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
config = json.loads((packed / "config.json").read_text())
(packed / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))


def loaded(folder, **more):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True, **more)
    return model, sorted(info["missing_keys"])


model, missing = loaded(packed, quantization_config=Mxfp4Config(dequantize=True))
assert not missing
found = {}
for original in (True, False):
    folder = work / f"saved-{original}"
    model.save_pretrained(folder, save_original_format=original)
    stored = load_file(folder / "model.safetensors")
    names = {n.split(".")[-1]: str(w.dtype) for n, w in stored.items() if "experts" in n and "bias" not in n}
    again, missing = loaded(folder)
    same = torch.equal(again.model.layers[0].mlp.experts.down_proj, model.model.layers[0].mlp.experts.down_proj)
    found[original] = names, len(missing), same
    print(f"transformers {transformers.__version__}, save_original_format={original}: {names}, missing {missing}, same {same}")
wanted = {True: (("down_proj_blocks", "gate_up_proj_blocks"), 2, False), False: (("down_proj", "gate_up_proj"), 0, True)}
kept = all(set(names.values()) == {"torch.bfloat16"} for names, *_ in found.values())
sys.exit(0 if kept and wanted == {k: (tuple(sorted(v[0])), *v[1:]) for k, v in found.items()} else 1)
PY
