"""Models with more than ids -> logits: token types, padding, several heads, and documented values of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tool.reference import hf_megatron_bert
from ckpt_tool.verify import documented, verify
from ckpt_tool.verify.expectations import Expectation, archived, parse
from ckpt_tool.verify.prompts import with_inputs
from ckpt_tool.verify.report import Finding, Report
from ckpt_tool.verify.sides import Side

Written = Callable[[str], Path]
BERT, GPT2 = "bert-v2-tp2", "gpt2-v2-tp2"
FILE = json.loads(resources.files("ckpt_tool.verify.expectations").joinpath("megatron_bert.json").read_text())
NEXT_SENTENCE = "seq_relationship_logits"


def one(report: Report, check: str, level: str = "parity", where: str | None = None) -> Finding:
    (found,) = (f for f in report.level(level) if f.check == check and f.where == where)
    return found


def failed(report: Report) -> list[tuple[str, str, str | None]]:
    return [(f.level, f.check, f.where) for f in report.findings if f.status == "fail"]


# --- parity of every head, with every input -------------------------------------------------------------


def test_every_head_is_compared_with_segments_and_padding(originals: Written, conversions: Written) -> None:
    pytest.importorskip("transformers")
    report = verify(conversions(BERT), originals(BERT), levels="parity", against="transformers")
    assert failed(report) == []
    assert all(f.check != "warnings" for f in report.findings)
    phases = [row[0] for row in one(report, "lockstep").tables[0].rows]
    assert phases[-2:] == ["head", NEXT_SENTENCE]
    for level in ("parity", "transformers"):
        for where in (None, NEXT_SENTENCE):
            found = one(report, "logits", level, where)
            assert found.data["top1"] == 1.0 and found.data["nmse"] <= 1e-10
            tokens = {row[0]: row[1] for row in found.tables[0].rows}
            assert {"segments", "padded", "masked"} <= tokens.keys()
            # two rows of 40 and 18 tokens: 22 padded positions are not compared
            assert tokens["padded"] == (2 if where else 58)
    planted = " ".join(str(row[1]) for row in one(report, "negative control").tables[0].rows)
    for words in (
        "checkpoint_version 0", "checkpoint_version 1.0", "hidden_act gelu_new", "layer_norm_eps",
        "token_type_embeddings: the two rows exchanged", "cls.seq_relationship: the two rows exchanged",
        "bert.pooler.dense transposed", "vocabulary shifted",
    ):  # fmt: skip
        assert words in planted


@pytest.mark.usefixtures("few_prompts")
def test_the_judge_takes_over_the_passes_that_parity_made(
    originals: Written, conversions: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where parity ran a prompt through every layer, and only there; it finds what it finds alone."""
    pytest.importorskip("transformers")
    passes, outputs = [], Side.outputs
    monkeypatch.setattr(Side, "outputs", lambda *a: (passes.append(1), outputs(*a))[1])

    def judged(**asked: Any) -> tuple[int, list[tuple[str, str, str | None, float | None]]]:
        passes.clear()
        report = verify(conversions(BERT), originals(BERT), against="transformers", **asked)
        found = report.level("transformers")
        return len(passes), [(f.check, f.status, f.where, f.measured) for f in found]

    computed, alone = judged(levels=())
    assert computed == 10 and [f[0] for f in alone] == ["load", "logits", "logits"]
    assert judged(levels="parity") == (0, alone)
    assert judged(levels="parity", mode="quick") == (computed, alone)


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize(
    ("function", "dropped", "phase", "prompt"),
    [("layer", "mask", "layer 0", "padded"), ("embed", "token_types", "embed", "segments")],
)
def test_a_side_that_ignores_an_input_is_caught(
    function: str, dropped: str, phase: str, prompt: str,
    originals: Written, conversions: Written, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    right = getattr(hf_megatron_bert, function)

    def ignoring(*args: Any, token_types: Any = None, mask: Any = None) -> torch.Tensor:
        return right(*args)

    monkeypatch.setattr(hf_megatron_bert, function, ignoring)
    report = verify(conversions(BERT), originals(BERT), levels="parity")
    lockstep = one(report, "lockstep", where=phase)
    assert lockstep.status == "fail"
    assert f"worst in prompt {prompt}" in lockstep.message or "worst in prompt padded" in lockstep.message


def test_a_model_of_ids_alone_gets_no_further_inputs(originals: Written, conversions: Written) -> None:
    report = verify(conversions(GPT2), originals(GPT2), levels="parity")
    assert failed(report) == []
    names = [row[0] for row in one(report, "logits").tables[0].rows]
    assert not {"segments", "padded"} & set(names)
    rows = {"long": [1] * 60, "other": [2] * 9}
    assert set(with_inputs(rows, (), {})) == set(rows)
    assert set(with_inputs(rows, ("mask",), {})) == {*rows, "padded"}
    padded = with_inputs(rows, ("mask", "token_types"), {"pad_token_id": 5})["padded"]
    assert padded.ids[1] == [2] * 9 + [5] * 31
    assert padded.given["mask"][1] == [1] * 9 + [0] * 31


# --- documented values of every kind, computed by transformers ------------------------------------------

IDS = [[2, 17, 40, 9, 33, 8, 21], [5, 11, 60, 3, 44, 0, 0]]
MASK = [[1] * 7, [1, 1, 1, 1, 1, 0, 0]]
TYPES = [[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0]]
INPUT = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": TYPES}
CLASSES = {
    "base_model": "MegatronBertModel",
    "pretraining": "MegatronBertForPreTraining",
    "masked_lm": "MegatronBertForMaskedLM",
    "next_sentence_prediction": "MegatronBertForNextSentencePrediction",
    "sequence_classification": "MegatronBertForSequenceClassification",
    "multiple_choice": "MegatronBertForMultipleChoice",
    "token_classification": "MegatronBertForTokenClassification",
    "question_answering": "MegatronBertForQuestionAnswering",
}


def entry(head: str, expected: dict[str, Any], **changes: Any) -> Expectation:
    made = {
        "id": "megatron_bert.test", "family": "megatron_bert", "status": "gate", "checkpoint": "test/tiny",
        "head": "masked_lm", "input": INPUT, "input_ids_origin": "documented", "expected": expected,
        "tolerance": {"atol": 1e-5, "rtol": 0, "basis": "source"}, "dtype": "float32", "device": "any",
        "source": {"repository": "x/y", "path": "z"}, "offline_inputs": True, "notes": "", **changes,
    }  # fmt: skip
    (parsed,) = parse({**FILE, "entries": [made]}, file="test")
    return replace(parsed, head=head)  # the schema has no multiple choice


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """`model(head)`: a tiny random model of transformers' own making, and its folder."""
    transformers = pytest.importorskip("transformers")
    root, known = tmp_path_factory.mktemp("heads"), dict[str, tuple[Path, Any]]()

    def made(head: str) -> tuple[Path, Any]:
        if head not in known:
            config = transformers.MegatronBertConfig(
                vocab_size=70, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=40, max_position_embeddings=32, layer_norm_eps=1e-4,
                id2label={0: "dog", 1: "cat"} | ({} if head == "question_answering" else {2: "bird"}),
            )  # fmt: skip
            torch.manual_seed(4)
            built = getattr(transformers, CLASSES[head])(config).eval()
            for parameter in built.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
            built.save_pretrained(root / head)
            known[head] = root / head, built
        return known[head]

    return made


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finding]:
    def run_entry(folder: Path, expectation: Expectation, dtype: str = "float32") -> Finding:
        monkeypatch.setattr(documented, "match", lambda ids: [expectation])
        report = verify(folder, levels="documented", checkpoint_id="test/tiny", compute_dtype=dtype)
        return one(report, expectation.id, "documented")

    return run_entry


