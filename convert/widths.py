"""Which floating types hold the values of which others: apart from casting.py, for plans need no numpy."""

from __future__ import annotations

from collections.abc import Iterable

from ckpt_tool.checkpoint.base import DTYPES

CASTABLE = ("F64", "F32", "F16", "BF16")
# pairs of (narrow, wide), where the second holds every value of the first
WIDER = {("BF16", "F32"), ("BF16", "F64"), ("F16", "F32"), ("F16", "F64"), ("F32", "F64")}
DTYPE_KEYS = ("torch_dtype", "dtype")  # of config.json, before and since transformers 4.56
ALIASES = {"half": "float16", "float": "float32", "double": "float64"}  # torch's own
NAMES_OF_DTYPES = {*(d.torch for d in DTYPES.values()), *ALIASES}


def rounds(source: str, target: str) -> bool:
    """Whether a cast between the two may lose something."""
    return source != target and (source, target) not in WIDER


def common(dtypes: Iterable[str]) -> str:
    """The narrowest dtype that holds every value of all of `dtypes`; the first of them where none does, which
    is so for types that nothing is cast to."""
    found = list(dict.fromkeys(dtypes))
    holding = (c for c in (*found, *reversed(CASTABLE)) if not any(rounds(f, c) for f in found))
    return next(holding, found[0])
