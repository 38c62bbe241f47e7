#!/usr/bin/env bash
# A merge of Mixtrals by mergekit 0.1.5 has the names of transformers 5: 4.57.6 loads it with random experts and
# routers, and 5.24.0 as it is. The two models that were merged load in both.
#
# transformers 5 stacks the experts in memory (mlp.experts.gate_up_proj) and goes on writing the published names, one
# tensor an expert, as do its tools. mergekit writes the names in memory. Its folder says "architectures":
# ["MixtralForCausalLM"] as before, and release 4, and whatever else knows Mixtral by its published names, lacks most of
# its weights; 4.57.6 says so in a warning, initializes them and computes. Loading it with release 5 and saving keeps
# the names it was loaded by; a model made from its config that is given its state_dict() is saved under the published
# ones, which all read.
#
# Seen: a merge of two (4 layers, 4 experts, linear) has 39 tensors where each of them has 79; 5.24.0 finds no key
# missing, 4.57.6 misses 52. Loaded and saved by 5.24.0 it has 39, through a model made from its config 79.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/merge.py" <<'PY'
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
work, new = Path(sys.argv[1]), transformers.__version__.startswith("5.")
if new:
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64)
    for seed in (1, 2):
        model = MixtralForCausalLM(MixtralConfig(**sizes))
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.data.normal_(0, 0.2, generator=generator)
        model.save_pretrained(work / f"model-{seed}")
    models = "".join(f"- model: {work}/model-{seed}\n  parameters: {{weight: 0.5}}\n" for seed in (1, 2))
    (work / "merge.yml").write_text(f"models:\n{models}merge_method: linear\ndtype: float32\n")
    program = [sys.executable, "-c", "from mergekit.scripts.run_yaml import main; main()"]
    options = ["--no-copy-tokenizer", "--no-write-model-card"]
    subprocess.run([*program, "merge.yml", "merged", *options], cwd=work, check=True, capture_output=True)


def names(folder):
    return {name for file in (work / folder).glob("*.safetensors") for name in load_file(file)}


missing = {}
for folder in ("model-1", "model-2", "merged"):
    model, info = AutoModelForCausalLM.from_pretrained(work / folder, output_loading_info=True)
    missing[folder] = len(info["missing_keys"])
if new:
    model.save_pretrained(work / "again")
    fresh = MixtralForCausalLM(model.config)
    fresh.load_state_dict(model.state_dict())
    fresh.save_pretrained(work / "fresh")
count = {folder: len(names(folder)) for folder in (*missing, "again", "fresh")}
print(f"transformers {transformers.__version__}: tensors {count}; missing {missing}")
good = list(count.values()) == [79, 79, 39, 39, 79]
sys.exit(0 if good and missing == {"model-1": 0, "model-2": 0, "merged": 0 if new else 52} else 1)
PY
python3 -m venv "$work/env"
pip=("$work/env/bin/pip" install -q --no-compile)
"${pip[@]}" "torch==2.13.0" "numpy==2.4.6" "transformers==5.24.0" "accelerate==1.15.0" pydantic click
"${pip[@]}" --no-deps "mergekit==0.1.5" "immutables==0.21" "peft==0.21.2" "scipy==1.17.1"
"$work/env/bin/python" -W ignore "$work/merge.py" "$work" 2> "$work/log" || { cat "$work/log"; exit 1; }
"${pip[@]}" "transformers==4.57.6" 2> /dev/null
"$work/env/bin/python" -W ignore "$work/merge.py" "$work" 2> "$work/log" || { cat "$work/log"; exit 1; }
