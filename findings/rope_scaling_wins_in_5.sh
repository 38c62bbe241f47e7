#!/usr/bin/env bash
# Where config.json says the rotary positions in the words of release 4 and of release 5 at once, transformers 5.23.0
# takes `rope_parameters` against `rope_theta`, and `rope_scaling` against `rope_parameters`, without a word.
#
# Folders that must serve both releases hold both. One would guess that the new object wins, or the old keys.
# rope_scaling replaces the whole object, its rope_theta as well, and then the top-level rope_theta, dead until then, is
# the base; null leaves all as it was. A tool that adds a factor to one of the two places, or corrects the base in one,
# changes the model or does not, by what else is in the file. 4.57.6 reads the old keys only.
#
# The usual way to a longer context, the `rope_scaling` of a model card pasted into config.json, ends so where 5.23.0
# had saved the file: the base stood in rope_parameters, and is the class's 10000 from then on.
#
# Seen: rope_parameters with base 1e4, and rope_theta 1e6 beside it: base 1e4 in 5.23.0; with a rope_scaling of factor 4
# as well: base 1e6 and factor 4; with rope_scaling null: base 1e4. With a base of 1e6 in rope_parameters alone and
# rope_scaling pasted beside it: 1e4, in both releases. In 4.57.6 base 1e6 in the first three.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/base.py" <<'PY'
import json
import logging
import sys
from pathlib import Path

import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
transformers.utils.logging.add_handler(handler)
folder = Path(sys.argv[1])
sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
said.clear()
config = json.loads((folder / "config.json").read_text())
config |= {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
found = []
pasted = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
alone = pasted | {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
for more in ({}, pasted, {"rope_scaling": None}, alone):
    plain = {k: v for k, v in config.items() if k != "rope_scaling"}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (plain | more).items() if v is not None or k == "rope_scaling"}))
    turns = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq.tolist()
    factor = round(1 / turns[0], 3)
    found.append((f"{(turns[0] / turns[1]) ** 4:.0e}", factor))  # heads of 8 have four pairs
print(f"transformers {transformers.__version__}: base and factor: {found}; {said}")
new = transformers.__version__.startswith("5.")
base = "1e+04" if new else "1e+06"
sys.exit(0 if not said and found == [(base, 1), ("1e+06", 4), (base, 1), ("1e+04", 4)] else 1)
PY
for version in 4.57.6 5.23.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/base.py" "$work/model-$version" \
        2> "$work/log" || { cat "$work/log"; exit 1; }
done