def judged(built: Any, **labels: Any) -> Any:
    ids, mask, types = (torch.tensor(x) for x in (IDS, MASK, TYPES))
    if type(built).__name__.endswith("MultipleChoice"):
        ids, mask, types = ids[None], mask[None], types[None]
    with torch.no_grad():
        return built(
            input_ids=ids, attention_mask=mask, token_type_ids=types,
            **{k: torch.tensor(v) for k, v in labels.items()},
        )  # fmt: skip


MASKED = [[-100, 17, -100, 9, -100, -100, 21], [-100, 11, -100, -100, 44, -100, -100]]
LABELS: dict[str, dict[str, Any]] = {
    "masked_lm": {"labels": MASKED},
    "pretraining": {"labels": MASKED, "next_sentence_label": [1, 0]},
    "next_sentence_prediction": {"next_sentence_label": [1, 0]},
    "sequence_classification": {"labels": [2, 0]},
    "multiple_choice": {"labels": [1]},
    "token_classification": {"labels": [[0, 2, 1, 1, 0, 2, -100], [1, 0, 2, -100, 1, -100, -100]]},
    "question_answering": {"start_positions": [1, 3], "end_positions": [4, 4]},
}


@pytest.mark.parametrize("head", LABELS)
def test_losses_of_every_head(head: str, model: Any, run: Callable[..., Finding]) -> None:
    folder, built = model(head)
    labels = LABELS[head]
    passed = {"labels": labels["next_sentence_label"]} if head == "next_sentence_prediction" else labels
    true = float(judged(built, **passed).loss)
    expected = {"kind": "loss", "values": round(true, 2), "round_digits": 2}
    assert run(folder, entry(head, expected, labels=labels)).status == "pass"
    wrong = run(folder, entry(head, {**expected, "values": true + 0.02}, labels=labels))
    assert wrong.status == "fail" and wrong.message.startswith("expected the documented loss ")
    assert wrong.measured == pytest.approx(0.02, abs=1e-4)


