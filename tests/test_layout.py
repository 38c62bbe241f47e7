"""The layout algebra against plain numpy: any pattern, any cut, any block size moves each element once."""

from __future__ import annotations

import itertools
import random
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tool.convert.expanding import expand
from ckpt_tool.convert.layout import Dims, Part, Step, _overlap, apply, parse_dims, rule

NAMES = "abcdefgh"


def dims_of(order: list[str], draw: st.DrawFn) -> Dims:
    """The axes of `order` grouped into dimensions at random places."""
    groups: list[tuple[str, ...]] = []
    for axis in order:
        if groups and draw(st.booleans()):
            groups[-1] += (axis,)
        else:
            groups.append((axis,))
    return tuple(groups)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Up to five axes, each side in an order and grouping of its own, each cut along one axis (perhaps)."""
    count = draw(st.integers(1, 5))
    axes = {NAMES[k]: draw(st.integers(1, 7)) for k in range(count)}
    sides = []
    for side in ("s", "t"):
        order = draw(st.permutations(list(axes)))
        dims = dims_of(list(order), draw)
        axis = draw(st.sampled_from(list(axes)))
        edges = sorted({0, axes[axis], *draw(st.lists(st.integers(0, axes[axis]), max_size=3))})
        sides.append(
            tuple(
                Part(side, f"{side}{k}", "BF16", dims, ((axis, lo, hi),) if len(edges) > 2 else ())
                for k, (lo, hi) in enumerate(zip(edges, edges[1:], strict=False))
            )
        )
    return Step(tuple(axes.items()), sides[0], sides[1])


def split(step: Step, side: tuple[Part, ...], space: np.ndarray) -> list[np.ndarray]:
    """The tensors of one side, cut by plain numpy out of the space (axes in the order of `step.axes`)."""
    names = [a for a, _ in step.axes]
    found = []
    for part in side:
        box = part.box(step.sizes)
        cut = space[tuple(slice(*box[a]) for a in names)]
        found.append(np.ascontiguousarray(cut.transpose([names.index(a) for a in part.order])))
        found[-1] = found[-1].reshape(part.shape(step.sizes))
    return found


def space_of(step: Step) -> np.ndarray:
    shape = [n for _, n in step.axes]
    return np.arange(prod(shape), dtype="<u2").reshape(shape)


@given(steps())
@settings(deadline=None, max_examples=150)
def test_forward_is_what_numpy_says_and_inverse_takes_it_back(step: Step) -> None:
    assert step.defects() == []
    space = space_of(step)
    sources, targets = split(step, step.sources, space), split(step, step.targets, space)
    made = apply(step, sources)
    assert all(np.array_equal(a, b) for a, b in zip(made, targets, strict=True))
    back = apply(step.inverse(), made)
    assert all(np.array_equal(a, b) for a, b in zip(back, sources, strict=True))


@given(steps(), st.integers(2, 200), st.integers(2, 400))
@settings(deadline=None, max_examples=150)
def test_blocks_tile_both_sides_once_whatever_their_size(step: Step, block: int, tile: int) -> None:
    counts = {
        "reads": [np.zeros(prod(p.shape(step.sizes)), dtype=int) for p in step.sources],
        "writes": [np.zeros(prod(p.shape(step.sizes)), dtype=int) for p in step.targets],
    }
    for piece in step.blocks(block, tile):
        for side in counts:
            for access in getattr(piece, side):
                assert access.runs.count * access.runs.length == access.numel
                for offset in access.runs.offsets():
                    counts[side][access.part][offset : offset + access.runs.length] += 1
        if not piece.is_copy:
            assert sum(a.numel for a in piece.reads) * 2 <= max(block, tile, 2)
    assert all((c == 1).all() for side in counts.values() for c in side)


@given(steps(), st.integers(2, 200), st.integers(2, 400))
@settings(deadline=None, max_examples=100)
def test_small_blocks_give_what_large_blocks_give(step: Step, block: int, tile: int) -> None:
    space = space_of(step)
    flat = [x.reshape(-1) for x in split(step, step.sources, space)]
    out = [np.zeros(prod(p.shape(step.sizes)), dtype="<u2") for p in step.targets]
    for piece in step.blocks(block, tile):
        inputs = [
            np.concatenate([flat[a.part][o : o + a.runs.length] for o in a.runs.offsets()])
            for a in piece.reads
        ]
        outputs = [np.zeros(a.numel, dtype="<u2") for a in piece.writes]
        piece.shuffle(inputs, outputs)
        if piece.is_copy:
            assert np.array_equal(inputs[0], outputs[0])
        for access, values in zip(piece.writes, outputs, strict=True):
            for k, o in enumerate(access.runs.offsets()):
                n = access.runs.length
                out[access.part][o : o + n] = values[k * n : (k + 1) * n]
    expected = split(step, step.targets, space)
    assert all(np.array_equal(a, b.reshape(-1)) for a, b in zip(out, expected, strict=True))


@pytest.mark.parametrize(
    ("pattern", "sizes"),
    [
        ("f d -> d f", {"f": 300, "d": 700}),
        ("f d -> d f", {"f": 17, "d": 33}),
        ("(t n h) d -> d (n t h)", {"t": 3, "n": 5, "h": 64, "d": 1100}),
        ("a b c -> c b a", {"a": 129, "b": 6, "c": 513}),
    ],
)
def test_large_transposes_are_exact(pattern: str, sizes: dict[str, int]) -> None:
    left, _, right = pattern.partition("->")
    a, b = parse_dims(left), parse_dims(right)
    step = Step(tuple(sizes.items()), (Part("s", "x", "F32", a),), (Part("t", "y", "F32", b),))
    x = np.arange(prod(sizes.values()), dtype="<u4")
    order = [[n for g in a for n in g].index(n) for g in b for n in g]
    expected = x.reshape([sizes[n] for g in a for n in g]).transpose(order)
    (made,) = apply(step, [x.reshape(step.sources[0].shape(sizes))])
    assert np.array_equal(made, expected.reshape(made.shape))


def test_interleaved_rotary_rows_become_halves() -> None:
    """Row 2i + s of a head goes to row s * half + i: the formula of the Llama conversion."""
    table = [rule("wq", "q", "(n half two) d -> (n two half) d")]
    axes = {"n": 3, "half": 4, "two": 2, "d": 5}
    found = expand(
        table,
        axes=axes,
        indices={},
        original=lambda n: [("a", "BF16")],
        converted=lambda n: ("b", "BF16"),
    )
    (step,) = found.steps
    x = np.arange(24 * 5, dtype="<u2").reshape(24, 5)
    (made,) = apply(step, [x])
    for head in range(3):
        for i in range(4):
            for s in range(2):
                assert np.array_equal(made[head * 8 + s * 4 + i], x[head * 8 + 2 * i + s])


@pytest.mark.parametrize("bad", ["(a b", "a a", "A b", "a (b (c))"])
def test_what_is_not_a_layout_is_refused(bad: str) -> None:
    with pytest.raises(ValueError):
        parse_dims(bad)


def test_parts_that_have_an_element_in_common_are_found_along_any_axis() -> None:
    drawn = random.Random(0)
    found = {True: 0, False: 0}
    for _ in range(600):
        boxes = []
        for _ in range(drawn.randint(1, 4)):
            starts = {axis: drawn.randint(0, 4) for axis in "ab"}
            boxes.append({axis: (lo, lo + drawn.randint(1, 2)) for axis, lo in starts.items()})
        cells = [set(itertools.product(*(range(*span) for span in box.values()))) for box in boxes]
        common = len(set().union(*cells)) != sum(map(len, cells))
        assert _overlap(boxes) == common
        found[common] += 1
    assert min(found.values()) > 100
    assert not _overlap([]) and not _overlap([{}]) and _overlap([{}, {}])  # scalars


def test_overlap_and_holes_are_defects() -> None:
    dims = parse_dims("a")

    def part(lo: int, hi: int) -> Part:
        return Part("s", "x", "F32", dims, (("a", lo, hi),))

    whole = (Part("t", "y", "F32", dims),)
    assert Step((("a", 10),), (part(0, 5), part(5, 10)), whole).defects() == []
    assert Step((("a", 10),), (part(0, 6), part(5, 10)), whole).defects()
    assert Step((("a", 10),), (part(0, 4), part(5, 10)), whole).defects()
