"""The numbers of a model are read back from what was written: params.json, config.json, params.json, at any
numbers that a published file could hold. Headers only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tool.checkpoint.base import Checkpoint, Document, TensorFile, TensorInfo
from ckpt_tool.convert.families import family
from ckpt_tool.convert.families.llama import width_of
from ckpt_tool.convert.plan import Options, Plan
from ckpt_tool.fixtures.llama import Llama
from ckpt_tool.fixtures.mistral import Mistral
from ckpt_tool.fixtures.mixtral import Mixtral

Header = tuple[str, str, tuple[int, ...]]


class Headers(TensorFile):
    def __init__(self, name: str, rows: list[Header]) -> None:
        self.name, self.path, self.format, self.metadata = name, Path(name), "torch-zip", {}
        self.tensors = {n: TensorInfo(n, d, s, name) for n, d, s in rows}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        raise AssertionError(f"planning read the data of {name}")

    def extent(self, name: str) -> None:
        return None

    def check_unchanged(self) -> None: ...

    def close(self) -> None: ...


def opened(files: Mapping[str, list[Header]], documents: Mapping[str, bytes], folder: Path) -> Checkpoint:
    folder.mkdir()
    for name, content in documents.items():
        (folder / name).write_bytes(content)
    held = {n: Document(n, folder / n, len(c)) for n, c in documents.items()}
    return Checkpoint(folder, {f: Headers(f, rows) for f, rows in files.items()}, held)


def output(plan: Plan, folder: Path) -> Checkpoint:
    """What opening the output of `plan` would give, without its manifest: nothing but the numbers says how
    the other side was."""
    files = {f.name: [(t.name, t.dtype, t.shape) for t in f.tensors] for f in plan.outputs}
    return opened(files, {d.name: d.content for d in plan.documents}, folder)


def params(plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(next(d.content for d in plan.documents if d.name == "params.json"))
    return found


def values(plan: Plan) -> dict[str, Any]:
    return {k: v.value for k, v in plan.config.items()}


EPS = st.floats(1e-9, 1e-2)
THETA = st.none() | st.floats(1.0, 1e8)
HEADS = st.tuples(st.integers(1, 4), st.integers(1, 4))  # key/value heads, queries for each
SIZE = st.integers(1, 90)


@st.composite
def mistral(draw: st.DrawFn) -> Mistral:
    kv, each = draw(HEADS)
    return Mistral(
        dim=draw(SIZE),
        layers=draw(st.integers(1, 3)),
        head_dim=2 * draw(st.integers(1, 9)),
        ffn=draw(SIZE),
        heads=kv * each,
        kv_heads=kv,
        eps=draw(EPS),
        vocab=draw(SIZE),
        theta=draw(THETA),
        window=draw(st.none() | SIZE),
    )


@st.composite
def mixtral(draw: st.DrawFn) -> Mixtral:
    kv, each = draw(HEADS)
    experts, named = draw(st.integers(1, 5)), draw(st.booleans())
    head = 2 * draw(st.integers(1, 9))
    return Mixtral(
        form=draw(st.sampled_from(("A", "B", "C"))),
        dim=kv * each * head if named else draw(SIZE),  # such files leave the width of a head out
        layers=draw(st.integers(1, 3)),
        head_dim=head,
        ffn=draw(SIZE),
        heads=kv * each,
        kv_heads=kv,
        eps=draw(EPS),
        vocab=draw(SIZE),
        experts=experts,
        chosen=draw(st.integers(1, experts)),
        theta=draw(THETA),
        hf_keys=named,
    )


@st.composite
def llama(draw: st.DrawFn) -> Llama:
    kv, each = draw(HEADS)
    style = draw(st.sampled_from(("1", "2", "code", "3")))
    scaled = style == "3" and draw(st.booleans())
    return Llama(
        style=style,
        dim=kv * each * 2 * draw(st.integers(1, 9)),
        layers=draw(st.integers(1, 3)),
        heads=kv * each,
        kv_heads=kv if each > 1 or draw(st.booleans()) else None,
        vocab=draw(SIZE),
        multiple_of=draw(st.integers(1, 64)),
        multiplier=draw(st.none() | st.floats(0.5, 2)),
        eps=draw(EPS),
        theta=draw(THETA) if style in ("code", "3") else None,
        scaled=scaled,
        dtype="F16" if style == "1" else "BF16",
    )


DOWNLOADS = {"mistral": mistral(), "mixtral": mixtral(), "llama": llama()}


def same_numbers(said: Mapping[str, Any], again: Mapping[str, Any], model: Any) -> None:
    """`again`, written from config.json, says what the original's document said."""
    for key in said.keys() & again.keys() - {"multiple_of", "ffn_dim_multiplier"}:
        assert again[key] == said[key] or said[key] == -1, key
    if isinstance(model, Llama):  # another pair may stand for the same width
        assert width_of(model.dim, again["multiple_of"], again.get("ffn_dim_multiplier")) == model.ffn
        assert again.get("use_scaled_rope", False) == model.scaled
        assert again.get("n_kv_heads", model.heads) == (model.kv_heads or model.heads)


@pytest.mark.parametrize("name", DOWNLOADS)
def test_numbers_are_read_back_from_what_was_written(name: str) -> None:
    own = family(name)

    @settings(max_examples=30, deadline=None)
    @given(DOWNLOADS[name])
    def check(model: Any) -> None:
        original = model.original()
        with TemporaryDirectory() as made:
            folder = Path(made)
            said = {"params.json": json.dumps(original.params).encode()}
            download = opened({f: list(rows) for f, rows in original.headers.items()}, said, folder / "a")
            there = own.plan(download, Options())
            back = own.plan_original(output(there, folder / "b"), Options())
            again = own.plan(output(back, folder / "c"), Options())
            once_more = own.plan_original(output(again, folder / "d"), Options())
        assert values(again) == values(there)
        assert params(once_more) == params(back)
        same_numbers(original.params, params(back), model)

    check()
