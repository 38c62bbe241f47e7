"""Tensors that older releases left in a file: notes where they hold what is computed anew."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import verify

Written = Callable[[str], Path]
Tensors = dict[str, Tensor]


def frequencies(theta: float, width: int) -> Tensor:
    return theta ** -(torch.arange(0, width, 2) / width)


def each_layer(stem: str, layers: int, value: Tensor) -> Tensors:
    return {stem.format(i=i): value.clone() for i in range(layers)}


def inv_freq(theta: float, dtype: torch.dtype = torch.float32) -> Tensors:
    stem = "model.layers.{i}.self_attn.rotary_emb.inv_freq"
    return each_layer(stem, 12, frequencies(theta, 10).to(dtype))


def cached(theta: float) -> Tensors:
    angles = torch.outer(torch.arange(64.0), frequencies(theta, 10)).tile(2)
    stem = "model.layers.0.self_attn.rotary_emb."
    return {stem + "cos_cached": angles.cos()[None, None], stem + "sin_cached": angles.sin()[None, None]}


def masks(shift: int = 0) -> Tensors:
    mask = torch.ones(32, 32, dtype=torch.uint8).tril(shift)[None, None]
    bias = torch.tensor(-1e4)
    names = ("transformer.h.{i}.attn.bias", "transformer.h.{i}.attn.masked_bias")
    return {**each_layer(names[0], 4, mask), **each_layer(names[1], 4, bias)}


def codegen(half: torch.dtype) -> Tensors:
    angles = torch.outer(torch.arange(40.0), 10000 ** -(torch.arange(0, 6, 2) / 6))
    return {
        "transformer.h.0.attn.causal_mask": torch.ones(1, 1, 40, 40, dtype=torch.bool).tril(),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e9).to(half),
        "transformer.h.0.attn.embed_positions": torch.cat([angles.sin(), angles.cos()], 1).to(half),
    }


def head(of: str, name: str = "lm_head.weight", by: float = 0.0) -> Callable[[Tensors], Tensors]:
    def made(held: Tensors) -> Tensors:
        copy = held[of].clone()
        copy.view(-1)[7] += by
        return {name: copy}

    return made


WORDS = "model.embed_tokens.weight"
BERT_WORDS = "bert.embeddings.word_embeddings.weight"
# variant, what is added, what the note or the failure says; failures begin with "expected"
CASES: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "frequencies": (
        "llama-2-7b",
        lambda _: inv_freq(1e4),
        "12 that no plan has .* the frequencies of rope_th",
    ),
    "frequencies-bfloat16": ("llama-2-7b", lambda _: inv_freq(1e4, torch.bfloat16), "12 that no plan has"),
    "frequencies-once": (
        "llama-2-7b",
        lambda _: {"model.rotary_emb.inv_freq": frequencies(1e4, 10)},
        "1 that no plan has",
    ),
    "frequencies-of-another-theta": (
        "llama-2-7b",
        lambda _: inv_freq(1e6),
        "expected the frequencies of rope_theta, found other values in 4 of 5 elements",
    ),
    "frequencies-of-another-width": (
        "llama-2-7b",
        lambda _: {"model.rotary_emb.inv_freq": frequencies(1e4, 12)},
        r"expected the frequencies of rope_theta, found a shape \[6\]",
    ),
    "tables": ("llama-2-7b", lambda _: cached(1e4), "1 that no plan has .* sines of the rotary"),
    "tables-of-another-theta": ("llama-2-7b", lambda _: cached(2e4), "expected cosines of the rotary emb"),
    "masks": ("gpt2-2019-tp2", lambda _: masks(), "4 that no plan has .* the causal mask"),
    "masks-that-show-the-next": (
        "gpt2-2019-tp2",
        lambda _: masks(1),
        "expected the causal mask, found other",
    ),
    "codegen": ("codegen-350m-mono", lambda _: codegen(torch.float32), "sines and cosines of the rotary"),
    "codegen-half": ("codegen-350m-mono", lambda _: codegen(torch.float16), "what masked scores are set to"),
    "positions": (
        "bert-2019-tp2",
        lambda _: {"bert.embeddings.position_ids": torch.arange(520)[None]},
        "positions from 0 on",
    ),
    "positions-from-one": (
        "bert-2019-tp2",
        lambda _: {"bert.embeddings.position_ids": torch.arange(520)[None] + 1},
        "expected positions from 0 on, found other values in 520 of 520",
    ),
    "tied-llama": ("llama-3.2-1b", head(WORDS), f"equal to {WORDS}, to which it is tied"),
    "tied-llama-other": (
        "llama-3.2-1b",
        head(WORDS, by=0.5),
        f"expected {WORDS} again, .*1 of [0-9,]+ elements differ, by up to 0.5",
    ),
    "tied-opt": ("opt-13b", head("model.decoder.embed_tokens.weight"), "equal to model.decoder.embed_tok"),
    "tied-opt-other": ("opt-13b", head("model.decoder.embed_tokens.weight", by=1.0), "1 of [0-9,]+ elements"),
    "tied-gpt2": ("gpt2-2019-tp2", head("transformer.wte.weight"), "equal to transformer.wte.weight"),
    "tied-bert": (
        "bert-2019-tp2",
        head(BERT_WORDS, "cls.predictions.decoder.weight"),
        f"equal to {BERT_WORDS}",
    ),
    "tied-bert-bias": (
        "bert-2019-tp2",
        head("cls.predictions.bias", "cls.predictions.decoder.bias"),
        "equal to cls.predictions.bias",
    ),
    "stranger": ("llama-2-7b", lambda _: {"model.extra": torch.ones(3)}, "expected only tensors of the plan"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_left_over_tensor(name: str, conversions: Written, originals: Written, tmp_path: Path) -> None:
    variant, made, said = CASES[name]
    report = verified(variant, made, conversions, originals, tmp_path)
    wrong = said.startswith("expected") or "elements" in said
    own = [f for f in report.findings if f.check in ("left-over tensors", "target tensors")]
    texts = [f.message for f in own if f.status == ("fail" if wrong else "note")]
    assert any(re.search(said, text) for text in texts), [(f.status, f.message) for f in own]
    assert (report.status, report.exit_code) == (("fail", 1) if wrong else ("pass", 0)), report.headline


def verified(
    variant: str, made: Callable[[Tensors], Tensors], conversions: Written, originals: Written, tmp_path: Path
) -> Any:
    folder = tmp_path / "out"
    shutil.copytree(conversions(variant), folder)
    (folder / "ckpt-tool.json").unlink()
    held = load_file(folder / "model.safetensors")
    save_file({**held, **made(held)}, folder / "model.safetensors", metadata={"format": "pt"})
    levels = ("coverage", "bits")
    return verify(folder, originals(variant), levels=levels, settings=VARIANTS[variant].settings)


def test_an_untied_head_is_no_left_over(conversions: Written, originals: Written, tmp_path: Path) -> None:
    """The config ties the output layer of a model whose output layer is another: both are told."""
    folder = tmp_path / "out"
    shutil.copytree(conversions("llama-2-7b"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    report = verify(folder, originals("llama-2-7b"), levels=("coverage",))
    said = [f.message for f in report.findings if f.status == "fail"]
    assert any("expected false" in text and "found true" in text for text in said)


PREFIXES = {
    "gpt2-2019-tp2": "transformer.",
    "codegen-350m-mono": "transformer.",
    "llama-2-7b": "model.",
    "opt-350m": "model.",
    "bert-2019-tp2": "bert.",
}


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize("variant", PREFIXES)
def test_names_without_the_models_prefix_are_read_with_it(
    variant: str, conversions: Written, originals: Written, tmp_path: Path
) -> None:
    """As transformers reads them, and the first files of GPT-2 are; with a wrong value they fail."""
    folder, prefix = tmp_path / "out", PREFIXES[variant]
    shutil.copytree(conversions(variant), folder)
    (folder / "ckpt-tool.json").unlink()
    held = load_file(folder / "model.safetensors")
    bare = {name.removeprefix(prefix): x for name, x in held.items()}
    assert bare.keys() != held.keys()
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    settings = VARIANTS[variant].settings
    report = verify(folder, originals(variant), settings=settings)
    assert (report.status, report.exit_code) == ("pass", 0), report.headline
    notes = [f.message for f in report.findings if f.check == "target tensors" and f.status == "note"]
    assert notes == [f"tensors are named without `{prefix}`, which transformers adds when it loads them"]
    last = max(n for n in bare if n.endswith("weight") and bare[n].ndim > 1)
    bare[last].view(-1)[0] += 1
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    assert verify(folder, originals(variant), levels=("coverage", "bits"), settings=settings).exit_code == 1


def test_a_tied_head_that_is_another_fails_without_a_source_too(conversions: Written, tmp_path: Path) -> None:
    """The right one proves nothing without a manifest or a source; the wrong one fails all the same."""
    for by, code in ((0.0, 2), (0.5, 1)):
        folder = tmp_path / str(by)
        shutil.copytree(conversions("llama-3.2-1b"), folder)
        (folder / "ckpt-tool.json").unlink()
        held = load_file(folder / "model.safetensors")
        save_file(
            {**held, **head(WORDS, by=by)(held)}, folder / "model.safetensors", metadata={"format": "pt"}
        )
        report = verify(folder, levels=("coverage",), no_source=True)
        assert report.exit_code == code, [f.message for f in report.findings]
