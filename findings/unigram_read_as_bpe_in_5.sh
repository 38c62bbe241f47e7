#!/usr/bin/env bash
# LlamaTokenizer of transformers 5.23.0 cuts texts by BPE although sentencepiece's model is a Unigram one; 4.57.6 made
# the tokenizer that the file says.
#
# Most Llamas have BPE; Unigram is what sentencepiece trains where nothing is said, and such a file beside
# "tokenizer_class": "LlamaTokenizer" is turned into the right kind by 4.57.6, which looks at `model_type` in it.
# Release 5 makes merges of the pieces by their order. Pieces and ids are those of the file, decode(encode(text)) is the
# text, nothing is logged, and the model is fed other cuts than it was trained with. A tokenizer.json that 4.57.6 saved,
# with the Unigram model in it, changes nothing; with "tokenizer_class": "PreTrainedTokenizerFast" beside it, it is read
# as it is.
#
# Seen: of 200 texts more than 180 have other ids than by sentencepiece 0.2.3 in 5.23.0, with and without the
# tokenizer.json of 4.57.6, none in 4.57.6; all come back by decode. Under the other class none has, in both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/unigram.py" <<'PY'
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
folder, saved, named = (Path(sys.argv[1], n) for n in ("given", "saved", "named"))
if not new:
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        model_type="unigram",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def wrong(where):
    """The kind of model, how many of 200 texts have other ids than by sentencepiece, how many do not come back."""
    tokenizer = AutoTokenizer.from_pretrained(where)
    kind = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"]
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts[:200]]
    other = sum(a != pieces.encode(t) for a, t in zip(ids, texts))
    return kind, other, sum(tokenizer.decode(a) != t for a, t in zip(ids, texts))


if not new:
    AutoTokenizer.from_pretrained(folder).save_pretrained(saved)
    named.mkdir()
    (named / "tokenizer.json").write_text((saved / "tokenizer.json").read_text())
    (named / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
given, kept, other = wrong(folder), wrong(saved), wrong(named)
print(
    f"transformers {transformers.__version__}; kind, texts with other ids, texts that do not come back: {given}; with "
    f"4.57.6's tokenizer.json {kept}; that under PreTrainedTokenizerFast {other}"
)
same = ("Unigram", 0, 0)
cut = all(kind == "BPE" and n > 150 and not lost for kind, n, lost in (given, kept))
sys.exit(0 if other == same and (cut if new else given == kept == same) else 1)
PY
for version in 4.57.6 5.23.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "sentencepiece==0.2.3" "protobuf==7.36.2" \
        "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/unigram.py" "$work" 2> "$work/log" || { cat "$work/log"; exit 1; }
done
