"""The JSON reader accepts what RFC 8259 means and names the field of everything else."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tool.checkpoint import strict_json
from ckpt_tool.errors import CkptToolError, Problem

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text('abc{}[]"\\', max_size=4), inner, max_size=4)
    ),
    max_leaves=20,
)


def refused(data: bytes, **options: Any) -> Problem:
    with pytest.raises(CkptToolError) as caught:
        strict_json.parse_object(data, file="params.json", **options)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].file == "params.json"
    return caught.value.problems[0]


@given(st.dictionaries(st.text(max_size=5), values, max_size=5), st.sampled_from([None, 2]), st.booleans())
def test_reads_what_the_standard_library_writes(
    obj: dict[str, Any], indent: int | None, ascii_only: bool
) -> None:
    try:
        data = json.dumps(obj, indent=indent, ensure_ascii=ascii_only).encode()
    except UnicodeEncodeError:
        return
    if any("\ud800" <= c <= "\udfff" for c in json.dumps(obj, ensure_ascii=False)):
        return
    assert strict_json.parse_object(data, file="x") == obj
    assert strict_json.parse(data, file="x") == obj


@pytest.mark.parametrize(
    ("data", "where", "message"),
    [
        (b"", None, "found nothing"),
        (b" \n", None, "found nothing"),
        (b"dim: 4096", None, "expected a JSON object, found `dim: 4096` at line 1, column 1"),
        (b"[1]", None, "expected a JSON object"),
        (b'\xef\xbb\xbf{"a": 1}', None, "byte order mark"),
        ('{"a": 1}'.encode("utf-16"), None, "UTF-16"),
        ('{"a": 1}'.encode("utf-16-le"), None, "UTF-16"),
        (b'{"a": "\xff"}', None, "found byte 0xff at 7"),
        (b'{"dim": 1, "dim": 2}', "dim", "twice"),
        (b'{"moe": {"n": 1, "n": 2}}', "moe.n", "twice"),
        (b'{"norm_eps": NaN}', "norm_eps", "NaN"),
        (b'{"moe": [0, {"x": -Infinity}]}', "moe[1].x", "-Infinity"),
        (b'{"rope_theta": 1e999}', "rope_theta", "1e999"),
        (b'{"dim": ' + b"9" * 301 + b"}", "dim", "300 digits"),
        (b'{"dim": ' + b"9" * 5000 + b"}", "dim", "300 digits"),
        (b'{"dim": ' + b"1" * 5000 + b".0}", "dim", "finite"),
        (b'{"a": "\\ud800"}', "a", "lone surrogate"),
        (b'{"a": {"\\udc00": 1}}', "a.\udc00", "lone surrogate"),
        (b'{"a": 1} {"b": 2}', None, "the end of the file, found"),
        (b'{"a": 1,}', None, "key"),
        (b'{"a": 1\n "b": 2}', None, "at line 2, column 2"),
        (b'{"a": "x\ny"}', None, "control characters"),
        (b'{"a": "x', None, "the end of a string"),
        (b'{"a": tru}', None, "a value"),
        (b"{'a': 1}", None, "double quotes"),
        (b'{"a": 1', None, "found the end of the file"),
    ],
)
def test_refuses_with_the_field_or_the_position(data: bytes, where: str | None, message: str) -> None:
    problem = refused(data)
    assert problem.kind == "bad-config"
    assert problem.where == where
    assert message in problem.message


def test_surrogate_pairs_are_text() -> None:
    assert strict_json.parse_object(b'{"a": "\\ud83d\\ude00"}', file="x") == {"a": "\U0001f600"}


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"x": "]}",  "y":'])
def test_deep_nesting_is_refused_without_recursion(opening: bytes) -> None:
    assert "levels of nesting" in refused(b'{"a": ' + opening * 100_000).message


def test_depth_64_is_the_last_accepted() -> None:
    def nested(levels: int) -> bytes:
        return b'{"a":' * levels + b"1" + b"}" * levels

    assert strict_json.parse(nested(64), file="x")
    assert strict_json.parse_object(nested(64), file="x")
    for parse in (strict_json.parse, strict_json.parse_object):
        with pytest.raises(CkptToolError, match="64 levels|63 levels"):
            parse(nested(65), file="x")


def test_brackets_in_strings_do_not_count_as_nesting() -> None:
    text = "[{" * 500 + '"\\'
    assert strict_json.parse_object(json.dumps({"a": [text, {"b": text}]}).encode(), file="x")["a"][0] == text


def test_size_is_checked_first() -> None:
    assert "at most" in refused(b" " * (strict_json.MAX_BYTES + 1)).message


def test_the_kind_is_the_callers() -> None:
    assert refused(b"{", kind="bad-index").kind == "bad-index"


PARAMS: dict[str, Any] = {
    "dim": 4096,
    "true": True,
    "float": 32.0,
    "text": "32",
    "zero": 0,
    "huge": 2**62,
    "negative": -1,
    "null": None,
    "eps": 1e-5,
}


@pytest.mark.parametrize(
    "key", ["true", "float", "text", "zero", "huge", "negative", "null", "absent", "eps"]
)
def test_integers_are_integers(key: str) -> None:
    with pytest.raises(CkptToolError) as caught:
        strict_json.integer(PARAMS, key, file="params.json", within="model.")
    problem = caught.value.problems[0]
    assert (problem.kind, problem.file, problem.where) == ("bad-config", "params.json", f"model.{key}")
    if key in PARAMS:
        assert json.dumps(PARAMS[key]) in problem.message


def test_getters_return_the_value() -> None:
    assert strict_json.integer(PARAMS, "dim", file="p") == 4096
    assert strict_json.integer(PARAMS, "text", file="p", text_ok=True) == 32
    assert strict_json.integer(PARAMS, "negative", file="p", minimum=-1) == -1
    assert strict_json.number(PARAMS, "eps", file="p") == 1e-5
    assert strict_json.number(PARAMS, "dim", file="p") == 4096.0
    assert strict_json.number(PARAMS, "zero", file="p", positive=False) == 0
    assert strict_json.string(PARAMS, "text", file="p") == "32"
    assert strict_json.boolean(PARAMS, "true", file="p") is True


@pytest.mark.parametrize("key", ["null", "absent"])
def test_optional_fields_may_be_null_or_absent(key: str) -> None:
    for getter in (strict_json.integer, strict_json.number, strict_json.string, strict_json.boolean):
        assert getter(PARAMS, key, file="p", optional=True) is None


@pytest.mark.parametrize(
    "value", [True, "1e-5", 0, -1.0, math.nan, math.inf, [1], pytest.param(10**400, id="10**400")]
)
def test_numbers_are_finite_and_positive(value: Any) -> None:
    with pytest.raises(CkptToolError, match="a finite number above 0"):
        strict_json.number({"eps": value}, "eps", file="p", optional=True)


@pytest.mark.parametrize("value", ["-1", "+3", " 3", "3.0", "", "٣", "9" * 30])
def test_text_numbers_are_plain_digits(value: str) -> None:
    with pytest.raises(CkptToolError, match="an integer from 1"):
        strict_json.integer({"window": value}, "window", file="p", text_ok=True)


def test_strings_and_booleans_are_not_converted() -> None:
    with pytest.raises(CkptToolError, match="expected a string, found 1"):
        strict_json.string({"a": 1}, "a", file="p")
    with pytest.raises(CkptToolError, match="expected true or false, found 1"):
        strict_json.boolean({"a": 1}, "a", file="p")


@pytest.mark.parametrize("text", ['{"a":[1],"a":null}', '{"a":null,"a":[1]}', '{"a":[],"a":[]}'])
def test_a_list_that_comes_entry_by_entry_comes_once(text: str) -> None:
    def read(data: str) -> list[tuple[str, Any]]:
        return list(strict_json.members(data.encode(), file="f", max_bytes=99, listed=("a",)))

    assert read('{"b":[3],"a":[1,{"a":[2]}]}') == [("b", [3]), ("a[]", 1), ("a[]", {"a": [2]})]
    with pytest.raises(CkptToolError, match="expected each key once, found it twice"):
        read(text)
