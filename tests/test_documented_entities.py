"""Documented values of models with entities, of values by ratio, and that every entry of the four families
that brought them runs up to its comparison or says why it does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.reference import losses
from ckpt_tool.reference.phases import NOTHING, Inputs, Phase, Ranks, passes
from ckpt_tool.verify import documented
from ckpt_tool.verify.answers import Runner
from ckpt_tool.verify.expectations import Expectation, load, parse
from ckpt_tool.verify.report import Finding
from ckpt_tool.verify.sides import Side

WIDTH = 6
Made = Callable[..., Runner]


# --- a made-up model of words and entities --------------------------------------------------------------


class Wide:
    """Its states have `width` channels, of which nothing is known but that they follow from the ids."""

    n_layers, width, labels, words, named = 0, WIDTH, 3, 40, 5


def inputs(ranks: Ranks, c: Wide) -> tuple[str, ...]:
    return ("token_types", "mask", "entity_ids", "entity_mask", "entity_positions")


def states(ids: Tensor, channels: int) -> Tensor:
    return torch.sin(ids[..., None].float() + 0.1 * torch.arange(1, channels + 1) ** 2)


def phases(ranks: Ranks, c: Wide, inputs: Inputs = NOTHING) -> list[Phase]:
    if unknown := inputs.keys() - {"token_types", "mask", "entity_ids", "entity_mask", "entity_positions"}:
        raise TypeError(f"found {unknown}")

    def embed(ids: Tensor) -> tuple[Tensor, Tensor | None]:
        words, entities = states(ids, c.width), None
        if "entity_ids" in inputs:
            entities = states(inputs["entity_ids"] + inputs["entity_positions"][..., 0], c.width)
        return words, entities

    return [Phase("embed", "embed", None, embed), Phase("head", "head", None, lambda x: x[0])]


forward, encode = passes(phases)


def logits(y: Tensor, count: int) -> Tensor:
    return y[..., :1] * torch.cos(torch.arange(count) * 1.0)


def span_logits(x: Any, ranks: Ranks, c: Wide, *, start: Tensor, end: Tensor) -> Tensor:
    first, last = (x[0].gather(1, at[..., None].expand(-1, -1, c.width)) for at in (start, end))
    return logits(first + last + x[1], c.labels)


def masked_lm(x: Any, ranks: Ranks, c: Wide) -> Any:
    words = logits(x[0], c.words)
    return words if x[1] is None else (words, logits(x[1], c.named))


HEADS: dict[str, Any] = {
    "base_model": lambda x, ranks, c: (x[0], x[0][:, 0], *([] if x[1] is None else [x[1]])),
    "masked_lm": masked_lm,
    "pretraining": lambda x, ranks, c: (logits(x[0], c.words), logits(x[0][:, 0], 2)),
    "sequence_classification": lambda x, ranks, c: logits(x[0][:, 0], c.labels),
    "token_classification": lambda x, ranks, c: logits(x[0], c.labels),
    "question_answering": lambda x, ranks, c: (x[0][..., 0], x[0][..., 1]),
    "entity_classification": lambda x, ranks, c: logits(x[1][:, 0], c.labels),
    "entity_pair_classification": lambda x, ranks, c: logits(x[1][:, 0] + x[1][:, 1], c.labels),
    "entity_span_classification": span_logits,
}


@pytest.fixture
def runner(tmp_path: Path) -> Made:
    """`runner(entities, **sizes)`: an output with that vocabulary of entities (None: without one)."""

    def made(entities: Mapping[str, int] | None = None, **sizes: int) -> Runner:
        save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
        if entities is not None:
            (tmp_path / "entity_vocab.json").write_text(json.dumps(entities))
        c: Any = SimpleNamespace(**{k: v for k, v in vars(Wide).items() if k[0] != "_"} | sizes)
        module: Any = SimpleNamespace(
            __name__="x.wide", phases=phases, inputs=inputs, encode=encode, forward=forward, HEADS=HEADS
        )
        config = {"vocab_size": c.words, "id2label": {str(k): f"L{k}" for k in range(c.labels)}}
        subject: Any = SimpleNamespace(config=config, hf=open_checkpoint(tmp_path))
        return Runner(subject, Side(module, c, (), config, ({},)), "float32", "cpu", None)

    return made


PLACES = [[[1, 2, -1], [4, -1, -1]]]
INPUT = {"input_ids": [[3, 9, 4, 7, 5]], "entity_ids": [[2, 4]], "entity_position_ids": PLACES,
         "entity_attention_mask": [[1, 1]]}  # fmt: skip


def entry(head: str, expected: dict[str, Any], **changes: Any) -> Expectation:
    made = {
        "id": "luke.test", "family": "luke", "status": "gate", "checkpoint": "x/y", "head": head,
        "input": INPUT, "input_ids_origin": "documented", "expected": expected,
        "tolerance": {"atol": 1e-5, "rtol": 0, "basis": "source"}, "dtype": "float32", "device": "any",
        "source": {"repository": "x/y", "path": "z"}, "offline_inputs": True, "notes": "", **changes,
    }  # fmt: skip
    (parsed,) = parse({"schema_version": 1, "family": "luke", "entries": [made]}, file="test")
    return parsed


def run(made: Runner, e: Expectation) -> Finding:
    try:
        return documented._run(e, made, made.subject)
    except documented.Skip as reason:
        return Finding("documented", e.id, "skipped", str(reason))
    except documented.Contradiction as reason:
        return Finding("documented", e.id, "fail", str(reason))


def encoded(made: Runner) -> tuple[Tensor, Tensor]:
    named = torch.tensor(INPUT["entity_ids"]) + torch.tensor(PLACES)[..., 0]
    return states(torch.tensor(INPUT["input_ids"]), WIDTH), states(named, WIDTH)


# --- entities -------------------------------------------------------------------------------------------


def test_states_of_entities_are_compared_without_their_padding(runner: Made) -> None:
    made = runner()
    values = encoded(made)[1][0, :, :2].clone()
    expected = {"kind": "hidden_slice", "tensor": "entity_last_hidden_state", "slice": [0, "0:2", "0:2"]}
    assert run(made, entry("base_model", {**expected, "values": values.tolist()})).status == "pass"
    values[1] += 1
    assert run(made, entry("base_model", {**expected, "values": values.tolist()})).status == "fail"
    padded = {**INPUT, "entity_attention_mask": [[1, 0]]}
    found = run(made, entry("base_model", {**expected, "values": values.tolist()}, input=padded))
    assert found.status == "pass" and "2 at padded positions are left out" in found.message
    words = {**expected, "tensor": "last_hidden_state", "values": encoded(made)[0][0, :2, :2].tolist()}
    assert run(made, entry("base_model", words)).status == "pass"


def test_entities_by_title_have_the_ids_of_the_output(runner: Made) -> None:
    titled = {k: v for k, v in INPUT.items() if k != "entity_ids"} | {"entity_tokens": ["[MASK]", "en:Oslo"]}
    values = encoded(runner())[1][0, :, :2].tolist()
    expected = {"kind": "hidden_slice", "tensor": "entity_last_hidden_state", "slice": [0, "0:2", "0:2"],
                "values": values}  # fmt: skip
    e = entry("base_model", expected, input=titled)
    assert run(runner(), e).message == "the output has no entity_vocab.json, which tells the ids of entities"
    found = run(runner({"[MASK]": 2}), e)
    assert found.message == "expected entities en:Oslo in entity_vocab.json, found none of the name"
    assert run(runner({"[MASK]": 2, "en:Oslo": 4}), e).status == "pass"
    assert run(runner({"[MASK]": 2, "en:Oslo": 3}), e).status == "fail"
    spans = {"text": "a b", "entity_spans": [[0, 1]], "input_ids": [[1, 2]], "tokenizer_task": None}
    found = run(runner(), entry("base_model", expected, input=spans))
    assert (found.status, found.message) == (
        "skipped", "the entry gives entities as spans of its text, which takes a tokenizer that marks them",
    )  # fmt: skip


def test_a_masked_entity_is_told_by_any_of_its_titles(runner: Made) -> None:
    best = int(logits(encoded(runner())[1], 5)[0, 1].argmax())
    vocabulary = {"de:Wien": best, "en:Vienna": best, "en:Graz": best + 1}
    expected = {"kind": "label", "tensor": "entity_logits", "index": [0, 1], "values": "en:Vienna"}
    e = entry("entity_prediction", expected)
    assert run(runner(), e).status == "skipped"
    assert run(runner(vocabulary), e).status == "pass"
    found = run(runner(vocabulary), entry("entity_prediction", {**expected, "values": "en:Graz"}))
    assert (found.status, found.message) == ("fail", "expected en:Graz, found en:Vienna")


def test_mentions_of_any_class_but_the_first(runner: Made) -> None:
    asked = {**INPUT, "text": "Ada in Oslo", "entity_spans": [[0, 3], [7, 11]],
             "entity_start_positions": [[1, 4]], "entity_end_positions": [[2, 4]]}  # fmt: skip
    words, named = encoded(runner())
    classes = logits(words[:, [1, 4]] + words[:, [2, 4]] + named, 3)[0].argmax(-1).tolist()
    want = [[w, f"L{k}"] for w, k in zip(("Ada", "Oslo"), classes, strict=True) if k]
    assert want  # the model finds something
    expected = {"kind": "labels", "op": "argmax of each; non-zero classes only", "values": want}
    assert run(runner(), entry("entity_span_classification", expected, input=asked)).status == "pass"
    expected["values"] = [["Ada", "L0"]]
    assert run(runner(), entry("entity_span_classification", expected, input=asked)).status == "fail"
    found = run(runner(), entry("entity_classification", {"kind": "label", "values": "L0"}, input=asked))
    assert found.message == "the head entity_classification takes no end, start"


def test_losses_of_words_and_entities(runner: Made) -> None:
    words, named = encoded(runner())
    both = {"labels": [[-100, 9, -100, 7, -100]], "entity_labels": [[4, -100]]}
    true = losses.labelled(logits(words, 40), torch.tensor(both["labels"]))
    true += losses.labelled(logits(named, 5), torch.tensor(both["entity_labels"]))
    e = entry("masked_lm", {"kind": "loss", "values": float(true)}, labels=both)
    assert run(runner(), e).status == "pass"
    assert run(runner(), replace(e, labels={"entity_labels": [[4, -100]]})).status == "fail"
    assert "its input has none" in run(runner(), replace(e, input={"input_ids": INPUT["input_ids"]})).message
    y = logits(named[:, 0], 3)
    for labels, own in (([1], losses.labelled), ([[0.0, 1.0, 1.0]], losses.classification)):
        value = float(own(y, torch.tensor(labels)))  # type: ignore[operator]
        of_one = entry("entity_classification", {"kind": "loss", "values": value}, labels={"labels": labels})
        assert run(runner(), of_one).status == "pass"


# --- numbers of very different sizes --------------------------------------------------------------------


@pytest.mark.parametrize(("off", "status"), [(0.0, "pass"), (9e-4, "pass"), (1.2e-3, "fail")])
def test_a_ratio_is_held_for_every_number(off: float, status: str, runner: Made) -> None:
    made = runner()
    right = encoded(made)[0][0, :2, :3].double()
    small = right.abs().flatten().argmin()  # an absolute bar would not see it
    values = right.flatten().clone()
    values[small] *= 1 + off
    expected = {"kind": "hidden_slice", "slice": [0, "0:2", "0:3"], "values": values.view(2, 3).tolist()}
    ratio = {"atol": 0, "rtol": 1e-3, "basis": "source", "mode": "ratio"}
    found = run(made, entry("base_model", expected, tolerance=ratio))
    assert (found.status, found.bar) == (status, 1e-3)
    assert found.measured == pytest.approx(off, abs=1e-6)
    plain = run(made, entry("base_model", expected, tolerance={"atol": 0, "rtol": 1e-3, "basis": "source"}))
    assert plain.bar is not None and plain.bar >= 5e-4  # float32 of other hardware


# --- every entry ----------------------------------------------------------------------------------------

NO_TOKENIZER = "the output has no tokenizer.json that can be read"
NO_ENTITIES = "the output has no entity_vocab.json, which tells the ids of entities"
SKIPPED = {
    "canine.tokenizer.life_is_like": NO_TOKENIZER,
    "mega.conversion.original_vs_hf": "a rule in words, about the library that generates: allclose(",
    "mluke.base.tokyo.masked_word": "the documented words have no ids, and the output has no tokenizer.json",
    "mluke.base.tokyo.masked_entity": NO_ENTITIES,
    "luke.large.open_entity.label": NO_ENTITIES,
    "luke.large.tacred.label": NO_ENTITIES,
    "luke.large.conll2003.spans": NO_ENTITIES,
}


def reason(e: Expectation) -> str | None:
    if e.head == "tokenizer":
        return SKIPPED.get(e.id, NO_TOKENIZER)
    return SKIPPED.get(e.id)


@pytest.mark.parametrize("family", ["mobilebert", "canine", "mega", "mluke"])
def test_every_entry_runs_to_its_comparison_or_says_why_not(family: str, runner: Made) -> None:
    compared = 0
    for e in load(family):
        shape = e.expected.shape
        made = runner(words=1_114_112 if family == "canine" else 250_100, width=shape[-1] if shape else 8)
        if e.expected.kind == "logits_slice":
            assert shape is not None
            made = runner(words=shape[-1])
        found, why = run(made, e), reason(e)
        if why is None:
            compared += 1
            assert found.status in ("pass", "fail"), (e.id, found.message)
            assert "vocabulary" not in found.message and (found.bar or "expected" in found.message), found
        else:
            assert found.status == "skipped" and found.message.startswith(why), (e.id, found.message)
    assert compared == {"mobilebert": 19, "canine": 4, "mega": 4, "mluke": 6}[family]


def test_entities_of_published_vocabularies_make_the_rest_run(runner: Made) -> None:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "[MASK2]": 3, "en:Japan": 4}
    left = [e for e in load("mluke") if SKIPPED.get(e.id) == NO_ENTITIES]
    for e in left:
        found = run(runner(vocabulary, words=250_100), e)
        assert found.status in ("pass", "fail") and "expected" in found.message, (e.id, found)
    assert len(left) == 4


# --- inputs that a model has no room for ----------------------------------------------------------------


def test_an_input_of_another_model_is_told_and_breaks_nothing(runner: Made, tmp_path: Path) -> None:
    """More positions than the table has, no row for an entity, a tensor that is not there, sizes that do not
    fit: the first two show that it is another model, of the others nothing is known."""
    e = entry("base_model", {"kind": "hidden_slice", "values": [[[0.0]]], "slice": ["0:1", "0:1", "0:1"]})
    made = runner()
    save_file({"char_position_embeddings.weight": torch.zeros(4, 2)}, tmp_path / "model.safetensors")
    short = replace(made, subject=SimpleNamespace(config={}, hf=open_checkpoint(tmp_path)))  # type: ignore
    found = run(short, e)
    assert (found.status, found.message) == ("fail", "expected positions for 5 tokens, found 4")
    for error, status, words in (
        (IndexError("index out of range in self"), "fail", "found a shorter table"),
        (KeyError("luke.pooler.dense.weight"), "skipped", "the output has no luke.pooler.dense.weight"),
        (RuntimeError("shapes do not fit"), "skipped", "RuntimeError: shapes do not fit"),
    ):

        def broken(*given: Any, error: Exception = error, **more: Any) -> Any:
            raise error

        side = replace(made.side, module=SimpleNamespace(**vars(made.side.module) | {"encode": broken}))
        found = run(replace(made, side=side), e)
        assert found.status == status and words in found.message


def test_a_tokenizer_encodes_without_special_tokens_where_a_value_says_so() -> None:
    class Words:
        def encode(self, text: str, add_special_tokens: bool) -> Any:
            return SimpleNamespace(ids=[0, 7, 2] if add_special_tokens else [7])

    expected = {"kind": "token_ids", "values": [7]}
    told = {"text": "a", "add_special_tokens": False}
    e = entry("tokenizer", expected, input=told, offline_inputs=False, input_ids_origin=None)
    assert documented._encode(e, Words()).status == "pass"
