"""Merkle trees over a list of leaves, as Certificate Transparency hashes them (RFC 9162, section 2.1.1):
SHA-256 of 0x00 and the leaf, of 0x01 and the two halves, of which the left one is the largest power of two
smaller than the whole. A root stands for every leaf and their order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


class Tree:
    """Leaves that are added one after the other. Of those before only the roots of whole subtrees are held,
    from the largest to the smallest: no more than there are digits in their number."""

    def __init__(self) -> None:
        self.leaves = 0
        self._whole: list[bytes] = []

    def add(self, leaf: bytes) -> None:
        node, at = hashlib.sha256(b"\0" + leaf).digest(), self.leaves
        while at & 1:  # as in an addition, two subtrees of one size make one of the next
            node = hashlib.sha256(b"\1" + self._whole.pop() + node).digest()
            at >>= 1
        self._whole.append(node)
        self.leaves += 1

    def root(self) -> str:
        """The root as hexadecimal digits; of no leaves it is SHA-256 of nothing."""
        if not self._whole:
            return hashlib.sha256().hexdigest()
        *others, node = self._whole
        for larger in reversed(others):
            node = hashlib.sha256(b"\1" + larger + node).digest()
        return node.hex()


def root(leaves: Iterable[bytes]) -> str:
    """That of the leaves in their order."""
    tree = Tree()
    for leaf in leaves:
        tree.add(leaf)
    return tree.root()
