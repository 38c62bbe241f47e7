#!/usr/bin/env bash
# CanineTokenizer of transformers 5.23.0 gives the second of two texts the token type 0; up to 4.57.6 it gave 1.
#
# CANINE was trained with segments, and question answering is asked as a pair. With the same folder and the same call, a
# model that was right under release 4 reads both texts as one segment under 5. Nothing in the folder decides it.
#
# Seen: token_type_ids of ("ab", "c"): 0 0 0 0 0 0 in 5.23.0, 0 0 0 0 1 1 in 4.57.6; input_ids are equal.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/token_types.py" <<'PY'
import sys

import transformers
from transformers import CanineTokenizer

made = CanineTokenizer()("ab", "c")
print(f"transformers {transformers.__version__}: {made['input_ids']}, types {made['token_type_ids']}")
types = [0] * 6 if transformers.__version__.startswith("5.") else [0, 0, 0, 0, 1, 1]
sys.exit(0 if made["token_type_ids"] == types and made["input_ids"] == [57344, 97, 98, 57345, 99, 57345] else 1)
PY
for version in 5.23.0 4.57.6; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "numpy==2.4.6" "transformers==$version"
    "$work/$version/bin/python" -W ignore "$work/token_types.py" 2> "$work/log" || { cat "$work/log"; exit 1; }
done
