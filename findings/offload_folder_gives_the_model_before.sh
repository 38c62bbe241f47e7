#!/usr/bin/env bash
# accelerate 1.15.0: disk_offload and dispatch_model write into an offload folder only if it has no index.json. A second
# model that is given the same folder computes with the weights of the first, without a word.
#
# The names fit wherever both are of one architecture: the next checkpoint of an evaluation, a fine-tuned model after
# its base, the same script run again after training. Names that are new raise a KeyError, equal ones are read from the
# old files, and what stays on the device is the new model's, so that one can have the first layers of one and the last
# of another. Take a new folder for each model.
#
# Seen: layers of ones give 7, of twos 26; after disk_offload of the first and then the second into one folder both give
# 7; dispatch_model with the second of two layers on disk gives 13 in place of 26 for the second model.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "accelerate==1.15.0"
"$work/env/bin/python" -W ignore - "$work" 2> "$work/log" <<'PY' || { tail -20 "$work/log"; exit 1; }
import logging
import sys

import accelerate
import torch
from accelerate import disk_offload, dispatch_model

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger().addHandler(handler)


def model(number):
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for parameter in layers.parameters():
        torch.nn.init.constant_(parameter, number)
    return layers


def number(layers):
    return layers(torch.ones(1, 2))[0, 0].item()


right = number(model(1)), number(model(2))
whole = []
for value in (1, 2):
    layers = model(value)
    disk_offload(layers, f"{sys.argv[1]}/whole")
    whole.append(number(layers))
half = []
for value in (1, 2):
    places = {"0": "cpu", "1": "disk"}
    half.append(number(dispatch_model(model(value), places, main_device="cpu", offload_dir=f"{sys.argv[1]}/half")))
told = [line for line in said if "meta device" not in line]
print(f"accelerate {accelerate.__version__}: right {right}, disk_offload {whole}, dispatch_model {half}; {told}")
sys.exit(0 if right == (7, 26) and whole == [7, 7] and half == [7, 13] and not told else 1)
PY
