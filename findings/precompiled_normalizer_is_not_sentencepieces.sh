#!/usr/bin/env bash
# tokenizers (0.22.2, 0.23.3) normalizes by the table of a sentencepiece model, and does not compose what sentencepiece
# (0.2.3) composes from that table; of two accents on a letter it drops the second.
#
# nmt_nfkc, the rule that sentencepiece trains with where nothing is said, is a table of replacements in the .model
# file, and tokenizer.json has it byte for byte under "Precompiled". sentencepiece replaces the longest text that the
# table has, from left to right. tokenizers looks up each grapheme of up to five bytes as a whole, takes an entry that
# is only its beginning for all of it, and looks at single characters in the longer ones. Text in decomposed form (file
# names of macOS, some PDF readers), Korean jamo, voiced kana with a mark of their own and half-width kana so have other
# ids in the "fast" tokenizer than the model was trained with, and ASCII tests or composed text show nothing. Compose
# (NFC, or NFKC) first.
#
# Seen: e + acute becomes one letter in both; e + acute + circumflex is e-acute + circumflex in sentencepiece and
# e-acute alone in tokenizers; hiragana ka + voicing mark, jamo of one syllable and half-width ka + mark are one
# character in sentencepiece and as many as before in tokenizers; so are all 11,172 Korean syllables in decomposed form
# (NFD).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/composed.py" <<'PY'
import io
import random
import sys
import unicodedata

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers.normalizers import Precompiled

chosen = random.Random(0)
words = ["".join(chosen.choices("abcdefghijkl", k=chosen.randint(2, 6))) for _ in range(300)]
lines = [" ".join(chosen.choices(words, k=12)) for _ in range(400)]
model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=model, vocab_size=200, minloglevel=2, normalization_rule_name="nmt_nfkc"
)
table = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue()).normalizer_spec.precompiled_charsmap
original = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
fast = Precompiled(table)
expected = {
    "e\u0301": ("\u00e9", "\u00e9"),
    "e\u0301\u0302": ("\u00e9\u0302", "\u00e9"),
    "\u304b\u3099": ("\u304c", "\u304b\u3099"),
    "\u1112\u1161\u11ab": ("\ud55c", "\u1112\u1161\u11ab"),
    "\uff76\uff9e": ("\u30ac", "\u30ab\u3099"),
}
good = True
for text, (theirs, ours) in expected.items():
    found = original.normalize(text).removeprefix("\u2581"), fast.normalize_str(text)
    print(f"{ascii(text)}: sentencepiece {ascii(found[0])}, tokenizers {tokenizers.__version__} {ascii(found[1])}")
    good &= found == (theirs, ours)
syllables = [unicodedata.normalize("NFD", chr(code)) for code in range(0xAC00, 0xD7A4)]
apart = sum(original.normalize(text).removeprefix("\u2581") != fast.normalize_str(text) for text in syllables)
print(f"{apart} of {len(syllables)} Korean syllables in NFD differ")
sys.exit(0 if good and apart == len(syllables) == 11172 else 1)
PY
for version in 0.22.2 0.23.3; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "tokenizers==$version" "sentencepiece==0.2.3" protobuf
    "$work/$version/bin/python" "$work/composed.py"
done
