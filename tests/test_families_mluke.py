"""mLUKE there and back: copied rows, entities, the tokenizer's files, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ckpt_tool import api
from ckpt_tool.checkpoint.base import Document
from ckpt_tool.convert.dialects.entity_vocabulary import Vocabulary, entries, written_back
from ckpt_tool.convert.plan import Options, Plan
from ckpt_tool.convert.tokenizers import entity_spans
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures.studio_ousia import entity_lines
from ckpt_tool.fixtures.tokenizers import unigram_model
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify.beside import Beside, Damaged

BARE = {"num_attention_heads": 7, "layer_norm_eps": 3e-5, "hidden_act": "gelu"}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return VARIANTS["mluke-bare"].write(tmp_path_factory.mktemp("mluke") / "original")


@pytest.fixture(scope="module")
def converted(bare: Path) -> Path:
    convert("mluke", bare, bare.parent / "hf", settings=BARE)
    return bare.parent / "hf"


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def refused(act: Callable[[], object]) -> CkptToolError:
    with pytest.raises(CkptToolError) as caught:
        act()
    return caught.value


def plan(family: str, source: Path, **asked: Any) -> Plan:
    return api.plan(source, family=family, options=Options(**asked))


def convert(family: str, source: Path, out: Path, to: str = "hf", **asked: Any) -> None:
    api.convert(source, out, family=family, to=to, options=Options(**asked), jobs=1)


def with_metadata(folder: Path, **more: Any) -> Path:
    told = {**BARE, "entity_vocab_size": 43, "vocab_size": 184, "position_embedding_type": "absolute", **more}
    (folder / "metadata.json").write_text(json.dumps({"model_config": told}))
    return folder


# --- copied rows ----------------------------------------------------------------------------------------


def test_copied_rows_are_those_of_the_signs_and_of_the_mask(bare: Path, converted: Path) -> None:
    own = torch.load(bare / "pytorch_model.bin", weights_only=True)
    made = load_file(converted / "model.safetensors")
    pieces = entity_spans.read((bare / entity_spans.MODEL).read_bytes(), "model")
    at, sign = entity_spans.started_from(pieces, "model")
    assert [pieces[k - 1].text for k in (at, sign)] == ["@", "#"]
    for name, prefix in (("embeddings.word_embeddings.weight", "luke."), ("lm_head.bias", "")):
        x, y = own[name].numpy(), made[prefix + name]
        assert np.array_equal(y[:-2], x) and np.array_equal(y[-2], x[at]) and np.array_equal(y[-1], x[sign])
    for name, prefix in (
        ("entity_embeddings.entity_embeddings.weight", "luke."),
        ("entity_predictions.bias", ""),
    ):
        x, y = own[name].numpy(), made[prefix + name]
        assert np.array_equal(y[:-1], x) and np.array_equal(y[-1], x[2])
    for i in range(2):
        p = f"luke.encoder.layer.{i}.attention.self."
        for query in ("w2e_query", "e2w_query", "e2e_query"):
            assert np.array_equal(made[f"{p}{query}.weight"], made[f"{p}query.weight"])
    assert np.array_equal(made["lm_head.decoder.weight"], made["luke.embeddings.word_embeddings.weight"])


def test_copies_are_listed_in_the_plan(bare: Path) -> None:
    made = plan("mluke", bare, settings=BARE)
    steps = [s for s in made.to_json()["steps"] if s.get("copied")]
    assert len(steps) == 13  # three queries with biases in two layers, and the output layer
    taken = [p["taken"] for s in made.to_json()["steps"] for p in s["sources"] if "taken" in p]
    assert taken == [{"v": [184, 185]}, {"v": [185, 186]}, {"u": [43, 44]}] * 2 + taken[6:]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("luke.embeddings.word_embeddings.weight", 185),
        ("luke.entity_embeddings.entity_embeddings.weight", 43),
        ("luke.encoder.layer.1.attention.self.e2w_query.bias", 3),
        ("lm_head.bias", 184),
    ],
)
def test_the_way_back_refuses_copies_that_are_none_any_more(
    name: str, row: int, converted: Path, tmp_path: Path
) -> None:
    folder = copy(converted, tmp_path / "tuned")
    held = load_file(folder / "model.safetensors")
    held[name] = held[name].copy()
    held[name][row] += 1
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    error = refused(lambda: convert("mluke", folder, tmp_path / "back", to="original"))
    kinds = {(p.kind, p.where) for p in error.problems}
    assert ("tied-mismatch", name) in kinds
    assert all("--drop-copies" in (p.hint or "") for p in error.problems if p.where == name)
    convert("mluke", folder, tmp_path / "back", to="original", family_options={"drop_copies": True})
    lossy = json.loads((tmp_path / "back" / "ckpt-tool.json").read_text())["lossy"]
    assert len(lossy) == 1 and "--drop-copies" in lossy[0]
    report = api.verify(tmp_path / "back", folder, levels=("bits",))
    assert (report.status, report.exactness) == ("pass", "identical without copies")
    assert "copies that were left out and compared with nothing" in report.headline


def test_a_tied_head_of_other_values_is_refused(bare: Path, tmp_path: Path) -> None:
    folder = copy(bare, tmp_path / "in")
    held = torch.load(folder / "pytorch_model.bin", weights_only=True)
    held["entity_predictions.decoder.weight"] = held["entity_predictions.decoder.weight"] + 1
    torch.save(held, folder / "pytorch_model.bin")
    error = refused(lambda: convert("mluke", folder, tmp_path / "hf", settings=BARE))
    (problem,) = error.problems
    assert (problem.kind, problem.where) == ("tied-mismatch", "entity_predictions.decoder.weight")
    convert("mluke", folder, tmp_path / "hf", settings=BARE, drop=("entity_predictions.decoder.weight",))


def test_queries_are_left_out_where_that_is_asked_for(bare: Path, tmp_path: Path) -> None:
    made = plan("mluke", bare, settings=BARE, family_options={"drop_queries": True})
    assert made.config["use_entity_aware_attention"].value is False
    assert not any("w2e_query" in t.name for f in made.outputs for t in f.tensors)


# --- facts ----------------------------------------------------------------------------------------------


def test_a_published_model_asks_nothing(bare: Path, tmp_path: Path) -> None:
    """With metadata.json, the entities, and the tokenizer of bert_model_name."""
    folder = with_metadata(copy(bare, tmp_path / "in"), bert_model_name="xlm-roberta-base")
    made = plan("auto", folder)
    assert made.family == "mluke" and made.config["entity_vocab_size"].value == 44
    assert made.config["vocab_size"].value == 186
    assert not any("bert_model_name" in note for note in made.notes)


@pytest.mark.parametrize(
    ("said", "kind", "where"),
    [
        ({"logit_scale": 0.5}, "unsupported", "logit_scale"),
        ({"position_embedding_type": "relative_key"}, "unsupported", "position_embedding_type"),
        ({"tie_word_embeddings": False}, "unsupported", "tie_word_embeddings"),
        ({"hidden_act": "mish"}, "unsupported", "hidden_act"),
        ({"num_attention_heads": 5}, "config-mismatch", "num_attention_heads"),
        ({"entity_vocab_size": 44}, "config-mismatch", "entity_vocab_size"),
        ({"vocab_size": 185}, "config-mismatch", "vocab_size"),
        ({"num_hidden_layers": 3}, "missing-tensor", "num_hidden_layers"),
    ],
)
def test_what_metadata_says_is_used_or_refused_by_name(
    said: dict[str, Any], kind: str, where: str, bare: Path, tmp_path: Path
) -> None:
    folder = with_metadata(copy(bare, tmp_path / "in"), **said)
    error = refused(lambda: plan("mluke", folder))
    assert (kind, where) in {(p.kind, p.where) for p in error.problems}
    assert "config.json" not in {p.file for p in error.problems}  # there is none


def test_without_files_that_say_them_the_rows_to_copy_are_asked_for(bare: Path, tmp_path: Path) -> None:
    folder = copy(bare, tmp_path / "in")
    for name in (entity_spans.MODEL, "entity_vocab.jsonl"):
        (folder / name).unlink()
    error = refused(lambda: plan("mluke", folder, settings=BARE))
    hints = {p.where: p.hint or "" for p in error.problems if p.kind == "missing-fact"}
    assert hints.keys() == {"at_sign_id", "number_sign_id", "entity_mask_id"}
    assert all(f"--set {name}=VALUE" in hint for name, hint in hints.items())
    said = {**BARE, "at_sign_id": 7, "number_sign_id": 9, "entity_mask_id": 2}
    assert plan("mluke", folder, settings=said).config["vocab_size"].value == 186
    again = plan(
        "mluke", folder, settings=BARE | {"entity_mask_id": 2}, tokenizer=str(bare / entity_spans.MODEL)
    )
    assert any(d.name == "tokenizer.json" for d in again.documents)
    for wrong in ({"at_sign_id": 184}, {"entity_mask_id": 43}):
        error = refused(lambda wrong=wrong: plan("mluke", folder, settings=said | wrong))  # type: ignore[misc]
        assert error.problems[0].kind == "config-mismatch"


def test_files_of_the_english_model_are_told(bare: Path, tmp_path: Path) -> None:
    """Its entities are lines of another kind and its words RoBERTa's."""
    folder = with_metadata(copy(bare, tmp_path / "in"), bert_model_name="roberta-base")
    (note,) = (n for n in plan("mluke", folder).notes if "bert_model_name" in n)
    assert "roberta-base, whose words are not XLM-R's" in note and entity_spans.MODEL in note
    for name in (entity_spans.MODEL, "entity_vocab.jsonl"):
        (folder / name).unlink()
    (folder / "entity_vocab.tsv").write_text("[PAD]\t0\n[UNK]\t0\n[MASK]\t0\n")
    error = refused(lambda: plan("mluke", folder))
    hints = {p.where: p.hint or "" for p in error.problems}
    assert hints.keys() == {"at_sign_id", "number_sign_id", "entity_mask_id"}
    assert all("entity_vocab.tsv is LUKE's, the English model" in hint for hint in hints.values())
    assert all(f"--set {name}=VALUE" in hint for name, hint in hints.items())
    assert not any(entity_spans.MODEL in hint or ".jsonl" in hint for hint in hints.values())


