#!/usr/bin/env bash
# Olmo 3: transformers 5.23.0 takes a top-level `rope_theta` for the layers of full attention alone; those with a
# sliding window, three of four, get 500000, the class's default. 4.57.6 takes it for all layers.
#
# Every config.json of release 4 has the base at the top level. The published models say 500000 and are read alike. One
# of another base (a model trained from nothing, a longer context, a small one for tests; 4.57.6's own default is 10000)
# has two bases in 5.23.0, without a warning or a missing key. Say both in `rope_parameters`, an entry for each kind of
# layer.
#
# Seen: rope_theta 10000, two layers with a window longer than the text and two without: the base in use is 10000 for
# both kinds in 4.57.6, and 500000 and 10000 in 5.23.0; logits of 32 tokens differ by more than 0.1 between the
# releases, and by less than 1e-4 with rope_theta 500000.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/olmo3.py" <<'PY'
import json
import logging
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, Olmo3Config, Olmo3ForCausalLM

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
transformers.utils.logging.add_handler(handler)
root = Path(sys.argv[1])
four = transformers.__version__ == "4.57.6"
kinds = ["sliding_attention", "full_attention"] * 2
sizes = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, sliding_window=64,
    max_position_embeddings=64, layer_types=kinds, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
ids = torch.tensor([[3 + 7 * i * i % 60 for i in range(32)]])
off = {}
for theta in (10000.0, 500000.0):
    folder = root / f"theta-{theta:.0f}"
    if four:
        torch.manual_seed(0)
        model = Olmo3ForCausalLM(Olmo3Config(**sizes, rope_theta=theta))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 1 if parameter.dim() == 1 else 0, 0.3)
        model.save_pretrained(folder)
        assert json.loads((folder / "config.json").read_text())["rope_theta"] == theta
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if four:
        rotary = model.model.rotary_embs
        bases = {kind: round(float(rotary[kind].inv_freq[1]) ** -4) for kind in kinds}
    else:
        rotary = model.model.rotary_emb
        bases = {kind: round(float(getattr(rotary, f"{kind}_inv_freq")[1]) ** -4) for kind in kinds}
    with torch.no_grad():
        logits = model(ids).logits
    torch.save(logits, folder / f"{transformers.__version__}.pt")
    if not four:
        off[theta] = (logits - torch.load(folder / "4.57.6.pt")).abs().max().item()
    print(f"transformers {transformers.__version__}, rope_theta {theta:.0f}: bases in use {bases}; {said}")
    near = {kind: abs(base / (theta if four or kind[0] == "f" else 5e5) - 1) < 1e-3 for kind, base in bases.items()}
    if not all(near.values()) or said:
        sys.exit(1)
print(f"logits off between the releases, by rope_theta: {off}")
sys.exit(0 if four or off[10000.0] > 0.1 and off[500000.0] < 1e-4 else 1)
PY
for version in 4.57.6 5.23.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/olmo3.py" "$work/folders" \
        2> "$work/log" || { tail -20 "$work/log"; exit 1; }
done
