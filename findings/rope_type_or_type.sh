#!/usr/bin/env bash
# Where `rope_scaling` has both `type` and `rope_type` and they differ, transformers 4.57.6 takes `type` in Llama, Qwen2
# and Qwen3, and `rope_type` in Mistral, Mixtral and Gemma 2. 5.23.0 takes `rope_type` in all of them. Neither warns.
#
# `type` is the older name. Files have both because release 4 added the new key beside the old, and tools and people
# have since changed one of them, by hand or after a model card. Three of the classes copy the old word over the new
# while they read the file and three do not, so what is right for a Mistral is undone for a Llama with the same lines,
# and undone the other way round by the next release.
#
# Seen: `rope_type` linear of factor 4 beside `type` dynamic: the rotary frequencies are a fourth of the plain ones for
# Mistral, Mixtral and Gemma 2 in 4.57.6 and for all six in 5.23.0, and the plain ones, as "dynamic" begins with them,
# for the other three in 4.57.6; with the two words exchanged the other way about.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/rope_words.py" <<'PY'
import json
import logging
import sys
from pathlib import Path

import transformers
from transformers import AutoConfig, AutoModelForCausalLM

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
folder = Path(sys.argv[1])
folder.mkdir()
sizes = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rope_theta=10000.0,
)  # fmt: skip


def shrunk(kind, **scaling):
    words = {"model_type": kind, **sizes, "rope_scaling": {"factor": 4.0, **scaling}}
    (folder / "config.json").write_text(json.dumps(words))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    rotary = next(m for n, m in model.named_modules() if n.endswith("rotary_emb"))
    return round(1 / float(rotary.inv_freq[0]))


good = True
for kind in ("llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma2"):
    new = shrunk(kind, type="dynamic", rope_type="linear")
    old = shrunk(kind, type="linear", rope_type="dynamic")
    print(f"transformers {transformers.__version__}, {kind}: rope_type linear shrinks {new}, type linear {old}")
    by_type = transformers.__version__ == "4.57.6" and kind in ("llama", "qwen2", "qwen3")
    good &= (new, old) == ((1, 4) if by_type else (4, 1))
print(f"warnings: {said}")
sys.exit(0 if good and not said else 1)
PY
for version in 5.23.0 4.57.6; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/rope_words.py" "$work/folder-$version"
done
