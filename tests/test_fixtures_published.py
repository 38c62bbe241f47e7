"""Tiny published originals are what they say: transformers loads them whole, and what is new in each acts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tool.fixtures.prompts import TEXTS
from ckpt_tool.fixtures.variants import VARIANTS

transformers = pytest.importorskip("transformers")
Written = Callable[[str], Path]
FAMILIES = ("gemma2", "gpt-neox", "qwen3")
CHOSEN = [v.id for v in VARIANTS.values() if v.family in FAMILIES and not v.id.endswith("mcore")]


def model(folder: Path, **changes: Any) -> Any:
    """As transformers loads the folder, which must hold every tensor and no other, with `changes` of its
    config."""
    config = transformers.AutoConfig.from_pretrained(folder)
    for key, value in changes.items():
        setattr(config, key, value)
    kind = transformers.AutoModelForCausalLM
    made, said = kind.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not said["missing_keys"] and not said["mismatched_keys"]
    return made


def logits(of: Any, words: int) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = of(torch.arange(96).mul(37).remainder(words).view(1, -1)).logits
    return found.double()


def nmse(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean() / a.var())


@pytest.mark.parametrize("name", CHOSEN)
def test_transformers_loads_it_and_its_logits_are_neither_flat_nor_wild(
    name: str, originals: Written
) -> None:
    variant, folder = VARIANTS[name], originals(name)
    found = logits(model(folder), variant.true_config["vocab_size"])
    assert 0.4 < found.std() < 10
    assert len(set(found.argmax(-1).flatten().tolist())) > 5


@pytest.mark.parametrize("name", CHOSEN)
def test_sizes_are_pairwise_different_and_one_is_deep(name: str) -> None:
    config = VARIANTS[name].true_config
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    sizes = [config[k] for k in keys]
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads")
    head = config.get("head_dim", config["hidden_size"] // heads)
    sizes += [head] if groups in (None, heads) else [head, groups]
    assert len(set(sizes)) == len(sizes)
    assert groups is None or groups == heads or groups**2 != heads  # swapped counts would fit
    family = VARIANTS[name].family
    assert max(v.true_config["num_hidden_layers"] for v in VARIANTS.values() if v.family == family) >= 11


def rotary(share: float) -> dict[str, Any]:
    """At the usual base."""
    said = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}
    return {"rope_parameters": said}


ACTS: dict[str, list[dict[str, Any]]] = {
    "gemma-2-2b": [
        {"attn_logit_softcapping": None},
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": None},
        {"sliding_window": 4096},
        {"layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"]},
        {"hidden_activation": "gelu"},
    ],
    "gemma-2-27b": [{"query_pre_attn_scalar": 20}, rotary(1.0), {"rms_norm_eps": 3e-4}],
    "gpt-neox-20b": [{"hidden_act": "gelu"}, {"use_parallel_residual": False}, rotary(1.0)],
    "redpajama-3b": [{"use_parallel_residual": True}, rotary(0.25), {"hidden_act": "gelu_new"}],
    "gpt-neox-tied": [rotary(0.25), {"layer_norm_eps": 1e-5}],
    "qwen3-0.6b": [{"rms_norm_eps": 1e-3}],
    "qwen3-float32": [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rms_norm_eps": 3e-4},
    ],
}


@pytest.mark.parametrize(("name", "changes"), [(n, c) for n, cs in ACTS.items() for c in cs], ids=str)
def test_a_wrong_number_moves_the_logits(name: str, changes: dict[str, Any], originals: Written) -> None:
    words = VARIANTS[name].true_config["vocab_size"]
    right, wrong = model(originals(name)), model(originals(name), **changes)
    assert nmse(logits(right, words), logits(wrong, words)) > 1e-8  # a hundred times the bar


def test_norms_of_gemma_2_are_stored_around_zero(originals: Written) -> None:
    of = model(originals("gemma-2-9b"))
    right = logits(of, 352)
    norms = {n: p for n, p in of.named_parameters() if "norm" in n}
    assert len(norms) == 12 * 4 + 1 and all(abs(p.mean()) < 0.1 < p.std() for p in norms.values())
    for p in norms.values():
        p.data += 1
    assert nmse(right, logits(of, 352)) > 1e-3


def test_sentencepiece_cuts_texts_as_the_tokenizer_json_of_gemma_2_does(originals: Written) -> None:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

    folder = originals("gemma-2-2b")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert [model.pad_id(), model.eos_id(), model.bos_id(), model.unk_id()] == [0, 1, 2, 3]
    for text in TEXTS:
        assert tokenizer.encode(text).ids == [2, *model.encode(text)]
    assert len(model.encode(TEXTS[0])) < len(TEXTS[0]), "pieces are joined"


def test_each_head_of_qwen3_is_normalised_by_numbers_of_its_own(originals: Written) -> None:
    right = model(originals("qwen3-8b"))
    wrong = copy.deepcopy(right)
    for layer in wrong.model.layers:
        layer.self_attn.q_norm, layer.self_attn.k_norm = layer.self_attn.k_norm, layer.self_attn.q_norm
    assert nmse(logits(right, 320), logits(wrong, 320)) > 1e-4


@pytest.mark.parametrize("name", CHOSEN)
def test_the_tokenizer_reads_every_text_in_ids_of_the_model(name: str, originals: Written) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(originals(name) / "tokenizer.json"))
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
        assert max(ids) < VARIANTS[name].true_config["vocab_size"]
