"""Rows that the Hugging Face layout repeats: copied one way, compared and left out the other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tool.convert.copies import apart, in_words, joined, with_copies
from ckpt_tool.convert.expanding import expand
from ckpt_tool.convert.layout import COPIED, Part, Step, apply, rule


@st.composite
def longer(draw: st.DrawFn) -> tuple[Step, int, list[int]]:
    """A table of `held` rows to be followed by copies of some of them; ranks may share out its rows or its
    columns, and the target may have its axes in another order."""
    held, width = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    rows = draw(st.lists(st.integers(0, held - 1), min_size=1, max_size=3))
    cut = draw(st.sampled_from([0, width]))
    edges = sorted({0, width, draw(st.integers(0, cut))})
    parts = tuple(
        Part(f"rank{k}", "words", "F32", (("v",), ("d",)), (("d", lo, hi),))
        for k, (lo, hi) in enumerate(zip(edges, edges[1:], strict=False))
    )
    dims = draw(st.sampled_from([(("v",), ("d",)), (("d",), ("v",)), (("d", "v"),)]))
    return Step((("v", held), ("d", width)), parts, (Part("hf", "table", "F32", dims),)), held, rows


def tables(step: Step, held: int) -> tuple[np.ndarray, list[np.ndarray]]:
    whole = np.arange(held * step.sizes["d"], dtype="<u4").reshape(held, -1)
    return whole, [whole[:, p.box(step.sizes)["d"][0] : p.box(step.sizes)["d"][1]] for p in step.sources]


@given(longer())
@settings(deadline=None, max_examples=150)
def test_copies_follow_the_rows_that_are_the_sources_own(drawn: tuple[Step, int, list[int]]) -> None:
    step, held, rows = drawn
    whole, arrays = tables(step, held)
    made = with_copies(step, "v", held, rows)
    assert made.defects() == []
    assert {p.shape(made.sizes) for p in made.sources} == {p.shape(step.sizes) for p in step.sources}
    times = len(made.sources) // len(step.sources)
    (table,) = apply(made, arrays * times)
    wanted = np.concatenate([whole, whole[rows]])
    order = [made.targets[0].order.index(a) for a in "vd"]
    box = made.targets[0].box(made.sizes)
    shaped = table.reshape([box[a][1] for a in made.targets[0].order]).transpose(order)
    assert np.array_equal(shaped, wanted)


@given(longer())
@settings(deadline=None, max_examples=150)
def test_the_way_back_has_the_own_rows_and_each_copy_beside(drawn: tuple[Step, int, list[int]]) -> None:
    step, held, rows = drawn
    whole, arrays = tables(step, held)
    made = with_copies(step, "v", held, rows)
    (table,) = apply(made, arrays * (1 + len(rows)))
    own, *copies = apart(made)
    assert len(copies) == len(rows) and all(c.copied for c in copies)
    back = own.inverse()
    assert back.compare == "" and back.defects() == []
    for got, there in zip(apply(back, [table]), arrays, strict=True):
        assert np.array_equal(got, there)
    for copy, row in zip(copies, rows, strict=True):
        compared = copy.inverse()
        assert compared.compare == COPIED and compared.defects() == []
        assert compared.inverse() == copy
        for part, got, there in zip(compared.targets, apply(compared, [table]), arrays, strict=True):
            assert part.shape(compared.sizes) == there.shape
            assert np.array_equal(got[row], there[row])
    assert list(apart(made, compared=False)) == [own]


@given(longer())
@settings(deadline=None, max_examples=100)
def test_what_was_taken_apart_is_joined_again(drawn: tuple[Step, int, list[int]]) -> None:
    step, held, rows = drawn
    made = with_copies(step, "v", held, rows)
    (whole,) = joined([s.inverse().inverse() for s in apart(made)])
    assert replace(whole, copied=False, hint="") == made
    assert joined([step]) == [step] == list(apart(step))


def test_a_step_without_the_axis_stays_as_it_is() -> None:
    step = Step((("d", 3),), (Part("a", "x", "F32", (("d",),)),), (Part("b", "y", "F32", (("d",),)),))
    assert with_copies(step, "v", 5, [1]) is step
    assert with_copies(step, "d", 3, []) is step
    assert in_words(step) == ""


def test_copies_are_told_in_words_both_ways() -> None:
    part = Part("a", "x", "F32", (("v",), ("d",)))
    made = with_copies(Step((("v", 5), ("d", 2)), (part,), (part,)), "v", 5, [3, 0])
    assert in_words(made) == "row 5 a copy of row 3, row 6 a copy of row 0"
    own, first, second = apart(made)
    assert in_words(own.inverse()) == ""
    assert in_words(first.inverse()) == "compared: row 5 a copy of row 3"
    assert in_words(second.inverse()) == "compared: row 6 a copy of row 0"


def test_a_copied_row_of_a_table_compares_on_the_way_back() -> None:
    rows = (rule("q", "query", "d"), rule("q", "second", "d", copied=True))
    filled = expand(
        rows, axes={"d": 3}, indices={}, original=lambda _: [("a", "F32")], converted=lambda _: ("b", "F32")
    )
    assert [s.compare for s in filled.steps] == ["", ""]
    assert [s.inverse().compare for s in filled.steps] == ["", COPIED]
    assert in_words(filled.steps[1]) == "a copy"
    assert in_words(filled.steps[1].inverse()) == "compared: a copy"
