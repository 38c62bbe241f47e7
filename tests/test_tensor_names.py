"""What a tensor's name says: one splitter for `.` and, in TensorFlow's names, `/`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tool.checkpoint.base import TensorInfo
from ckpt_tool.checkpoint.tensor_names import fold_key, folded_name, layer_of, numbers, short, words_of
from ckpt_tool.inspect import fold


@pytest.mark.parametrize(
    ("name", "found", "inside"),
    [
        ("model.layers.11.self_attn.q_proj.weight", (11,), "self_attn.q_proj"),
        ("layers.3.feed_forward.experts.7.w2.weight", (3, 7), "feed_forward.experts.7.w2"),
        ("bert/encoder/layer_11/attention/self/query/kernel", (11,), "attention/self/query/kernel"),
        ("bert/encoder/layer_3/ffn_layer_0/output/dense/bias", (3,), "ffn_layer_0/output/dense/bias"),
        ("model/h3/attn/c_attn/w", (3,), "attn/c_attn/w"),
        ("encoder/block_000/layer_1/kernel", (0, 1), "layer_1/kernel"),
        ("0.weight", (0,), "0.weight"),
        ("rotary.3", (3,), "rotary.3"),
        ("embed_tokens.weight", (), "embed_tokens"),
        ("bert/embeddings/word_embeddings", (), "bert/embeddings/word_embeddings"),
        ("h3.weights.w16.v2", (), "h3.weights.w16.v2"),
    ],
)
def test_layers_are_found_in_both(name: str, found: tuple[int, ...], inside: str) -> None:
    assert (numbers(name), layer_of(name)) == (found, found[0] if found else None)
    assert short(name) == inside


@pytest.mark.parametrize(
    ("template", "folded"),
    [
        ("model.layers.{}.norm.weight", "model.layers.{0..11}.norm.weight"),
        ("bert/encoder/layer_{}/output/LayerNorm/beta", "bert/encoder/layer_{0..11}/output/LayerNorm/beta"),
        ("model/h{}/ln_1/g", "model/h{0..11}/ln_1/g"),
    ],
)
def test_layers_are_folded_in_both(template: str, folded: str) -> None:
    names = [template.format(i) for i in range(12)]
    assert len({fold_key(n) for n in names}) == 1 and folded_name(names) == folded
    (row,) = fold([TensorInfo(n, "F32", (2,), "model") for n in names])
    assert (row.name, row.count) == (folded, 12)


@given(
    st.lists(st.sampled_from(["a", "layer_", "h", "7", "12", ".", "/", "{}", "_"]), min_size=1).map("".join)
)
def test_text_and_numbers_are_all_of_a_name(name: str) -> None:
    texts, found = fold_key(name), numbers(name)
    assert len(texts) == len(found) + 1
    assert "".join(t + n for t, n in zip(texts, [*map(str, found), ""], strict=True)) == name
    assert folded_name([name]) == name == fold([TensorInfo(name, "F32", (), "model")])[0].name
    assert name.replace("/", ".").split(".") == words_of(name)
