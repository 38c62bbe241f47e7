"""zlib's CRC-32 and inflate, from zlib-ng where that is installed: the same results, the checksum ten times
as fast on processors that multiply without carry (4 against 50 GB/s), inflate 1.3 times."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from importlib import import_module
from typing import Any


def _module() -> Any:
    try:
        return import_module("zlib_ng.zlib_ng")
    except ImportError:
        return zlib


_zlib = _module()
crc32: Callable[..., int] = _zlib.crc32  # (data, crc of what comes before it = 0)
decompressobj: Callable[[int], Any] = _zlib.decompressobj
InflateError: type[Exception] = _zlib.error
