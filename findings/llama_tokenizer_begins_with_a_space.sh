#!/usr/bin/env bash
# A sentencepiece model that says `add_dummy_prefix: false` gets the space in front of every text all the same where
# LlamaTokenizer reads it: transformers 5.23.0, and 4.57.6 by its fast class, without a word.
#
# The file says whether a text begins with a space, and sentencepiece obeys. transformers goes by `add_prefix_space` of
# tokenizer_config.json, true if it is absent, and never looks at the file. The first word of every text becomes another
# id, one that the model knows from the middle of sentences. 4.57.6 with use_fast=False asks sentencepiece, so "slow"
# and "fast" differ. "add_prefix_space": false beside the file puts it right.
#
# Seen: of 200 texts all have other ids than by sentencepiece 0.2.3, none with "add_prefix_space": false; none by 4.57.6
# with use_fast=False; with a model that says true none in any.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/prefix.py" <<'PY'
import io
import json
import random
import sys
from pathlib import Path

import sentencepiece
import transformers
from transformers import AutoTokenizer

transformers.utils.logging.set_verbosity_error()
drawn = random.Random(0)
words = ["".join(drawn.choices("abcdefghij", k=drawn.randint(1, 6))) for _ in range(300)]
texts = [" ".join(drawn.choices(words, k=8)) for _ in range(1000)]
new = transformers.__version__.startswith("5.")
right = True
for prefix in (True, False):
    made = io.BytesIO()
    how = dict(vocab_size=400, model_type="bpe", byte_fallback=True, normalization_rule_name="identity", minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=made, add_dummy_prefix=prefix, hard_vocab_limit=False, **how
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
    folder = Path(sys.argv[1], str(prefix))
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    found = []
    for fast, more in ((True, {}), (False, {}), (True, {"add_prefix_space": prefix})):
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | more))
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=fast)
        ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts[:200]]
        found.append(sum(a != pieces.encode(t) for a, t in zip(ids, texts)))
    print(
        f"transformers {transformers.__version__}, add_dummy_prefix {prefix}: texts with other ids, usual class, "
        f"use_fast=False, with add_prefix_space as the model says: {found}"
    )
    right &= found == ([0, 0, 0] if prefix else [200, 200 if new else 0, 0])
sys.exit(0 if right else 1)
PY
for version in 4.57.6 5.23.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "sentencepiece==0.2.3" "protobuf==7.36.2" \
        "transformers==$version"
    mkdir "$work/files-$version"
    "$work/$version/bin/python" -W ignore "$work/prefix.py" "$work/files-$version" \
        2> "$work/log" || { cat "$work/log"; exit 1; }
done
