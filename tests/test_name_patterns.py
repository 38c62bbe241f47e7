"""Patterns of names, which are matched as `re.match` does it, in a bounded time."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tool.convert.name_patterns import matches, parsed

PARTS = (
    "a",
    "b",
    r"\.",
    ".",
    ".*",
    ".+",
    r"\d",
    r"\d+",
    "[ab]*",
    "[0-9a]+",
    "(ab|b|a\\.)",
    "(?:a|)",
    "_",
    "-",
)


@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=6), st.text("ab.1_-", max_size=8), st.booleans())
def test_it_finds_what_a_regular_expression_finds(parts: list[str], name: str, ends: bool) -> None:
    pattern = "".join(parts) + "$" * ends
    found = parsed(pattern)
    assert found is not None or "|)" in pattern, pattern
    if found is not None:
        assert matches(found, name) == (re.match(pattern, name) is not None)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|(b))", "a{3}", "a++", "(?=a)", "a*", r"\w+", "a?", "", "x" * 501]
)
def test_other_patterns_are_not_read(pattern: str) -> None:
    assert parsed(pattern) is None


def test_many_parts_that_match_anything_are_soon_done() -> None:
    found = parsed(".*" * 200 + "x$")
    assert found is not None and not matches(found, "a" * 512)
