"""Rotary frequencies that are stored among the weights, compared with the base that the config says.

They are left out, since a model makes them itself. Releases before transformers 4.32 stored them, and loaded
what was stored: where they are of another base, one of the two is not what the model was trained with.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ckpt_tool.checkpoint.base import DTYPES, Checkpoint, TensorInfo
from ckpt_tool.convert.casting import CASTABLE, cast
from ckpt_tool.convert.manifest import Finding
from ckpt_tool.convert.plan import Plan
from ckpt_tool.convert.plan_checks import ROTARY
from ckpt_tool.errors import CkptToolError

LARGEST, MOST = 1024, 256  # elements of one, and tensors looked at
APART = 0.05  # of the base; bfloat16 moves it by less than 0.02


def stale(checkpoint: Checkpoint, plan: Plan) -> Iterator[Finding]:
    """What is stored of another base than the config's, each tensor that is left out."""
    base = None if plan.turns is None else plan.turns.base
    if base is None or not isinstance(base.value, int | float):
        return
    for tensor in [d.tensor for d in plan.dropped if ROTARY.fullmatch(d.tensor.name)][:MOST]:
        found = base_of(checkpoint, tensor)
        if found is not None and abs(found / base.value - 1) > APART:
            text = (
                f"expected frequencies of base {base.value:g} ({base.source}), which counts, found those of "
                f"{found:.6g}; old releases computed with what is stored"
            )
            yield Finding("stale-frequencies", text, tensor.file, tensor.name, {"base": found})


def base_of(checkpoint: Checkpoint, tensor: TensorInfo) -> float | None:
    """The base b of frequencies b ** (-k / n), k = 0 to n - 1; None for other values."""
    if len(tensor.shape) != 1 or not 2 <= tensor.numel <= LARGEST or tensor.dtype not in CASTABLE:
        return None
    bits = np.empty(tensor.numel, dtype=DTYPES[tensor.dtype].bits)
    try:
        checkpoint.read_into(tensor, 0, bits.view(np.uint8).data)
    except CkptToolError:
        return None  # said when the tensors are read
    values = np.empty(tensor.numel, dtype="<u8")
    cast(bits, tensor.dtype, "F64", values)
    found = values.view("<f8")
    known = np.flatnonzero((found > 1e-3) & (found < 1))
    if not known.size or not np.isfinite(found).all():
        return None
    k = int(known[-1])  # the smallest that float16 still holds well tells the base best
    base = float(found[k]) ** (-tensor.numel / k) if k else None
    return base if base is not None and 1 < base < 1e12 else None
