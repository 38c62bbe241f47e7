"""Merkle trees over a list of leaves, as Certificate Transparency hashes them (RFC 9162, section 2.1.1):
SHA-256 of 0x00 and the leaf, of 0x01 and the two halves, of which the left one is the largest power of two
smaller than the whole. A root stands for every leaf and their order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def root(leaves: Sequence[bytes]) -> str:
    """The root as hexadecimal digits; of no leaves it is SHA-256 of nothing."""
    if not leaves:
        return hashlib.sha256().hexdigest()
    level = [hashlib.sha256(b"\0" + leaf).digest() for leaf in leaves]
    # Pairing neighbours and letting an odd one rise gives the same tree as cutting at powers of two.
    while len(level) > 1:
        pairs = zip(level[::2], level[1::2], strict=False)
        odd = level[-1:] if len(level) % 2 else []
        level = [hashlib.sha256(b"\1" + a + b).digest() for a, b in pairs] + odd
    return level[0].hex()
