#!/usr/bin/env bash
# A gpt-oss config.json with `"rope_scaling": null` is one of plain rotary positions in transformers 4.57.6, and one of
# yarn with factor 32 in 5.23.0. Neither says a word.
#
# null is what 4.57.6 itself writes for a model of this class whose positions are not scaled (one trained from nothing, a small
# one for tests). In 5.23.0 "nothing given" and "given as nothing" are one and the same, and the class fills both with the
# scaling of the published 20B. A folder that must mean the same in both says {"rope_type": "default", ...} in full.
#
# Seen: one folder, saved by 4.57.6 with float32 weights; the 40 logits of its last position differ between the releases
# by 1.8 of values up to 3.9, and by less than 1e-5 once config.json gives rope_scaling of type "default".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/step.py" <<'PY'
import json
import logging
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

transformers.utils.logging.disable_progress_bar()
said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
work = Path(sys.argv[1])
folder = work / "model"
if not folder.exists():
    sizes = dict(vocab_size=40, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=16)
    model = GptOssForCausalLM(GptOssConfig(**sizes, rope_theta=10000.0, rope_scaling=None, pad_token_id=0, eos_token_id=1))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(0, 0.5, generator=generator)
    model.save_pretrained(folder)


def last(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(2, 40)[None]).logits[0, -1]


written = json.loads((folder / "config.json").read_text())
full = work / "full"
if not full.exists():
    full.mkdir()
    (full / "model.safetensors").symlink_to(folder / "model.safetensors")
    (full / "config.json").write_text(json.dumps({**written, "rope_scaling": {"rope_type": "default"}}))
config = AutoConfig.from_pretrained(folder)
scaling = config.to_dict().get("rope_parameters") or config.to_dict().get("rope_scaling") or {}
torch.save([last(folder), last(full)], work / f"{transformers.__version__}.pt")
print(
    f"transformers {transformers.__version__}: rope_scaling in the file {written['rope_scaling']}, "
    f"read as {scaling.get('rope_type')} with factor {scaling.get('factor')}, warnings {said}"
)
sys.exit(1 if said else 0)
PY
for version in 4.57.6 5.23.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/step.py" "$work"
done
"$work/5.23.0/bin/python" - "$work" <<'PY'
import sys

import torch

(old, old_full), (new, new_full) = (torch.load(f"{sys.argv[1]}/{release}.pt") for release in ("4.57.6", "5.23.0"))
null, full = (old - new).abs().max().item(), (old_full - new_full).abs().max().item()
print(f"logits up to {old.abs().max().item():.2g}; between the releases: {null:.2g} with null, {full:.2g} with type default")
sys.exit(0 if null > 1e-2 and full < 1e-5 else 1)
PY
