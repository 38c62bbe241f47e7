#!/usr/bin/env bash
# tiktoken 0.14.0 keeps a copy of every tokenizer file it reads, local ones too, under a name made of the path alone: a
# file that is replaced is read as it was before, in later processes as well. So does what goes through it: transformers
# 5.23.0 makes the tokenizer of a corrected tokenizer.model with the tokens of the old one.
#
# load_tiktoken_bpe takes a path or an address, and the copy is meant for addresses. Converting each checkpoint of a
# run, or each download, under one path (./model/tokenizer.model, a folder of CI, a mount in a container) gives all of
# them the vocabulary of the first, for as long as the temporary folder lives. Sizes fit where only tokens were
# exchanged, and nothing is said. TIKTOKEN_CACHE_DIR="" in the environment turns the copies off, and expected_hash,
# given the digest of the new file, passes the old copy over.
#
# Seen: a file with the token "ab" is replaced by one with "cd"; a new process reads "ab" from it, and AutoTokenizer
# cuts "abcd" into "ab", "c", "d"; with TIKTOKEN_CACHE_DIR="" both have "cd".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "tiktoken==0.14.0" "transformers==5.23.0" "numpy==2.4.6"
mkdir "$work/model" "$work/tmp"
cat > "$work/model/tokenizer_config.json" <<'JSON'
{"tokenizer_class": "PreTrainedTokenizerFast"}
JSON
cat > "$work/place.py" <<'PY'
import base64
import sys

tokens = [bytes([i]) for i in range(256)] + [sys.argv[2].encode()]
with open(sys.argv[1], "wb") as file:
    for rank, token in enumerate(tokens):
        file.write(base64.b64encode(token) + f" {rank}\n".encode())
PY
cat > "$work/cut.py" <<'PY'
import sys

import tiktoken
import transformers
from tiktoken.load import load_tiktoken_bpe
from transformers import AutoTokenizer

transformers.logging.set_verbosity_error()
ranks = load_tiktoken_bpe(sys.argv[1])
read = max(ranks, key=ranks.get).decode()
cut = AutoTokenizer.from_pretrained(sys.argv[1].rpartition("/")[0]).tokenize("abcd")
print(f"tiktoken {tiktoken.__version__}: last token {read!r}; transformers {transformers.__version__} cuts 'abcd' into {cut}")
sys.exit(0 if (read, cut) == (sys.argv[2], sys.argv[3].split()) else 1)
PY
export TMPDIR="$work/tmp"
file="$work/model/tokenizer.model"
unset TIKTOKEN_CACHE_DIR DATA_GYM_CACHE_DIR
"$work/env/bin/python" "$work/place.py" "$file" ab
"$work/env/bin/python" -W ignore "$work/cut.py" "$file" ab "ab c d"
"$work/env/bin/python" "$work/place.py" "$file" cd
echo "the file is replaced"
"$work/env/bin/python" -W ignore "$work/cut.py" "$file" ab "ab c d"
TIKTOKEN_CACHE_DIR="" "$work/env/bin/python" -W ignore "$work/cut.py" "$file" cd "a b cd"
