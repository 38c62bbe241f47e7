#!/usr/bin/env bash
# Where chat_template.jinja and tokenizer_config.json hold different templates, transformers 4.57.6 and 5.23.0 take the
# file, without a word.
#
# tokenizer_config.json is where templates have been since 2023 and where people go on correcting them; newer releases
# write the file beside it, once and for all. In a folder that was saved by a new release and edited by hand, or that a
# converter wrote `chat_template` into, the value in tokenizer_config.json is dead: prompts are those of the file, and
# save_pretrained removes the other.
#
# Seen: with both, the file's template in both releases, nothing logged, and no chat_template in the
# tokenizer_config.json that is saved again; without the file, the template of tokenizer_config.json.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/template.py" <<'PY'
import json
import logging
import sys
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
folder = Path(sys.argv[1])
folder.mkdir()
Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "chat_template": "from the config"}
(folder / "tokenizer_config.json").write_text(json.dumps(config))


def prompt():
    return AutoTokenizer.from_pretrained(folder).apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)


alone = prompt()
said.clear()
(folder / "chat_template.jinja").write_text("from the file")
both = prompt()
AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "again")
kept = "chat_template" in json.loads((folder / "again" / "tokenizer_config.json").read_text())
print(
    f"transformers {transformers.__version__}: {alone!r} alone, {both!r} with the file; logged: {said}; "
    f"in the config that is saved again: {kept}"
)
sys.exit(0 if (alone, both) == ("from the config", "from the file") and not said and not kept else 1)
PY
for version in 5.23.0 4.57.6; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "transformers==$version" "jinja2==3.1.6"
    "$work/$version/bin/python" -W ignore "$work/template.py" "$work/folder-$version"
done
