#!/usr/bin/env bash
# load_checkpoint_in_model of accelerate 1.15.0 finds no key missing, with strict=True as without: what the file lacks
# stays as it was made, and nothing is said. Of a folder with both it reads pytorch_model.bin and not model.safetensors,
# which is the one that transformers reads.
#
# A key too many is a warning, or a RuntimeError with strict=True, so the check seems to work. A part of the shards, or
# a file without the head or a layer, is loaded without a word, and the model computes with random numbers there.
# Folders with two files are common: a model that was published as .bin and converted, or saved anew into the folder of
# its base. One loader computes with the new weights, the other with the old. Compare the names of the file with
# model.state_dict() first, and give the path of the file.
#
# Seen: of a file without the last norm the norm is as it was made, nothing is logged, and strict=True raises nothing;
# with a key more, strict=True raises RuntimeError. Norms of 1 in model.safetensors and of 2 in pytorch_model.bin of one
# folder: accelerate has 2, from_pretrained of transformers 5.24.0 has 1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q --no-compile "torch==2.13.0" "numpy==2.4.6" "transformers==5.24.0" "accelerate==1.15.0"
"$work/env/bin/python" - "$work" <<'PY'
import logging
import sys
import warnings
from pathlib import Path

import accelerate
import torch
import transformers
from accelerate import load_checkpoint_in_model
from transformers import LlamaConfig, LlamaForCausalLM

transformers.utils.logging.disable_progress_bar()
said = []
warnings.simplefilter("ignore")
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger().addHandler(handler)
logging.getLogger("accelerate").addHandler(handler)
folder = Path(sys.argv[1], "both")
sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def made(norm):
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.model.norm.weight.data.fill_(norm)
    return model


def norm(model):
    return model.model.norm.weight[0].item()


made(1).save_pretrained(folder)
old = made(2).state_dict()
torch.save(old, folder / "pytorch_model.bin")
model = made(0)
said.clear()
load_checkpoint_in_model(model, str(folder))
found = norm(model), norm(LlamaForCausalLM.from_pretrained(folder))
good = found == (2, 1)
print(f"accelerate {accelerate.__version__}: norm {found[0]}; transformers {transformers.__version__}: norm {found[1]}")
path = f"{sys.argv[1]}/part.bin"
for kind, state in (
    ("without the norm", {name: w for name, w in old.items() if name != "model.norm.weight"}),
    ("with a key more", old | {"other": torch.ones(1)}),
):
    torch.save(state, path)
    ends = []
    for strict in (False, True):
        model = made(7)
        try:
            load_checkpoint_in_model(model, path, strict=strict)
            ends.append(f"norm {norm(model)}")
        except RuntimeError as error:
            ends.append(type(error).__name__)
    print(f"a file {kind}: {ends[0]}, with strict=True: {ends[1]}; lines in the log: {len(said)}")
    if "without" in kind:
        good &= ends == ["norm 7.0", "norm 7.0"] and not said
    else:
        good &= ends == ["norm 2.0", "RuntimeError"] and bool(said)
sys.exit(0 if good else 1)
PY
