"""Tied tables that are stored under the name of the head alone, as huggingface_hub saves them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ckpt_tool import api
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import verify
from tests.conftest import Written

# What the head is called that comes before its table in the alphabet, and the table.
STORED = {
    "llama-3.2-1b": {"lm_head.weight": "model.embed_tokens.weight"},
    "gpt2-ngc-stored": {"lm_head.weight": "transformer.wte.weight"},
    "opt-13b": {"lm_head.weight": "model.decoder.embed_tokens.weight"},
    "gpt-neox-tied": {"embed_out.weight": "gpt_neox.embed_in.weight"},
    "ministral3-3b": {"lm_head.weight": "model.embed_tokens.weight"},
    "mobilebert-uncased": {"cls.predictions.decoder.weight": "mobilebert.embeddings.word_embeddings.weight"},
    "mluke-base": {
        "lm_head.decoder.weight": "luke.embeddings.word_embeddings.weight",
        "entity_predictions.decoder.weight": "luke.entity_embeddings.entity_embeddings.weight",
    },
}
BITS: dict[str, Any] = {"levels": ("coverage", "bits")}


def saved_so(converted: Path, out: Path, names: dict[str, str], **config: Any) -> Path:
    """The model as the hub's library saves it, with these values of config.json."""
    shutil.copytree(converted, out)
    (out / "ckpt-tool.json").unlink()
    tensors = load_file(out / "model.safetensors")
    for head, table in names.items():
        tensors[head] = tensors.pop(table)
    note = {"format": "pt", **{table: head for head, table in names.items()}}
    save_file(tensors, out / "model.safetensors", note)
    document = json.loads((out / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps({k: v for k, v in document.items() if v is not None}))
    return out


@pytest.mark.parametrize("variant", STORED)
def test_the_head_is_read_as_the_embedding(variant: str, conversions: Written, tmp_path: Path) -> None:
    source = saved_so(conversions(variant), tmp_path / "in", STORED[variant])
    done = api.convert(source, tmp_path / "out", check=False)
    head, table = next(iter(STORED[variant].items()))
    assert f"{head} stands for {table} too, to which config.json ties it: read as that" in done.plan.notes
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "out", conversions(variant)))
    assert ours.keys() == theirs.keys()
    assert all(ours[n].equal(theirs[n]) for n in theirs)
    assert verify(tmp_path / "out", source, **BITS).status == "pass"


@pytest.mark.parametrize("variant", ["llama-3.2-1b", "gpt2-ngc-stored"])
def test_it_is_verified_as_it_lies_there_and_goes_back(
    variant: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    stored = saved_so(conversions(variant), tmp_path / "in", STORED[variant])
    settings = VARIANTS[variant].settings
    assert verify(stored, originals(variant), settings=settings, **BITS).status == "pass"
    api.convert(stored, tmp_path / "back", to="original")
    assert verify(tmp_path / "back", stored, **BITS).status == "pass"


# Untied, by what is said or by silence; a class that has no head; one that has another.
NOT_TIED = {
    "llama-3.2-1b": {"tie_word_embeddings": False},
    "gpt-neox-tied": {"tie_word_embeddings": None},
    "gpt2-ngc-stored": {"architectures": ["GPT2Model"]},
    "opt-13b": {"architectures": ["OPTForSequenceClassification"]},
}


@pytest.mark.parametrize("variant", NOT_TIED)
def test_another_model_has_no_embedding(variant: str, conversions: Written, tmp_path: Path) -> None:
    source = saved_so(conversions(variant), tmp_path / "in", STORED[variant], **NOT_TIED[variant])
    with pytest.raises(CkptToolError) as caught:
        api.plan(source, family={"gpt2": "megatron-gpt2"}.get(variant[:4], "auto"))
    assert caught.value.kind in ("unknown-family", "missing-tensor", "uncovered-tensors", "already-converted")


def test_a_mega_that_masks_words_has_a_head_of_its_own(conversions: Written, tmp_path: Path) -> None:
    table = "mega.embedding_layer.word_embeddings.weight"
    stored = saved_so(conversions("mega-chunks"), tmp_path / "in", {"mlm_head.weight": table})
    api.plan(stored)
    other = saved_so(conversions("mega-chunks"), tmp_path / "other", {"lm_head.weight": table})
    with pytest.raises(CkptToolError) as caught:
        api.plan(other)
    assert caught.value.kind == "unknown-family"