@pytest.mark.parametrize(
    ("head", "tensor", "kind"),
    [
        ("base_model", "last_hidden_state", "hidden_slice"),
        ("base_model", "pooler_output", "hidden_slice"),
        ("pretraining", "prediction_logits", "logits_slice"),
        ("pretraining", "seq_relationship_logits", "logits_slice"),
        ("masked_lm", "logits", "logits_slice"),
        ("question_answering", "end_logits", "logits_slice"),
    ],
)
def test_points_of_every_result(
    head: str, tensor: str, kind: str, model: Any, run: Callable[..., Finding]
) -> None:
    folder, built = model(head)
    result = judged(built)[tensor]
    points = [[0] * result.ndim, [1, *[1] * (result.ndim - 1)]]
    values = [float(result[tuple(p)]) for p in points]
    expected = {"kind": kind, "tensor": tensor, "shape": list(result.shape), "points": points,
                "values": values}  # fmt: skip
    assert run(folder, entry(head, expected)).status == "pass"
    wrong = run(folder, entry(head, {**expected, "values": [values[0], values[1] + 0.01]}))
    assert wrong.status == "fail"
    assert wrong.bar == pytest.approx(5e-4 if kind == "hidden_slice" else 1e-3)
    assert wrong.message.startswith(f"expected 2 documented values of {kind}, computed in float32, within ")
    assert "found 1 of them outside, the farthest 0.0" in wrong.message


def test_padded_positions_of_a_slice_are_left_out(model: Any, run: Callable[..., Finding]) -> None:
    folder, built = model("base_model")
    values = judged(built).last_hidden_state[:, 3:, :2].clone()
    values[1, 2:] = 99.0  # positions 5 and 6 of the second row are padding
    expected = {"kind": "hidden_slice", "slice": ["0:2", "3:7", "0:2"], "values": values.tolist()}
    found = run(folder, entry("base_model", expected))
    assert found.status == "pass"
    assert "4 at padded positions are left out" in found.message
    only = {"kind": "hidden_slice", "slice": [1, "5:7", 0], "values": values[1, 2:, 0].tolist()}
    assert "padded positions only" in run(folder, entry("base_model", only)).message


def test_float16_values_are_held_to_the_policy_in_float32(model: Any, run: Callable[..., Finding]) -> None:
    folder, built = model("base_model")
    value = float(judged(built).last_hidden_state[0, 0, 0])
    expected = {"kind": "hidden_slice", "slice": [0, 0, "0:1"], "values": [value + 0.015]}
    found = run(folder, entry("base_model", expected, dtype="float16"))
    assert (found.status, found.bar) == ("pass", 2e-2)
    expected["values"] = [value + 0.025]
    assert run(folder, entry("base_model", expected, dtype="float16")).status == "fail"


@pytest.mark.parametrize("head", ["next_sentence_prediction", "pretraining"])
def test_inequalities(head: str, model: Any, run: Callable[..., Finding]) -> None:
    """That of the next sentence head is answered by a model for pretraining too."""
    folder, built = model(head)
    output = judged(built)
    logits = output.logits if "logits" in output else output.seq_relationship_logits
    low, high = sorted(([0, 0], [0, 1]), key=lambda at: float(logits[tuple(at)]))
    expected = {"kind": "inequality", "tensor": "logits", "left": low, "op": "<", "right": high}
    assert run(folder, entry("next_sentence_prediction", expected)).status == "pass"
    expected["op"] = ">"
    assert run(folder, entry("next_sentence_prediction", expected)).status == "fail"


def test_labels_are_those_of_the_config(model: Any, run: Callable[..., Finding]) -> None:
    classes = ["dog", "cat", "bird"]
    folder, built = model("token_classification")
    alone = {"input": {"input_ids": IDS[:1]}}
    with torch.no_grad():
        found = built(torch.tensor(IDS[:1]), attention_mask=torch.ones(1, 7, dtype=torch.long)).logits
    names = [classes[i] for i in found[0].argmax(-1).tolist()]
    expected = {"kind": "labels", "op": "argmax", "tensor": "logits", "values": names}
    assert run(folder, entry("token_classification", expected, **alone)).status == "pass"
    own = {"labels": {"rule": "labels are the model's own argmax predictions"}}
    loss = float(torch.nn.functional.cross_entropy(found[0], found[0].argmax(-1)))
    assert (
        run(folder, entry("token_classification", {"kind": "loss", "values": loss}, **alone, **own)).status
        == "pass"
    )
    expected["values"] = [*names[:-1], next(c for c in classes if c != names[-1])]
    assert run(folder, entry("token_classification", expected, **alone)).status == "fail"
    folder, built = model("sequence_classification")
    name = classes[int(judged(built).logits[0].argmax())]
    both = [name, classes[int(judged(built).logits[1].argmax())]]
    assert run(folder, entry("sequence_classification", {"kind": "labels", "values": both})).status == "pass"


