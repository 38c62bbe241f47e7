#!/usr/bin/env bash
# save_pretrained in shards into a folder that holds a model.safetensors leaves that file there, and from_pretrained
# then loads it: the old weights, in transformers 4.57.6 and 5.23.0, without a word.
#
# The writer removes shards of earlier saves, so saving twice into one folder (a run that saves as it goes, a model that
# grew past the size of a shard, another max_shard_size) looks safe. The single file has a name of its own, is not
# removed, and is looked for before the index. Names and shapes fit, nothing is missing, and what was trained since is
# not there. The other way round, the index stays behind without its shards, and does no harm.
#
# Seen: after both saves the folder has model.safetensors, the index and the shards; the norm that was set to 9 in
# between loads as 1; once model.safetensors is deleted, as 9. No key is reported and nothing is logged.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/stale.py" <<'PY'
import logging
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
transformers.utils.logging.add_handler(handler)
folder = Path(sys.argv[1])
sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes))
model.save_pretrained(folder)
model.model.norm.weight.data.fill_(9)
model.save_pretrained(folder, max_shard_size="20KB")
single = folder / "model.safetensors"
both = single.exists() and (folder / "model.safetensors.index.json").exists()


def norm():
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return loaded.model.norm.weight[0].item()


first = norm()
single.unlink()
second = norm()
print(f"transformers {transformers.__version__}: both there {both}; loaded {first}, without model.safetensors {second}; {said}")
sys.exit(0 if both and not said and (first, second) == (1, 9) else 1)
PY
for version in 4.57.6 5.23.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/stale.py" "$work/model-$version" \
        2> "$work/log" || { cat "$work/log"; exit 1; }
done
