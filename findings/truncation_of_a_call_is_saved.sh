#!/usr/bin/env bash
# What a call of a tokenizer was asked for (truncation, padding) stays in it, and save_pretrained of transformers 4.57.6
# and 5.23.0 writes it into tokenizer.json.
#
# transformers sets both anew with each call and never notices. Everything else that reads the file does as it says:
# `tokenizers` by itself (0.22.2, 0.23.3), and the servers and browsers that are built on it, cut every text at the
# length of the last batch before the save, and pad the short ones. Two saves of one tokenizer, before and after some
# training, differ in their files.
#
# Seen: after one call with truncation=True, max_length=3, padding="max_length" the saved file gives 3 ids for 6 words
# and for 1 by tokenizers, and 6 and 1 by AutoTokenizer; saved without that call, 6 and 1 by both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/saved.py" <<'PY'
import sys
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

transformers.utils.logging.set_verbosity_error()
words = {w: i for i, w in enumerate("[UNK] a b c d e f".split())}
found = {}
for called in (False, True):
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[UNK]")
    if called:
        tokenizer("a b c d e f", truncation=True, max_length=3, padding="max_length")
    folder = Path(sys.argv[1], str(called))
    tokenizer.save_pretrained(folder)
    alone = Tokenizer.from_file(str(folder / "tokenizer.json"))
    again = AutoTokenizer.from_pretrained(folder)
    texts = "a b c d e f", "a"
    found[called] = [len(again(t)["input_ids"]) for t in texts], [len(alone.encode(t).ids) for t in texts]
print(
    f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}: lengths by AutoTokenizer and tokenizers, "
    f"saved without a call {found[False]}, after one {found[True]}"
)
sys.exit(0 if found == {False: ([6, 1], [6, 1]), True: ([6, 1], [3, 3])} else 1)
PY
for version in 4.57.6 5.23.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/saved.py" "$work/files-$version" \
        2> "$work/log" || { cat "$work/log"; exit 1; }
done