def test_the_likeliest_words_and_the_answer(model: Any, run: Callable[..., Finding]) -> None:
    folder, built = model("masked_lm")
    best = judged(built).logits[0, 3].topk(5).indices.tolist()
    expected = {"kind": "labels", "op": "top5", "position": 3, "values": ["w"] * 5, "derived_token_ids": best}
    assert run(folder, entry("masked_lm", expected)).status == "pass"
    expected["derived_token_ids"] = best[::-1]
    assert run(folder, entry("masked_lm", expected)).status == "fail"
    word = {"kind": "text", "op": "argmax", "position": 3, "values": "w", "derived_token_ids": best[:1]}
    assert run(folder, entry("masked_lm", word)).status == "pass"
    folder, built = model("question_answering")
    made = judged(built)
    span = [int(made.start_logits[0].argmax()), int(made.end_logits[0].argmax())]
    answer = {"kind": "text", "values": "w", "derived_answer_span": span}
    assert run(folder, entry("question_answering", answer)).status == "pass"
    answer["derived_answer_span"] = [span[0], span[1] + 1]
    assert run(folder, entry("question_answering", answer)).status == "fail"


@pytest.mark.parametrize("normalize", [True, False])
def test_transition_scores_as_transformers_computes_them(
    normalize: bool, conversions: Written, run: Callable[..., Finding]
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = conversions(GPT2)
    built = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.tensor([[5, 17, 40]])
    made = built.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False, pad_token_id=0,
        eos_token_id=None, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    scores = built.compute_transition_scores(made.sequences, made.scores, normalize_logits=normalize)
    new = made.sequences[0, 3:].tolist()
    expected = {"kind": "transition_scores", "normalize_logits": normalize, "token_ids": new,
                "values": scores[0].tolist()}  # fmt: skip
    # padding on the left is no part of the prompt
    padded = {"input_ids": [[0, 0, 5, 17, 40]], "attention_mask": [[0, 0, 1, 1, 1]]}
    changes = {"input": padded, "generate": {"do_sample": False, "max_new_tokens": 5}}
    assert run(folder, entry("generation", expected, **changes)).status == "pass"
    expected["values"] = [*scores[0].tolist()[:-1], float(scores[0, -1]) + 0.01]
    assert run(folder, entry("generation", expected, **changes)).status == "fail"
    assert run(folder, entry("generation", {**expected, "token_ids": new[::-1]}, **changes)).status == "fail"


def test_a_head_that_is_not_there_is_skipped(model: Any, run: Callable[..., Finding]) -> None:
    folder, _ = model("masked_lm")
    expected = {"kind": "logits_slice", "slice": [0, 0], "values": 1.0}
    found = run(folder, entry("next_sentence_prediction", expected))
    assert found.status == "skipped"
    assert "does not hold the head next_sentence_prediction" in found.message


# --- published checkpoints ------------------------------------------------------------------------------


def test_a_download_is_known_by_its_name_and_its_vocabulary() -> None:
    assert archived("megatron_bert_345m_v0_1_cased.zip", 28996) == "nvidia/megatron-bert-cased-345m"
    assert archived("megatron_bert_345m_v0_1_cased.zip", 30522) is None  # a link once led to the other one
    assert archived("megatron_gpt2_345m_v0_0.zip", 50257) == "nvidia/megatron-gpt2-345m"
    assert archived("model_optim_rng.pt", 50257) is None


def test_a_published_name_finds_the_entries_and_the_masked_word(conversions: Written) -> None:
    report = verify(
        conversions("bert-ngc-cased"), levels="documented", checkpoint_id="megatron_bert_345m_v0_1_cased.zip"
    )
    other = one(report, "documented values", "documented")
    assert other.status == "fail" and "megatron_bert.cased_345m.nsp_random_pair" in other.data["ids"]
    assert other.message.startswith("this is not ") and "325 words" in other.message
    masked = one(report, "masked word", "documented")
    assert masked.status == "note"
    assert masked.message.startswith("The capital of France is [MASK]. -> ")
