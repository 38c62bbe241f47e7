#!/usr/bin/env bash
# The id of an added token cannot be said if it leaves a gap: tokenizers 0.23.3 (transformers 5.23.0) and 0.22.2 (4.57.6)
# number it by the next free id, whatever any file says, without a warning.
#
# added_tokens.json, `added_tokens` of tokenizer.json and `added_tokens_decoder` of tokenizer_config.json each give a
# number beside the token, and models whose embedding has unused rows between the vocabulary and the added tokens rely
# on it (a [PAD] at row 300 of a table whose vocabulary ends at 255). All three are read for the names alone, so the
# model looks up row 256, which was never trained. Filling the gap with tokens of no use is the way that works.
#
# Seen: [PAD] with the id 300 beside a vocabulary of 256 tokens is 256 by each of the three files, in both releases;
# with 44 tokens before it, 300.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/ids.py" <<'PY'
import json
import logging
import sys
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers.tokenization_utils_base").addHandler(handler)
folder = Path(sys.argv[1])
folder.mkdir()
bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
made = Tokenizer(models.BPE({c: i for i, c in enumerate(bytes_)}, []))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.save(str(folder / "tokenizer.json"))
config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
(folder / "tokenizer_config.json").write_text(json.dumps(config))


def pad():
    return AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("[PAD]")


(folder / "added_tokens.json").write_text(json.dumps({"[PAD]": 300}))
beside = pad()
(folder / "added_tokens.json").unlink()
document = json.loads((folder / "tokenizer.json").read_text())
token = dict(id=300, content="[PAD]", special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
(folder / "tokenizer.json").write_text(json.dumps({**document, "added_tokens": [token]}))
inside = pad()
fill = [{**token, "id": 256 + k, "content": f"[unused{k}]"} for k in range(44)]
(folder / "tokenizer.json").write_text(json.dumps({**document, "added_tokens": [*fill, token]}))
filled = pad()
(folder / "tokenizer.json").write_text(json.dumps(document))
token.pop("id")
decoder = {"added_tokens_decoder": {"300": token}}
(folder / "tokenizer_config.json").write_text(json.dumps({**config, **decoder}))
decoded = pad()
print(
    f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}: [PAD] said to be 300 is "
    f"{beside} by added_tokens.json, {inside} by tokenizer.json, {decoded} by added_tokens_decoder, {filled} after 44 more; warnings {said}"
)
sys.exit(0 if beside == inside == decoded == 256 and filled == 300 and not said else 1)
PY
for version in 5.23.0 4.57.6; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/ids.py" "$work/tokenizer-$version"
done
