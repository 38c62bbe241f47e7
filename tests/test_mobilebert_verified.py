"""MobileBERT verified: each known mistake of its converters is located and named, every class is judged by
transformers, and every documented value is computed and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ckpt_tool import api
from ckpt_tool.fixtures.families.mobilebert import mobilebert
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.reference import hf_mobilebert as hf
from ckpt_tool.verify import verify
from ckpt_tool.verify.against_transformers import _loading
from tests.mobilebert_models import STUDENT, D, State, V, converted, variables

NEXT = "ForNextSentencePrediction"


def saved(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    whole = {name: x.float().contiguous().clone() for name, x in state.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tiny(name: str, own: Mapping[str, int], folder: Path, words: int) -> Path:
    """A model of one class of transformers, with `own` output layers and that many words."""
    told = STUDENT | {"vocab_size": words, "max_position_embeddings": 600}
    state = variables(told, {stem: (rows, D) for stem, rows in own.items()})
    lm, order = name in ("ForPreTraining", "ForMaskedLM"), name in ("ForPreTraining", NEXT)
    dropped = tuple(
        stem for stem, kept in (("cls/predictions/", lm), ("cls/seq_relationship/", order)) if not kept
    )
    state = {n: x for n, x in state.items() if not n.startswith(dropped or "-")}
    config = {**told, "model_type": "mobilebert", "architectures": [f"MobileBert{name}"]}
    if "" in own:
        config["id2label"] = {str(k): f"class {k}" for k in range(own[""])}
        config["label2id"] = {f"class {k}": k for k in range(own[""])}
    theirs = converted(state, "qa_outputs" if name == "ForQuestionAnswering" else "classifier")
    if name == "Model":
        theirs = {n.removeprefix("mobilebert."): x for n, x in theirs.items()}
    return saved(folder, config, theirs)


# --- loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [D, D - 2])
def test_a_key_may_be_missing_that_no_pass_reads(words: int) -> None:
    """Of words as wide as the model, without trigrams, the class still makes what would widen them."""
    told = STUDENT | {"embedding_size": words, "hidden_size": D, "trigram_input": False}
    unused = hf.Config.from_hf({**told, "architectures": ["MobileBertForMaskedLM"]})
    turned = "mobilebert.embeddings.embedding_transformation."
    keys = [f"{turned}weight", f"{turned}bias", "cls.predictions.dense.weight"]
    assert hf.unused(unused) == (tuple(keys) if words == D else ())
    for lacking, said, status in (
        (keys, f"newly initialized: {keys}", "pass" if words == D else "fail"),
        ([*keys, "mobilebert.pooler.dense.bias"], "", "fail"),
        (keys, "size mismatch for mobilebert.embeddings.LayerNorm.weight", "fail"),
    ):
        (made,) = _loading("5.0", {"missing_keys": lacking}, [said] if said else [], hf.unused(unused))
        assert made.status == status
        assert words != D or status == "fail" or all(key in made.message for key in keys)


# --- known mistakes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], State]:
    """The student with two layers, and its conversion: (source, config.json, tensors)."""
    from safetensors.torch import load_file

    root = tmp_path_factory.mktemp("mobilebert")
    student = replace(VARIANTS["mobilebert-training"], original=mobilebert(num_hidden_layers=2))
    source = student.write(root / "in")
    api.convert(source, root / "out", family="mobilebert", check=False)
    config = json.loads((root / "out" / "config.json").read_text())
    return source, config, load_file(root / "out" / "model.safetensors")


# What is said of each: the words of the mistake, or those that the bits of the source have for it.
NAMED = {
    "trigram: the word before first, the next one last": (
        "embed", "embedding_transformation columns 0 to 25 and 52 to 77 exchanged"
    ),
    "embedding factor: the words after the extra output weights": (
        "head", "embedding factor: the words after the extra output weights"
    ),
    "query and key exchanged": ("layer 0", "self.key and attention.self.query exchanged, weight and bias"),
    "bottlenecks of input and attention exchanged": (
        "layer 0", "bottleneck.attention.dense and bottleneck.input.dense exchanged, weight and bias"
    ),
    "feed-forward networks: the last one first": ("layer 0", "ffn.0.intermediate.dense, ffn.0.output."),
    "kernels of attention not transposed": ("layer 0", "attention.output.dense left in the original's order"),
    "normalised where it is scaled and shifted alone": (
        "embed", "normalization_type layer_norm where it should be no_norm"
    ),
    "a feed-forward network left out": ("layer 0", "num_feedforward_networks 3 where it should be 4"),
    "gelu where it is relu": ("layer 0", "hidden_act gelu where it should be relu"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_a_known_mistake_is_located_and_named(
    name: str, pair: tuple[Path, dict[str, Any], State], tmp_path: Path
) -> None:
    source, config, state = pair
    how, values = (
        hf.mistakes(state, hf.Config.from_hf(config)).get(name),
        hf.config_mistakes(config).get(name, {}),
    )
    plant = how[0] if isinstance(how, tuple) else how
    wrong = state if plant is None else {**state, **plant(state)}
    assert plant is not None or values
    report = verify(saved(tmp_path / "out", config | values, wrong), source, levels="parity")
    where, words = NAMED[name]
    assert report.exit_code == 1
    assert report.headline.startswith(f"{where}: ") and words in report.headline


def test_every_mistake_has_its_words(pair: tuple[Path, dict[str, Any], State]) -> None:
    _, config, state = pair
    known = {**hf.mistakes(state, hf.Config.from_hf(config)), **hf.config_mistakes(config)}
    assert known.keys() == NAMED.keys()


# --- every class, judged by transformers ------------------------------------------------------------------

# The heads of each class, None for the first of a pass; its own output layers in the original's names.
GIVEN: dict[str, tuple[set[str | None], dict[str, int]]] = {
    "ForPreTraining": ({None, "seq_relationship_logits"}, {}),
    "ForMaskedLM": ({None}, {}),
    "ForNextSentencePrediction": ({"seq_relationship_logits"}, {}),
    "ForSequenceClassification": ({"logits"}, {"": 3}),
    "ForTokenClassification": ({"logits"}, {"": 3}),
    "ForQuestionAnswering": ({"start_logits", "end_logits"}, {"cls/squad/": 2}),
    "Model": ({None, "pooler_output"}, {}),
}


@pytest.mark.parametrize("name", GIVEN)
def test_every_class_is_judged_by_all_that_it_gives(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    heads, own = GIVEN[name]
    out = tiny(name, own, tmp_path / "out", V)
    report = verify(out, None, levels=(), against="transformers", no_source=True)
    found = report.level("transformers")
    assert {f.status for f in found} <= {"pass", "note"}
    compared = [f for f in found if f.check == "logits" and f.status == "pass"]
    assert {f.where for f in compared} == heads
    assert all(f.data["nmse"] <= 1e-10 for f in compared)
    beside = [f.message for f in found if f.check == "logits" and f.status == "note"]
    assert all("gives no last hidden state for the class" in text for text in beside)
    assert len(beside) == (None not in heads)


# --- documented values ------------------------------------------------------------------------------------

# The class of each published checkpoint with documented values.
SQUAD, NER, EMO = "ForQuestionAnswering", "ForTokenClassification", "ForSequenceClassification"
PUBLISHED: dict[str, tuple[str, dict[str, int]]] = {
    "google/mobilebert-uncased": ("ForPreTraining", {}),
    **{f"{who}/mobilebert-uncased-squad-v2": (SQUAD, {"cls/squad/": 2}) for who in ("csarron", "vumichien")},
    **{f"{who}/mobilebert-finetuned-ner": (NER, {"": 5}) for who in ("mrm8488", "vumichien")},
    **{f"{who}/emo-mobilebert": (EMO, {"": 4}) for who in ("lordtt13", "vumichien")},
}


def test_every_documented_value_is_computed_and_compared(tmp_path: Path) -> None:
    """By models that were never trained, so that each comparison fails with the number that was found."""
    file = resources.files("ckpt_tool.verify.expectations") / "mobilebert.json"
    entries = json.loads(file.read_text(encoding="utf-8"))["entries"]
    assert {e["checkpoint"] for e in entries} == PUBLISHED.keys()
    found: dict[str, tuple[str, str]] = {}
    for checkpoint, (name, own) in PUBLISHED.items():
        out = tiny(name, own, tmp_path / checkpoint, 30522)
        report = verify(out, None, levels="documented", checkpoint_id=checkpoint, no_source=True)
        found |= {f.check: (f.status, f.message) for f in report.level("documented")}
    documented = {e["id"]: e for e in entries if e["status"] == "gate"}
    assert len(documented) == 19 and documented.keys() <= found.keys()
    for entry in documented:
        status, message = found[entry]
        assert status == "fail", (entry, message)
