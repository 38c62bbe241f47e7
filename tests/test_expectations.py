"""The documented values: the data is sound, the loader refuses what is not, and status rules hold."""

from __future__ import annotations

import copy
import json
from importlib import resources
from typing import Any

import numpy as np
import pytest

from ckpt_tool.errors import CkptToolError
from ckpt_tool.verify.expectations import FAMILIES, Expectation, load, load_all, match, parse


def raw(family: str) -> dict[str, Any]:
    text = resources.files("ckpt_tool.verify.expectations").joinpath(f"{family}.json").read_text("utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


@pytest.mark.parametrize("family", FAMILIES)
def test_every_entry_of_a_family_is_read(family: str) -> None:
    entries = load(family)
    assert [e.id for e in entries] == [e["id"] for e in raw(family)["entries"]]
    own = {family, *{"megatron_gpt2": ["gpt2"], "mluke": ["luke"]}.get(family, [])}
    assert {e.family for e in entries} == own
    assert all(e.id.startswith(f"{e.family}.") for e in entries)


def test_ids_are_unique_over_all_families() -> None:
    ids = [e.id for e in load_all()]
    assert len(ids) == len(set(ids)) == 19 + 13 + 57 + 4 + 17 + 15 + 7 + 15 + 19 + 5 + 5 + 22


def test_a_family_without_documented_values_has_no_entries() -> None:
    assert load("no-such-family") == ()


def test_only_status_gate_decides() -> None:
    entries = load_all()
    assert {e.status for e in entries if e.gates} == {"gate"}
    doubtful = [e for e in entries if e.status in ("weak", "invalid")]
    assert doubtful
    assert not any(e.gates or e.shown for e in doubtful)


@pytest.mark.parametrize("entry", [e for e in load_all() if e.expected.index is not None], ids=lambda e: e.id)
def test_values_fit_the_part_of_the_tensor_they_describe(entry: Any) -> None:
    shape = entry.expected.shape or (len(entry.input_ids), len(entry.input_ids[0]), 1000)
    logits = np.zeros(shape)
    assert logits[entry.expected.index].shape == np.shape(entry.expected.values)


def test_mistral_fp32_slice_reads_as_documented() -> None:
    (entry,) = (e for e in load("mistral") if e.id == "mistral.7b.logits_slice_fp32")
    assert entry.gates
    assert entry.expected.index == (0, 0, slice(0, 30))
    assert entry.expected.values[2:4] == [-0.1052, -4.72]
    assert (entry.tolerance.atol, entry.tolerance.rtol) == (5e-4, 0.0)
    assert entry.input_ids == [[1, 306, 4658, 278, 6593, 310, 2834, 338]]


@pytest.mark.parametrize(
    ("checkpoint", "family", "some"),
    [
        ("mistralai/Mistral-7B-v0.1", "mistral", "mistral.7b.original_demo_1"),
        ("mistral-7B-v0.1", "mistral", "mistral.7b.logits_slice_fp32"),
        ("meta-llama/Llama-2-7b", "llama", "llama.2_7b.fp16_sm8x.logits_slice"),
        ("llama-2-7b", "llama", "llama.2_7b.relativity_ketchup_fp16"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama", "llama.3_1_8b_instruct.french_revolution_cuda"),
        ("hf-internal-testing/Mixtral-tiny", "mixtral", "mixtral.tiny.logits_row0_sm7x"),
        ("CodeLlama-7b", "llama", "llama.code_7b.infill.greedy_ids"),
        ("nvidia/megatron-gpt2-345m", "megatron_gpt2", "megatron_gpt2.345m.logits_diagonal"),
        ("megatron_gpt2_345m_v0_0.zip", "megatron_gpt2", "megatron_gpt2.345m.logits_diagonal"),
        ("megatron_bert_345m_v0_1_cased", "megatron_bert", "megatron_bert.cased_345m.nsp_random_pair"),
        (
            "megatron_bert_345m_v0_1_uncased.zip",
            "megatron_bert",
            "megatron_bert.uncased_345m.last_hidden_state",
        ),
        ("openai-community/gpt2", "gpt2", "gpt2.tokenizer.hello_world"),
        ("google/mobilebert-uncased", "mobilebert", "mobilebert.base.last_hidden_state"),
        ("canine-s", "canine", "canine.base.tydiqa_swahili.pooler_output"),
        ("mnaylor/mega-base-wikitext", "mega", "mega.mlm.logits_slice"),
        ("studio-ousia/mluke-base", "mluke", "mluke.base.iso639.entity_hidden"),
        ("studio-ousia/luke-large", "luke", "luke.large.ivanovic.word_hidden"),
    ],
)
def test_a_checkpoint_finds_its_entries(checkpoint: str, family: str, some: str) -> None:
    found = match([checkpoint])
    assert some in [e.id for e in found]
    assert {e.family for e in found} == {family}


@pytest.mark.parametrize(
    "stranger",
    [
        "someone/Mistral-7B-v0.1",
        "someone/gpt2",
        "Llama-2-7b-chat",
        "mistralai/Mistral-7B-v0.2",
        "CodeLlama-7b-Python",
        "",
    ],
)
def test_another_model_finds_none(stranger: str) -> None:
    assert match([stranger]) == []


def test_several_ids_do_not_repeat_an_entry() -> None:
    once = match(["mistralai/Mistral-7B-v0.1"])
    assert match(["mistralai/Mistral-7B-v0.1", "mistral-7b-v0.1"]) == once


def entry(family: str, id: str) -> Expectation:
    (found,) = (e for e in load(family) if e.id == id)
    return found


def test_points_and_inequalities_are_read() -> None:
    diagonal = entry("megatron_gpt2", "megatron_gpt2.345m.logits_diagonal").expected
    assert diagonal.points is not None and len(diagonal.points) == len(diagonal.values) == 19
    assert diagonal.points[-1] == (0, 8, 50256) and diagonal.shape == (1, 9, 50257)
    pair = entry("megatron_bert", "megatron_bert.cased_345m.nsp_random_pair").expected
    assert pair.values is None
    assert (pair.more["left"], pair.more["op"], pair.more["right"]) == ([0, 0], "<", [0, 1])


@pytest.mark.parametrize(
    ("family", "number", "change"),
    [
        ("megatron_gpt2", 0, {"points": [[0, 0, 0]]}),
        ("megatron_gpt2", 0, {"points": []}),
        ("megatron_gpt2", 0, {"points": [[0, 9, 0]] * 19}),
        ("megatron_gpt2", 0, {"points": [[0, 0]] * 19}),
        ("megatron_bert", 1, {"op": "!="}),
        ("megatron_bert", 1, {"left": [0]}),
        ("megatron_bert", 1, {"right": None}),
    ],
)
def test_faulty_places_are_refused(family: str, number: int, change: dict[str, Any]) -> None:
    data = raw(family)
    data["entries"][number]["expected"] |= change
    with pytest.raises(CkptToolError) as caught:
        parse(data, file="x.json")
    assert [p.where for p in caught.value.problems] == [data["entries"][number]["id"]]


def broken(change: str) -> dict[str, Any]:
    data = copy.deepcopy(raw("mistral"))
    first, second = data["entries"][:2]
    match change:
        case "version":
            data["schema_version"] = 2
        case "status":
            first["status"] = "maybe"
        case "missing field":
            del first["dtype"]
        case "unknown field":
            first["dtpye"] = "float32"
        case "twice":
            data["entries"].append(second)
        case "values":
            second["expected"]["values"].pop()
        case "ragged":
            first["expected"]["values"] = [[1.0, 2.0], [1.0]]
        case "nan":
            first["expected"]["values"][0][0] = float("nan")
        case "slice":
            second["expected"]["slice"] = [0, 0, "all"]
        case "axes":
            second["expected"]["slice"] = [0, "0:30"]
        case "tolerance":
            first["tolerance"] = {"atol": 0, "rtol": 0, "basis": "source"}
        case "ids":
            first["input"]["input_ids"] = [1, 306]
        case "offline":
            first["offline_inputs"] = False
        case "mode":
            first["tolerance"]["mode"] = "relative"
        case "ratio with atol":
            first["tolerance"] = {"atol": 1e-3, "rtol": 1e-3, "basis": "source", "mode": "ratio"}
        case "source":
            first["source"] = {"path": "somewhere"}
    return data


@pytest.mark.parametrize(
    "change",
    [
        "version",
        "status",
        "missing field",
        "unknown field",
        "twice",
        "values",
        "ragged",
        "nan",
        "slice",
        "axes",
        "tolerance",
        "ids",
        "offline",
        "mode",
        "ratio with atol",
        "source",
    ],
)
def test_a_faulty_file_is_refused(change: str) -> None:
    with pytest.raises(CkptToolError) as caught:
        parse(broken(change), file="mistral.json")
    assert {p.kind for p in caught.value.problems} == {"bad-expectations"}
    assert {p.file for p in caught.value.problems} == {"mistral.json"}


def test_all_faults_are_told_together() -> None:
    data = broken("status")
    data["entries"][1]["expected"]["kind"] = "guess"
    with pytest.raises(CkptToolError) as caught:
        parse(data, file="mistral.json")
    assert [p.where for p in caught.value.problems] == [
        "mistral.7b.logits_mean_fp32",
        "mistral.7b.logits_slice_fp32",
    ]
