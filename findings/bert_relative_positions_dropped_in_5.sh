#!/usr/bin/env bash
# transformers 5.23.0 has no relative positions in BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA and ERNIE any more: a
# model whose config.json says `"position_embedding_type": "relative_key"` (or "relative_key_query") is loaded and
# computes with absolute ones instead.
#
# Such a model was trained without adding the position to a word, and with a table of distances in each layer. In 5 the
# key of config.json is kept and read by nobody; the tables are listed as UNEXPECTED, "can be ignored when loading from
# different task/architecture", and the table of absolute positions, which 4.57.6 makes and saves but never uses, is
# added to each word: random numbers. No key is missing, so a check for missing keys passes.
#
# Seen: for six families and both kinds, one unexpected key a layer (`distance_embedding.weight`) and none missing;
# logits off from 4.57.6 by 0.15 to 0.5 of up to 6.3, and by less than 1e-4 for "absolute".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/positions.py" <<'PY'
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForMaskedLM

root = Path(sys.argv[1])
four = transformers.__version__ == "4.57.6"
sizes = dict(
    vocab_size=64, hidden_size=32, embedding_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
)  # fmt: skip
ids = torch.arange(3, 35)[None]
good = True
for name in ("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie"):
    seen = {}
    for kind in ("absolute", "relative_key", "relative_key_query"):
        folder = root / f"{name}-{kind}"
        if four:
            torch.manual_seed(0)
            config = AutoConfig.for_model(name, **sizes, position_embedding_type=kind)
            model = AutoModelForMaskedLM.from_config(config)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, 1 if parameter.dim() == 1 else 0, 0.3)
            model.save_pretrained(folder)
        model, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
        with torch.no_grad():
            logits = model.eval()(ids).logits
        if four:
            torch.save(logits, folder / "logits.pt")
        right = torch.load(folder / "logits.pt")
        tables = [key for key in info["unexpected_keys"] if key.endswith("distance_embedding.weight")]
        off, plain = (logits - right).abs().max().item(), four or kind == "absolute"
        seen[kind] = len(tables), round(off, 4), round(right.abs().max().item(), 1)
        good &= not info["missing_keys"] and len(tables) == len(info["unexpected_keys"]) == (0 if plain else 2)
        good &= off < 1e-4 if plain else off > 0.05
    print(f"transformers {transformers.__version__}, {name}: unexpected tables, logits off, largest logit: {seen}")
sys.exit(0 if good else 1)
PY
for version in 4.57.6 5.23.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/positions.py" "$work/folders" \
        2> "$work/log" || { tail -20 "$work/log"; exit 1; }
done
