#!/usr/bin/env bash
# Where `original_max_position_embeddings` stands in config.json decides whether it is read, by another rule for each
# kind of rotary scaling and each release: inside `rope_scaling`, at the top level, or at both with different numbers.
#
# The length that a model had before it was extended sets which frequencies yarn and llama3 stretch, and from which
# length on longrope takes its other table. transformers 4.57.6 reads it inside for yarn and llama3 and at the top for
# longrope; 5.24.0 reads it in either, and prefers the top. Where it is not read nothing is said, but for llama3 in
# 4.57.6, which raises, and max_position_embeddings takes its place: the long length for the short one. Both places with
# one number are read alike by all.
#
# Seen, 64 inside, 128 at the top, 256 as max_position_embeddings of a Llama; read by 4.57.6 / 5.24.0: yarn with inside
# 64 / 64, top 256 / 128, both 64 / 128; longrope with a factor, inside 256 / 64, top 128 / 128, both 128 / 128; llama3,
# inside 64 / 64, top KeyError / 128, both 64 / 128.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/places.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

transformers.utils.logging.set_verbosity_error()
new, good = transformers.__version__.startswith("5."), True
config = dict(model_type="llama", hidden_size=512, num_attention_heads=4, num_key_value_heads=2, rope_theta=10000.0)
tables = dict(short_factor=[1.0] * 64, long_factor=[2.0] * 64)
kinds = {
    "yarn": (dict(rope_type="yarn", factor=4.0), (64, 256, 64), (64, 128, 128)),
    "longrope": (dict(rope_type="longrope", factor=2.0, **tables), (256, 128, 128), (64, 128, 128)),
    "llama3": (
        dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0),
        (64, "KeyError", 64),
        (64, 128, 128),
    ),
}


def angles(scaling, inside, top):
    """Frequencies as texts of 50, 100 and 200 tokens meet them."""
    key = "original_max_position_embeddings"
    said = {**config, "max_position_embeddings": 256, "rope_scaling": {**scaling, **({key: inside} if inside else {})}}
    Path(sys.argv[1], "config.json").write_text(json.dumps({**said, **({key: top} if top else {})}))
    rotary = LlamaRotaryEmbedding(config=AutoConfig.from_pretrained(sys.argv[1]))
    found = []
    for length in (50, 100, 200):
        rotary(torch.zeros(1), torch.arange(length)[None])
        found.append(rotary.inv_freq.clone())
    return torch.stack(found)


for name, (scaling, old, now) in kinds.items():
    lengths = {length: angles(scaling, length, length) for length in (64, 128, 256)}
    found = []
    for inside, top in ((64, None), (None, 128), (64, 128)):
        try:
            made = angles(scaling, inside, top)
            (read,) = (length for length, wanted in lengths.items() if torch.allclose(made, wanted, rtol=1e-5))
        except KeyError:
            read = "KeyError"
        found.append(read)
    print(f"transformers {transformers.__version__}, {name}: inside, top and both read as {found}")
    good &= tuple(found) == (now if new else old)
sys.exit(0 if good else 1)
PY
python3 -m venv "$work/env"
for version in 4.57.6 5.24.0; do
    "$work/env/bin/pip" install -q --no-compile "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/env/bin/python" -W ignore "$work/places.py" "$work" 2> "$work/log" || { cat "$work/log"; exit 1; }
done
