#!/usr/bin/env bash
# A Llama 3 tokenizer whose tokenizer_config.json has no `tokenizer_class` gets an `<unk>` behind the last row of the
# embedding, and begins each text with a token that its file does not ask for, in transformers 4.37.2 and 4.57.6. 5.23.0
# reads the file as it is.
#
# Release 4 asks config.json where the class is not said, and `"model_type": "llama"` means LlamaTokenizerFast: the
# class of Llama 1 and 2, with an `<unk>` of its own and a post-processor of its own in the place of the file's. The new
# token gets the next free id, which is the number of rows, so a text with `<unk>` in it (any web page about tokenizers)
# is an index out of range, or another text's row where a table was padded. "tokenizer_class": "PreTrainedTokenizerFast"
# mends it in every release.
#
# Seen: of a file with 258 tokens, of 258 rows: `<unk>` is 258 in 4.37.2 and 4.57.6, and the id of `<|begin_of_text|>`
# is put in front; with the class said, and in 5.23.0 either way, ids are those of tokenizers, without both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/ids.py" <<'PY'
import json
import sys
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig

folder = Path(sys.argv[1])
folder.mkdir()
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
made = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
made.save(str(folder / "tokenizer.json"))
LlamaConfig(vocab_size=258).save_pretrained(folder)
config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
texts = "a word", "see <unk>"
right = [made.encode(text).ids for text in texts]


def read(**more):
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **more}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.convert_tokens_to_ids("<unk>"), [tokenizer(text)["input_ids"] for text in texts]


(unknown, found), (_, said) = read(), read(tokenizer_class="PreTrainedTokenizerFast")
print(f"transformers {transformers.__version__}: <unk> {unknown} of rows 0..257; {found}")
print(f"with its class as tokenizers: {said == right}")
if transformers.__version__[0] == "4":
    seen = unknown == 258 and found == [[256, *right[0]], [256, *made.encode("see ").ids, 258]]
else:
    seen = found == right and unknown is None
sys.exit(0 if seen and said == right else 1)
PY
for version in 5.23.0 4.57.6 4.37.2; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/ids.py" "$work/folder-$version"
done
