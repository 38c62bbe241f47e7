#!/usr/bin/env bash
# `"return_dict": false` in config.json makes every call of a model raise: of Llama and Mistral in transformers 4.57.6
# and 5.23.0, of GPT-2 in 5.23.0. In 4.37.2, and for GPT-2 in 4.57.6, it does what it says, a tuple.
#
# Configs of 2021 to 2023 carry it (TorchScript and ONNX exports wanted tuples). The decoders now read the output of
# their own inner model by name, and that model makes a tuple of it because the config says so. `return_dict=True` in
# the call does not help, nor does generate(), whose outputs do not depend on it. The message, an attribute of a tuple,
# names neither the key nor the file. Loading is without a warning. Take the line out.
#
# Seen: "'tuple' object has no attribute 'last_hidden_state'" for a call, for one with return_dict=True and for
# generate(); true instead of false, and all three give numbers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/calls.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig

sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
configs = [c(**sizes, num_key_value_heads=4) for c in (LlamaConfig, MistralConfig)]
configs.append(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4))
ids = torch.arange(8)[None]
tuples = "'tuple' object has no attribute 'last_hidden_state'"


def outcome(call):
    try:
        return type(call()).__name__
    except AttributeError as error:
        return "raises" if str(error) == tuples else str(error)


def calls(folder, said):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "return_dict": said}))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return [
        outcome(lambda: model(ids)),
        outcome(lambda: model(ids, return_dict=True)),
        outcome(lambda: model.generate(ids, max_new_tokens=2, pad_token_id=0)),
    ]


good = True
for config in configs:
    folder = Path(sys.argv[1]) / config.model_type
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    false, true = calls(folder, False), calls(folder, True)
    print(f"transformers {transformers.__version__}, {config.model_type}: false {false}, true {true}")
    old = transformers.__version__ == "4.37.2" or (transformers.__version__ == "4.57.6" and config.model_type == "gpt2")
    good &= "raises" not in true and true[0] != "tuple" and true[2] == "Tensor"
    good &= false[0] == "tuple" and false[1:] == true[1:] if old else false == ["raises"] * 3
sys.exit(0 if good else 1)
PY
for version in 5.23.0 4.57.6 4.37.2; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/calls.py" "$work/models-$version"
done
