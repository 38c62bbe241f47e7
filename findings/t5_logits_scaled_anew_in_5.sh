#!/usr/bin/env bash
# Logits of a tied mT5 are too large by the square root of its width in transformers 5.23.0, and those of an umT5 with a
# head of its own too small by as much. 4.57.6 computes what `tie_word_embeddings` says, and T5 is right in both.
#
# Where the head is the embedding, the T5 family multiplies the last hidden state by d_model ** -0.5. In 5 the switch is
# set to true for every model of the family, whatever config.json says; T5 remembers what it said in another attribute,
# mT5 multiplies never and umT5 always. The order of the words is the same, so greedy texts are equal and tests pass;
# losses, sampling, beams and thresholds are those of a temperature of 1/22.6 or 22.6 for a width of 512. Nothing is
# logged for the tied one, and for the untied one that its head is kept.
#
# Seen, d_model 64: logits of 5.23.0 through those of 4.57.6: tied mT5 8, untied mT5 1, tied umT5 1, untied umT5 0.125,
# T5 1 and 1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/scaled.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForSeq2SeqLM

root = Path(sys.argv[1])
four = transformers.__version__ == "4.57.6"
sizes = dict(
    vocab_size=64, d_model=64, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
    decoder_start_token_id=0,
)  # fmt: skip
ids = torch.arange(3, 19)[None]
ratios = {}
for name in ("t5", "mt5", "umt5"):
    for tied in (True, False):
        folder = root / f"{name}-{tied}"
        if four:
            torch.manual_seed(0)
            model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(name, **sizes, tie_word_embeddings=tied))
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, 1 if parameter.dim() == 1 else 0, 0.1)
            model.save_pretrained(folder)
            said = json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", True)
            assert said == tied
        model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            logits = model.eval()(input_ids=ids, decoder_input_ids=ids[:, :6]).logits
        if four:
            torch.save(logits, folder / "logits.pt")
        right = torch.load(folder / "logits.pt")
        ratios[f"{'tied' if tied else 'untied'} {name}"] = ratio = round((logits.norm() / right.norm()).item(), 3)
        assert torch.allclose(logits, right * ratio, rtol=1e-3, atol=1e-3)
print(f"transformers {transformers.__version__}: logits through those of 4.57.6: {ratios}")
changed = {name: ratio for name, ratio in ratios.items() if ratio != 1}
sys.exit(0 if len(ratios) == 6 and changed == ({} if four else {"tied mt5": 8, "untied umt5": 0.125}) else 1)
PY
for version in 4.57.6 5.23.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/scaled.py" "$work/folders" \
        2> "$work/log" || { tail -20 "$work/log"; exit 1; }
done
