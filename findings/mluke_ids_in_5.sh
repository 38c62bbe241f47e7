#!/usr/bin/env bash
# MLukeTokenizer of transformers 5.23.0 takes the ids of sentencepiece.bpe.model as they stand, each one less than those
# the model was trained with; 4.57.6 moved them. With a tokenizer.json beside it ids are right, and what the vocabulary
# does not know becomes `<s>`.
#
# mLUKE has XLM-R's vocabulary, in which fairseq put `<s>`, `<pad>`, `</s>`, `<unk>` first and everything else one
# place later than sentencepiece has it. Release 5 builds its tokenizer from the pieces of the file without that step.
# It loads, decodes what it encodes, and feeds the model the neighbour of each word; no warning. A file of `tokenizers`
# with the right order helps, but its `unk_id` is not taken over: the first piece stands for the unknown.
#
# Seen: of `a ☃ b` 4.57.6 makes five ids, the middle one 3, `<unk>`; 5.23.0 has each known one less, and with
# tokenizer.json the same ids as 4.57.6 but for a 0 in the place of that 3.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/ids.py" <<'PY'
import json
import logging
import sys
from pathlib import Path

import sentencepiece
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import MLukeTokenizer

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
work, release = Path(sys.argv[1]), int(transformers.__version__[0])
model, found = work / "sentencepiece.bpe.model", work.with_name("ids.json")
if release == 4:
    work.mkdir()
    text = work.with_name("text.txt")
    text.write_text("a b c d ab cd abcd\n" * 50)
    stem = str(work.with_name("m"))
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=stem, vocab_size=12, minloglevel=2)
    Path(f"{stem}.model").rename(model)
    (work / "entity_vocab.json").write_text(json.dumps({"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "[MASK2]": 3}))
    (work / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MLukeTokenizer"}))
    (work / "config.json").write_text(json.dumps({"model_type": "luke"}))


def inner():
    return MLukeTokenizer.from_pretrained(work)("a ☃ b", add_special_tokens=False).input_ids


ids = inner()
if release == 4:
    found.write_text(json.dumps(ids))
    print(f"transformers {transformers.__version__}: {ids}")
    sys.exit(0 if ids.count(3) == 1 else 1)
before = json.loads(found.read_text())
pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
later = [(pieces.id_to_piece(k), pieces.get_score(k)) for k in range(3, pieces.get_piece_size())]
vocabulary = [(w, 0.0) for w in ("<s>", "<pad>", "</s>", "<unk>")] + later
made = Tokenizer(models.Unigram([*vocabulary, ("<mask>", 0.0)], unk_id=3))
made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
made.save(str(work / "tokenizer.json"))
beside = inner()
print(f"transformers {transformers.__version__}: {ids}, with tokenizer.json {beside}; logged: {said}")
less = all(x == (0 if y == 3 else y - 1) for x, y in zip(ids, before, strict=True))
first = all(x == (0 if y == 3 else y) for x, y in zip(beside, before, strict=True))
sys.exit(0 if less and first and not said else 1)
PY
for version in 4.57.6 5.23.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "transformers==$version" "sentencepiece==0.2.3" "protobuf==7.36.2"
    "$work/$version/bin/python" -W ignore "$work/ids.py" "$work/tokenizer"
done
