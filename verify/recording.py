"""`verify --record FILE`: what a trusted model computes, as a file of expectations for later runs to be held
against. The prompts are verify's own short ones, so that no tokenizer is needed; the schema is that of the
documented values (verify/expectations)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ckpt_tool import __version__, reference
from ckpt_tool.errors import fail
from ckpt_tool.reference import NotComputed
from ckpt_tool.reference.hf_heads import kind_of
from ckpt_tool.verify.answers import RESULTS, Batch, Contradiction, Runner, Skip
from ckpt_tool.verify.compute import UNREADABLE, as_read, computing_for, lengths_of
from ckpt_tool.verify.expectations import SCHEMA_VERSION, Expectation, Expected, Tolerance, parse
from ckpt_tool.verify.generate_run import Request, decodes, run
from ckpt_tool.verify.prompts import positions, prompts_for, tokenizer_of
from ckpt_tool.verify.sides import converted_side
from ckpt_tool.verify.subject import Subject, opened

LONGEST = 64  # tokens of a prompt that is recorded
SHOWN = 8  # of the last positions, and of the first channels
STEPS = 16  # tokens that are generated
ATOL = 1e-3
HEADS = ("causal_lm", "masked_lm", "base_model")  # tried in this order, but for classes of another head
OF_CLASS = (
    "sequence_classification",
    "token_classification",
    "question_answering",
    "multiple_choice",
    "next_sentence_prediction",
)
# How it goes on: greedily, and for the first prompt drawn and by beams too. Nothing ends a row, and no ban or
# penalty of the model acts.
PLAIN: dict[str, Any] = {"max_new_tokens": STEPS, "eos_token_id": None, "rules": "5"}
PLAIN |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
Searches = Mapping[str, dict[str, Any]]
GREEDY: Searches = {"": {**PLAIN, "do_sample": False}}
SEARCHES: Searches = {
    **GREEDY,
    ".sampled": {**PLAIN, "do_sample": True, "seed": 0, "top_k": 20, "top_p": 1.0, "temperature": 1.0},
    ".beams": {**PLAIN, "do_sample": False, "num_beams": 4, "num_return_sequences": 2},
}


def record(
    out: str | os.PathLike[str],
    name: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    settings: Mapping[str, Any] | None = None,
) -> bytes:
    """The file's content for the model in `out`, which is called `name` there. Kind `unsupported` where no
    reading of it can compute."""
    with opened(out, None, settings, look_for_source=False) as subject, computing_for(subject.output):
        runner = _runner(subject, dtype, device)
        entries = list(_entries(subject, runner, name, dtype, device))
    if not entries:
        fail("unsupported", "expected a head that can be recorded, found none", file=os.fspath(out))
    data = {
        "schema_version": SCHEMA_VERSION,
        "family": entries[0]["family"],
        "wider": {dtype: {"logits_slice": ATOL, "hidden_slice": ATOL, "logits_mean": ATOL}},
        "entries": entries,
    }
    parse(data, file="the recorded values")  # what is written can be read
    return (json.dumps(data, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _runner(subject: Subject, dtype: str, device: str) -> Runner:
    if subject.hf is None:
        fail("wrong-format", "expected a model in the Hugging Face layout, found an original")
    try:
        side = converted_side(subject, getattr(torch, dtype), device)
    except (NotComputed, *UNREADABLE) as error:
        fail("unsupported", f"expected a model that is computed here, found another ({error})")
    return Runner(subject, side, dtype, device, tokenizer_of(subject.hf))


def _entries(
    subject: Subject, runner: Runner, name: str, dtype: str, device: str
) -> Iterator[dict[str, Any]]:
    sides = [runner.side]
    config, lengths = as_read(subject.config, sides), lengths_of(sides)
    table = positions(subject.config, subject.hf)
    rows = prompts_for(config, None, None, table=table, lengths=lengths)
    for prompt, ids in rows.items():
        if len(ids) > LONGEST:
            continue
        common = {
            "family": subject.family.name if subject.family is not None else "unknown",
            "status": "gate",
            "checkpoint": name,
            "input": {"input_ids": [ids]},
            "input_ids_origin": "derived",
            "dtype": dtype,
            "device": device,
            "source": {"document": "recorded", "path": f"ckpt-tool {__version__}"},
            "offline_inputs": True,
            "notes": "",
        }
        for part in _of_prompt(runner, ids, SEARCHES if prompt == next(iter(rows)) else GREEDY):
            how = part.pop("how", "")
            tensor = part["expected"].get("tensor", "logits")
            which = "" if part["head"] not in OF_CLASS or tensor == "logits" else f".{tensor}"
            yield {"id": f"recorded.{prompt}.{part['expected']['kind']}{which}{how}", **common, **part}


def _of_prompt(runner: Runner, ids: list[int], searches: Searches) -> Iterator[dict[str, Any]]:
    batch = Batch(torch.tensor([ids], device=runner.device), {})
    own = kind_of(runner.subject.config)
    if own in OF_CLASS:
        yield from _classes(runner, own, ids, batch)
        return
    for head in (own,) if own == "base_model" else HEADS:
        default = "last_hidden_state" if head == "base_model" else "logits"
        try:
            result = runner.result(_asked(head, ids, runner), batch, default).double().cpu()
        except (Skip, Contradiction):
            continue
        words = head == "base_model" or result.shape[-1] == runner.side.vocabulary
        if result.ndim == 3 and words and bool(torch.isfinite(result).all()):
            yield from _numbers(head, default, result)
            if head == "causal_lm":
                yield from _continued(runner, ids, searches)
            return


def _classes(runner: Runner, head: str, ids: list[int], batch: Batch) -> Iterator[dict[str, Any]]:
    """All that a head of few classes, or of the ends of an answer, gives for a prompt."""
    for name in RESULTS.get(head, ("logits",)):
        try:
            result = runner.outputs(head, batch)[name].double().cpu()
        except (Skip, Contradiction):
            return
        expected = {
            "kind": "logits_slice",
            "tensor": name,
            "shape": list(result.shape),
            "slice": [f"0:{n}" for n in result.shape],
            "values": _rounded(result),
        }
        yield {"head": head, "expected": expected, "tolerance": {"atol": ATOL, "rtol": 0, "basis": "exact"}}


def _asked(head: str, ids: list[int], runner: Runner) -> Expectation:
    """An entry that asks for that head on that prompt."""
    return Expectation(
        "recorded", "", "gate", "", head, {"input_ids": [ids]}, Expected("logits_slice"),
        Tolerance(ATOL, 0.0, "exact"), runner.dtype, runner.device, {}, True, "",
    )  # fmt: skip


def _numbers(head: str, tensor: str, result: Tensor) -> Iterator[dict[str, Any]]:
    shape = list(result.shape)
    first = max(0, shape[1] - SHOWN)
    exact = {"atol": ATOL, "rtol": 0, "basis": "exact"}
    sliced = {
        "kind": "hidden_slice" if head == "base_model" else "logits_slice",
        "tensor": tensor,
        "shape": shape,
        "slice": ["0:1", f"{first}:{shape[1]}", f"0:{min(SHOWN, shape[2])}"],
        "values": _rounded(result[:, first:, :SHOWN]),
    }
    yield {"head": head, "expected": sliced, "tolerance": exact}
    if head != "base_model":
        mean = {
            "kind": "logits_mean",
            "tensor": tensor,
            "shape": shape[:2],
            "values": _rounded(result.mean(-1)),
        }
        yield {"head": head, "expected": mean, "tolerance": exact}


def _rounded(x: Tensor) -> Any:
    """Six digits: far below the tolerance, and the same on machines that add in another order."""
    if x.ndim == 0:
        return float(f"{float(x):.6g}")
    return [_rounded(y) for y in x]


def _continued(runner: Runner, ids: list[int], searches: Searches) -> Iterator[dict[str, Any]]:
    """The loss of the prompt as its own continuation, and what follows."""
    prompt = torch.tensor([ids], device=runner.device)
    tolerance = {"atol": ATOL, "rtol": 0, "basis": "exact"}
    if len(ids) > 1:
        value = reference.loss(runner.forward(prompt), prompt)
        yield {"head": "causal_lm", "expected": {"kind": "loss", "values": value}, "tolerance": tolerance}
    room = positions(runner.subject.config, runner.subject.hf)
    if decodes(runner.subject) and (room is None or len(ids) + STEPS <= room):
        for how, asked in searches.items():
            yield from _generated(runner, ids, how, asked)


def _generated(runner: Runner, ids: list[int], how: str, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What follows on a prompt, whatever ends a row elsewhere: the tokens, and the scores of each."""
    options = {k: v for k, v in asked.items() if k not in ("seed", "rules")}
    request = Request([ids], [[1] * len(ids)], options, asked["rules"], asked.get("seed"))
    made = run(runner.subject, runner.side, request, device=runner.device).generated
    common = {"head": "generation", "generate": asked, "how": how}
    yield {
        **common,
        "expected": {"kind": "token_ids", "values": made.sequences, "scope": "prompt + new"},
        "tolerance": {"atol": 0, "rtol": 0, "basis": "exact"},
    }
    if all(math.isfinite(x) for row in made.normalized for x in row):
        values = [[float(f"{x:.6g}") for x in row] for row in made.normalized]
        yield {
            **common,
            "expected": {"kind": "transition_scores", "values": values, "normalize_logits": True},
            "tolerance": {"atol": ATOL, "rtol": 0, "basis": "exact"},
        }
