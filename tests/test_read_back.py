"""The numbers of a model are read back from what was written: params.json, config.json, params.json, at any
numbers that a published file could hold. Headers only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tool import api
from ckpt_tool.checkpoint.base import Checkpoint, Document
from ckpt_tool.convert.facts import classes
from ckpt_tool.convert.families import family
from ckpt_tool.convert.families.llama import width_of
from ckpt_tool.convert.plan import Options, Plan
from ckpt_tool.fixtures.consolidated import Original
from ckpt_tool.fixtures.families.llama import Style, llama
from ckpt_tool.fixtures.families.mistral import mistral
from ckpt_tool.fixtures.families.mixtral import mixtral
from ckpt_tool.fixtures.variants import VARIANTS
from tests.headers_only import Header, Headers


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
HALF, SIZE, LAYERS = st.integers(1, 9), st.integers(1, 90), st.integers(1, 3)


@st.composite
def mistrals(draw: st.DrawFn) -> Original:
    kv, each = draw(HEADS)
    sizes = (draw(SIZE), draw(LAYERS), 2 * draw(HALF), draw(SIZE), kv * each, kv, draw(SIZE))
    return mistral(*sizes, eps=draw(EPS), theta=draw(THETA), window=draw(st.none() | SIZE))


@st.composite
def mixtrals(draw: st.DrawFn) -> Original:
    kv, each = draw(HEADS)
    head, named, experts = 2 * draw(HALF), draw(st.booleans()), draw(st.integers(1, 5))
    width = kv * each * head if named else draw(SIZE)  # such files leave the width of a head out
    made = mixtral(
        draw(st.sampled_from(("A", "B", "C"))),
        *(width, draw(LAYERS), head, draw(SIZE), kv * each, kv, draw(SIZE)),
        theta=draw(THETA),
        hf_keys=named,
    )
    chosen = draw(st.integers(1, experts))
    if named:
        told = {"num_local_experts": experts, "num_experts_per_tok": chosen}
    else:
        told = {"moe": {"num_experts": experts, "num_experts_per_tok": chosen}}
    return replace(made, params={**made.params, **told}, sizes={**made.sizes, "e": experts})


@st.composite
def llamas(draw: st.DrawFn) -> Original:
    kv, each = draw(HEADS)
    style = draw(st.sampled_from(STYLES))
    oldest = style == "1"  # told from 2 by what all of them have, once their tables are left out
    each = 1 if oldest else each
    return llama(
        style,
        kv * each * 2 * draw(HALF),
        draw(LAYERS),
        kv * each,
        draw(SIZE),
        draw(st.integers(1, 64)),
        1e-6 if oldest else draw(EPS),
        kv_heads=kv if each > 1 or draw(st.booleans()) else None,
        multiplier=draw(st.none() | st.floats(0.5, 2)),
        theta=draw(THETA) if style in ("code", "3") else None,
        scaled=style == "3" and draw(st.booleans()),
        dtype="F16" if oldest else "BF16",
    )


STYLES: tuple[Style, ...] = ("1", "2", "code", "3")
DOWNLOADS = {"mistral": mistrals(), "mixtral": mixtrals(), "llama": llamas()}


def same_numbers(name: str, original: Original, again: Mapping[str, Any]) -> None:
    """`again`, written from config.json, says what the original's document said."""
    said = original.params
    for key in said.keys() & again.keys() - {"multiple_of", "ffn_dim_multiplier"}:
        assert again[key] == said[key] or said[key] == -1, key
    if name == "llama":  # another pair may stand for the same width
        dim, heads = said["dim"], said["n_heads"]
        width = width_of(dim, again["multiple_of"], again.get("ffn_dim_multiplier"))
        assert width == original.sizes["f"]
        assert again.get("use_scaled_rope", False) == said.get("use_scaled_rope", False)
        assert again.get("n_kv_heads", heads) == said.get("n_kv_heads", heads)


@pytest.mark.parametrize("name", DOWNLOADS)
def test_numbers_are_read_back_from_what_was_written(name: str) -> None:
    own = family(name)

    @settings(max_examples=30, deadline=None)
    @given(DOWNLOADS[name])
    def check(original: Original) -> None:
        with TemporaryDirectory() as made:
            folder = Path(made)
            said = {"params.json": json.dumps(original.params).encode()}
            there = own.plan(opened(original.headers, said, folder / "a"), Options())
            back = own.plan_original(output(there, folder / "b"), Options())
            again = own.plan(output(back, folder / "c"), Options())
            once_more = own.plan_original(output(again, folder / "d"), Options())
        assert values(again) == values(there)
        assert params(once_more) == params(back)
        same_numbers(name, original, params(back))

    check()


# One of each family and dialect, Megatron-Core's layout included.
EACH = {v.family: id for id, v in reversed(VARIANTS.items()) if not v.settings} | {"core": "qwen2-mcore"}


@pytest.mark.parametrize("family", sorted(EACH))
def test_numbers_come_back_from_what_was_written(
    family: str, conversions: Callable[[str], Path], tmp_path: Path
) -> None:
    """Original, config.json, original, config.json: the second says what the first does, without a manifest
    that would remember it."""
    first, back = tmp_path / "first", tmp_path / "back"
    shutil.copytree(conversions(EACH[family]), first)
    (first / "ckpt-tool.json").unlink()
    asked = Options(family_options={"form": "mcore"}) if family == "core" else Options()
    api.convert(first, back, to="original", options=asked)
    (back / "ckpt-tool.json").unlink()
    again = api.plan(back, to="hf")
    config = json.loads((first / "config.json").read_text())
    numbers = classes()[config["model_type"]].numbers.keys() & again.config.keys()
    assert len(numbers) >= 9
    assert {n: again.config[n].value for n in numbers} == {n: config.get(n) for n in numbers}
