#!/usr/bin/env bash
# safetensors 0.8.0 writes the entries of `__metadata__` in an order that changes from call to call: equal saves,
# unequal bytes.
#
# Tensors are sorted (by dtype, then by name), so files with one entry, {"format": "pt"}, are reproducible, and a digest
# of the file looks like a name for the weights. With a second entry it is none: the header holds the entries as a hash
# map gives them, anew in each call. Caches by digest, signed releases and builds that are checked by repeating them
# fail now and then, the more often the more entries there are. Compare the tensors, or write one entry.
#
# Seen: of 12 saves of one tensor with four entries several digests, of 12 with one entry one; the tensors' part is
# equal.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "numpy==2.4.6" "safetensors==0.8.0"
"$work/env/bin/python" - <<'PY'
import hashlib
import sys

import numpy as np
import safetensors
from safetensors.numpy import save

tensors = {"w": np.ones(2, np.float32)}
notes = {"format": "pt", "step": "1000", "base": "llama", "seed": "0"}
digests, bodies = {}, set()
for count in (1, 4):
    files = [save(tensors, metadata=dict(list(notes.items())[:count])) for _ in range(12)]
    digests[count] = {hashlib.sha256(f).hexdigest()[:8] for f in files}
    bodies |= {f[8 + int.from_bytes(f[:8], "little") :] for f in files}
    print(f"safetensors {safetensors.__version__}, entries: {count}; digests of 12 saves: {sorted(digests[count])}")
sys.exit(0 if len(digests[1]) == 1 and len(digests[4]) > 1 and len(bodies) == 1 else 1)
PY