def test_a_tokenizer_of_another_model_is_refused(bare: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    other.write_bytes(unigram_model(150))
    error = refused(lambda: plan("mluke", bare, settings=BARE, tokenizer=str(other)))
    assert error.problems[0].kind == "bad-tokenizer" and "184" in error.problems[0].message


# --- entities -------------------------------------------------------------------------------------------


def document(tmp_path: Path, content: bytes) -> Document:
    path = tmp_path / "entity_vocab.jsonl"
    path.write_bytes(content)
    return Document(path.name, path, len(content))


def test_entities_are_named_by_language_and_come_back(tmp_path: Path) -> None:
    found = Vocabulary(document(tmp_path, entity_lines(40)), 40)
    written = b"".join(found.content.pieces())
    made = json.loads(written)
    assert [made[t] for t in ("[PAD]", "[UNK]", "[MASK]", "[MASK2]")] == [0, 1, 2, 40]
    assert made["en:Japan"] == 3 and made["ja:日本"] == made["en:日本"] == 4 and made["en:A: B"] == 8
    assert dict(entries([written])) == dict(entries(bytes([b]) for b in written)) == made
    lines = b"".join(written_back([written]).pieces())
    again = Vocabulary(document(tmp_path, lines), 40)
    assert b"".join(again.content.pieces()) == written


LINE = '{"id": %d, "entities": [["%s", "en"]], "count": 1}\n'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (LINE % (3, "A") + LINE % (3, "B"), "each id once, found 3 again"),
        (LINE % (3, "A") + LINE % (4, "A"), "each entity once, found en:A"),
        (LINE % (9, "A"), "an id from 0 to 4, found 9"),
        ('{"id": 3, "entities": []}\n', "[title, language]"),
        ('{"id": 3, "entities": [["A", 7]]}\n', "[title, language]"),
        ("[" * 5000 + "\n", "an id from 0 to 4"),
        (LINE % (3, "A"), "for each of 5 rows, found none for 1"),
    ],
)
def test_entities_that_are_none_are_refused_by_line(content: str, says: str, tmp_path: Path) -> None:
    first = entity_lines(3).decode()
    error = refused(lambda: Vocabulary(document(tmp_path, (first + content).encode()), 5))
    assert all(p.kind == "bad-tokenizer" for p in error.problems)
    assert any(says in p.message for p in error.problems)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": 1', b'{"a": 1}x', b'{"a": "b"}', b'{"a": 1,}'])
def test_what_is_no_vocabulary_of_entities_is_refused_on_the_way_back(content: bytes) -> None:
    assert (
        refused(lambda: list(entries([content[:3], content[3:]] if content[:3] else []))).problems[0].kind
        == "bad-tokenizer"
    )


def test_a_published_list_of_entities_is_not_too_large_to_verify(tmp_path: Path) -> None:
    for name, fits in (("entity_vocab.json", True), ("entity_vocab.jsonl", True), ("other.json", False)):
        with open(tmp_path / name, "wb") as f:
            f.truncate((64 << 20) + 1)
        beside = Beside(tmp_path, frozenset([name]), True, {})
        if fits:
            assert len(beside.read(name)) == (64 << 20) + 1
        else:
            with pytest.raises(Damaged):
                beside.read(name)
