#!/usr/bin/env bash
# torch 2.13.0, CPU: in bfloat16 the gradient of a row of nn.Embedding stops growing once its token has come some
# hundreds of times; of 4,096 ones it is 256. Through gather, or a product with one-hot rows, it is 4096.
#
# The gradients of one row are added up in the tensor's own dtype, each rounded; 256 + 1 is 256 in bfloat16 (2048 + 1 is
# 2048 in float16). Tokens that fill texts (padding that is not masked, spaces, newlines) get a fraction of their
# gradient, in proportion to nothing, and all other rows are right, so the loss goes down and a comparison with a
# float32 run fails in a few rows of one matrix. Indexing (`w[ids]`) and EmbeddingBag do the same; matrix products, sums
# and gather add in float32.
#
# Seen: 256 for Embedding, indexing and EmbeddingBag in bfloat16, 2048 in float16, 4096 in float32; 4096 for gather and
# for the product in all three.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6"
"$work/env/bin/python" -W ignore - <<'PY'
import sys

import torch
from torch.nn import functional

ids = torch.zeros(4096, dtype=torch.long)
ways = {
    "Embedding": lambda w: functional.embedding(ids, w),
    "indexing": lambda w: w[ids],
    "EmbeddingBag": lambda w: functional.embedding_bag(ids[None], w, mode="sum"),
    "gather": lambda w: w.gather(0, ids[:, None].expand(-1, 3)),
    "product": lambda w: functional.one_hot(ids, 4).to(w.dtype) @ w,
}
right = True
for dtype, stop in ((torch.bfloat16, 256), (torch.float16, 2048), (torch.float32, 4096)):
    found = {}
    for name, way in ways.items():
        w = torch.zeros(4, 3, dtype=dtype, requires_grad=True)
        way(w).sum().backward()
        found[name] = w.grad[0, 0].item()
    print(f"torch {torch.__version__}, {dtype}: {found}")
    right &= found == {name: 4096 if name in ("gather", "product") else stop for name in ways}
sys.exit(0 if right else 1)
PY
