"""Checksums of pieces, against zlib's checksum of the whole."""

import random
import threading
import zlib

from hypothesis import given
from hypothesis import strategies as st

from ckpt_tool.checkpoint.crc32 import IntervalCrc, combine


@given(st.binary(max_size=300), st.binary(max_size=3000))
def test_combine_equals_the_checksum_of_both(a: bytes, b: bytes) -> None:
    assert combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


def test_combine_reaches_lengths_that_no_test_can_hold() -> None:
    """A terabyte of zeros, once doubled from a kilobyte and once in one step from two unequal parts."""
    crc, length = zlib.crc32(bytes(1024)), 1024
    while length < 1 << 40:
        crc, length = combine(crc, crc, length), 2 * length
    odd = 12_345
    head = zlib.crc32(bytes(odd))
    whole = combine(head, crc, length)
    assert whole == combine(crc, head, odd)


@given(st.data(), st.binary(min_size=1, max_size=400))
def test_intervals_in_any_order_give_the_whole(data: st.DataObject, content: bytes) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(content)), max_size=12)))
    edges = [0, *cuts, len(content)]
    pieces = list(zip(edges, edges[1:], strict=False))
    collector = IntervalCrc()
    for start, stop in data.draw(st.permutations(pieces)):
        collector.add(start, stop - start, zlib.crc32(content[start:stop]))
    assert collector.value(len(content)) == zlib.crc32(content)
    assert collector.value(len(content) + 1) is None


@given(st.data())
def test_a_hole_or_an_overlap_gives_no_checksum(data: st.DataObject) -> None:
    content = bytes(range(60))
    pieces = [(start, start + 10) for start in range(0, 60, 10)]
    if data.draw(st.booleans()):
        pieces.remove(data.draw(st.sampled_from(pieces)))
    else:
        start = data.draw(st.integers(0, 58))
        pieces.append((start, data.draw(st.integers(start + 1, 60))))
    collector = IntervalCrc()
    for start, stop in data.draw(st.permutations(pieces)):
        collector.add(start, stop - start, zlib.crc32(content[start:stop]))
    assert collector.value(60) is None


def test_nothing_at_all_has_the_checksum_of_nothing() -> None:
    collector = IntervalCrc()
    collector.add(7, 0, 0)
    assert collector.value(0) == 0
    assert collector.value(1) is None


def test_threads_may_add_at_once() -> None:
    content = random.Random(5).randbytes(64 * 1000)
    collector = IntervalCrc()

    def work(first: int) -> None:
        for block in range(first, 1000, 4):
            collector.add(64 * block, 64, zlib.crc32(content[64 * block : 64 * block + 64]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert collector.value(len(content)) == zlib.crc32(content)


def test_holes_are_what_did_not_come() -> None:
    collector = IntervalCrc()
    assert collector.holes(10) == [(0, 10)]
    for at, count in ((4, 2), (6, 1), (8, 1)):
        collector.add(at, count, zlib.crc32(bytes(count)))
    assert collector.holes(10) == [(0, 4), (7, 1), (9, 1)]
    assert collector.holes(8) is None  # more came than there are
    for at, count in ((0, 4), (7, 1), (9, 1)):
        collector.add(at, count, zlib.crc32(bytes(count)))
    assert collector.holes(10) == []
    assert collector.value(10) == zlib.crc32(bytes(10))
    collector.add(0, 4, 0)
    assert collector.holes(10) is None
