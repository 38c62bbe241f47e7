"""Level 4: does it say what its publishers documented? Entries of verify/expectations that name this
checkpoint are run where that can be done offline; the others are skipped with the reason, and nothing that
did not run passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ckpt_tool.verify import documented_generation
from ckpt_tool.verify.answers import Batch, Contradiction, Runner, Skip
from ckpt_tool.verify.expectations import Expectation, Tolerance, match
from ckpt_tool.verify.prompts import tokenizer_of
from ckpt_tool.verify.report import Finding, Status, number
from ckpt_tool.verify.sides import Side, mask_of
from ckpt_tool.verify.subject import Subject

LEVEL = "documented"
CONTRADICTED = "by its sizes"
PRECISION = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}
FLOAT32_ATOL = {"hidden_slice": 5e-4}  # float32 against float32 of other hardware; the others:
LOGITS_ATOL = 1e-3
LOSS_BAR = 0.005 + 1e-4  # two digits are documented, and sums are added in another order
UNSTATED = {
    "metric": "a figure of quality over a data set, not of one prompt",
    "encoding": "needs more of a tokenizer than encoding one text",
}


def finding(check: str, status: Status, message: str, **more: Any) -> Finding:
    return Finding(LEVEL, check, status, message, **more)


def documented(
    subject: Subject,
    side: Side | None,
    checkpoint_ids: Iterable[str],
    *,
    dtype: str,
    device: str,
    recorded: Sequence[Expectation] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Finding]:
    """The findings of this level. `side` is the converted reading; None where it could not be made. Entries
    that somebody `recorded` are run instead of the documented ones."""
    ids = sorted({e.checkpoint for e in recorded}) if recorded is not None else list(checkpoint_ids)
    if not ids:
        reason = "no published name of this checkpoint is known: --checkpoint-id gives one"
        return [finding("documented values", "skipped", reason)]
    entries = match(ids) if recorded is None else list(recorded)
    if not entries:
        return [finding("documented values", "skipped", f"nothing is documented for {', '.join(ids)}")]
    made, doubtful = [], [e.id for e in entries if not e.shown]
    runner = None if side is None else Runner(subject, side, dtype, device, tokenizer_of(subject.hf))
    for entry in (e for e in entries if e.shown):
        if progress is not None:
            progress(f"documented: {entry.id}")
        try:
            if entry.head != "tokenizer" and runner is None:
                raise Skip("the converted model cannot be read: see parity")
            made.append(_run(entry, runner, subject))
        except Skip as reason:
            made.append(finding(entry.id, "skipped", str(reason)))
        except Contradiction as reason:
            made.append(replace(_verdict(entry, False, str(reason)), where=CONTRADICTED))
    made = _another_model(made, ids)
    words = runner.masked_word() if runner is not None else None
    if words is not None:
        made.append(finding("masked word", "note", f"{words}; no value is documented"))
    if doubtful:
        text = f"{len(doubtful)} documented values are doubtful or known wrong and never decide"
        made.append(finding("doubtful", "note", text, where=", ".join(doubtful[:4]), data={"ids": doubtful}))
    return made


def _another_model(found: list[Finding], ids: list[str]) -> list[Finding]:
    """Entries that this model cannot be of, by its sizes, are one sentence."""
    wrong = [f for f in found if f.where == CONTRADICTED and f.status == "fail"]
    if not wrong:
        return found
    text = f"this is not {' or '.join(ids)}, whose documented values it cannot have: {wrong[0].message}"
    rest = [f for f in found if f.where != CONTRADICTED]
    return [finding("documented values", "fail", text, data={"ids": [f.check for f in wrong]}), *rest]


def _run(entry: Expectation, runner: Runner | None, subject: Subject) -> Finding:
    if entry.head == "tokenizer":
        return _encode(entry, tokenizer_of(subject.hf) if runner is None else runner.tokenizer)
    assert runner is not None
    kind = entry.expected.kind
    rule = str(entry.expected.more.get("rule"))
    if kind == "invariant" and entry.head == "generation" and "transition_scores" in rule:
        return documented_generation.reconstruction(entry, runner, _verdict)
    if kind == "invariant":
        raise Skip(f"a rule in words, about the library that generates: {entry.expected.more.get('rule')}")
    if kind in UNSTATED:
        raise Skip(UNSTATED[kind])
    if kind == "text" and entry.head in ("masked_lm", "question_answering"):
        return _words(entry, runner)
    return RUN[kind](entry, runner)


def _verdict(entry: Expectation, holds: bool, message: str, *, counted: bool = False, **more: Any) -> Finding:
    """Only a gate may fail; anything else is shown beside what was measured. `counted`: the number is of what
    is right."""
    source = ", ".join(entry.source[k] for k in ("repository", "document", "path") if k in entry.source)
    data = {"source": source, "status": entry.status, **({"more_is_better": True} if counted else {})}
    if entry.gates:
        return finding(entry.id, "pass" if holds else "fail", message, data=data, **more)
    words = "agrees" if holds else "differs"
    return finding(entry.id, "note", f"{message}; {words}, and is {entry.status}: no gate", data=data, **more)


def _tolerance(entry: Expectation, runner: Runner) -> tuple[float, float]:
    """(atol, rtol) for a documented number held against one computed in this dtype."""
    t = entry.tolerance
    if t.ratio:
        _precise_enough(entry, runner)
        return 0.0, t.rtol
    if entry.dtype not in PRECISION:
        raise Skip(f"documented in {entry.dtype}, which cannot be computed here")
    if entry.dtype == runner.dtype == "float32":
        return max(t.atol, FLOAT32_ATOL.get(entry.expected.kind, LOGITS_ATOL)), t.rtol
    if entry.dtype == runner.dtype:
        return t.atol, t.rtol
    if PRECISION[runner.dtype] < PRECISION["float32"] or entry.wider is None:
        raise Skip(f"documented in {entry.dtype}, computed in {runner.dtype}: no bar is known between them")
    return max(entry.wider, t.atol), t.rtol


def _numbers(entry: Expectation, runner: Runner) -> Finding:
    """A slice or single points of a result, or means over the vocabulary; at padded positions nothing."""
    atol, rtol = _tolerance(entry, runner)
    expected = entry.expected
    batch = runner.batch(entry)
    default = "last_hidden_state" if entry.head == "base_model" else "logits"
    result = runner.result(entry, batch, default).double().cpu()
    if expected.kind == "logits_mean":
        result = result.mean(-1)
    elif expected.reduce is not None:
        raise Skip(f"documented after a reduction: {expected.reduce}")
    real = torch.ones(result.shape, dtype=torch.bool)
    mask = mask_of(batch.given, *result.shape[:2], grouped=False) if result.ndim > 2 else None
    if mask is not None:
        real = mask.cpu().view(*mask.shape, *[1] * (result.ndim - 2)).expand_as(real)
    values = torch.tensor(expected.values, dtype=torch.float64)
    try:
        found, real = _part(result, entry), _part(real, entry)
        delta = _apart(found.reshape(values.shape), values, entry.tolerance)[real.reshape(values.shape)]
    except (IndexError, RuntimeError):
        raise Skip(f"documented for a result of another shape than {tuple(result.shape)}") from None
    if not delta.numel():
        raise Skip("documented at padded positions only")
    bars = (atol + rtol * values.abs())[real.reshape(values.shape)]
    if entry.tolerance.ratio:
        bars = torch.full_like(bars, rtol)
    worst = int((delta - bars).argmax())
    over = int((delta > bars).sum())
    text = f"{delta.numel()} documented values of {expected.kind}, computed in {runner.dtype}"
    if over:
        text = _outside(f"{text},", float(bars[worst]), f"{over} of them", float(delta[worst]))
    if delta.numel() < values.numel():
        text += f"; {values.numel() - delta.numel()} at padded positions are left out"
    return _verdict(
        entry, bool((delta <= bars).all()), text, measured=float(delta[worst]), bar=float(bars[worst])
    )


def _outside(what: str, bar: float, found: str, off: float) -> str:
    """What is documented, within what, and how far the farthest of what was found is off."""
    return f"expected {what} within {number(bar)}, found {found} outside, the farthest {number(off)} off"


def _apart(found: Tensor, values: Tensor, tolerance: Tolerance) -> Tensor:
    """How far apart they are, in the tolerance's measure; infinite where there is no ratio."""
    if not tolerance.ratio:
        return (found - values).abs()
    return (values / found - 1).abs().nan_to_num(nan=math.inf, posinf=math.inf)


def _part(x: Tensor, entry: Expectation) -> Tensor:
    points, index = entry.expected.points, entry.expected.index
    if points is not None:
        return x[tuple(torch.tensor(p) for p in zip(*points, strict=True))]
    return x if index is None else x[index]


def _loss(entry: Expectation, runner: Runner) -> Finding:
    found = runner.loss(entry)
    want = float(entry.expected.values)
    bar = max(LOSS_BAR, entry.tolerance.atol)
    holds = abs(found - want) <= bar
    text = f"loss {found:.4f}, documented {want}"
    text = text if holds else f"expected the documented loss {want} within {number(bar)}, found {found:.4f}"
    return _verdict(entry, holds, text, measured=abs(found - want), bar=bar)


def _inequality(entry: Expectation, runner: Runner) -> Finding:
    result = runner.result(entry, runner.batch(entry)).double().cpu()
    left, right, op = (entry.expected.more[k] for k in ("left", "right", "op"))
    try:
        a, b = float(result[tuple(left)]), float(result[tuple(right)])
    except (IndexError, ValueError):
        raise Skip(f"documented for a result of another shape than {tuple(result.shape)}") from None
    text = f"expected {left} {op} {right}, found {a:.4g} and {b:.4g}"
    return _verdict(entry, a < b if op == "<" else a > b, text, measured=abs(a - b), bar=0.0)


def _labels(entry: Expectation, runner: Runner) -> Finding:
    """Classes of the whole row or of each token, by their names; the words most likely in one place."""
    _precise_enough(entry, runner)
    expected = entry.expected
    result = runner.result(entry, runner.batch(entry)).double().cpu()
    op, position = str(expected.more.get("op", "argmax")), expected.more.get("position")
    if entry.head == "entity_prediction":
        return _entity(entry, runner, result)
    if op.endswith("non-zero classes only"):
        return _mentions(entry, runner, result)
    if position is not None:
        return _likeliest(entry, runner, result[0, position])
    if op != "argmax" or "index" in expected.more:
        raise Skip(f"labels by another rule than argmax: {op}")
    found = [runner.label(i) for i in result.argmax(-1).flatten().tolist()]
    want = expected.values if isinstance(expected.values, list) else [expected.values]
    return _same(entry, found, [str(w) for w in want])


def _entity(entry: Expectation, runner: Runner, logits: Tensor) -> Finding:
    """The entity most likely in one place; one has titles in several languages."""
    place = tuple(entry.expected.more.get("index", (0, 0)))
    best, want = int(logits[place].argmax()), str(entry.expected.values)
    found = runner.titles(best)
    language = want.partition(":")[0] + ":"
    own = [t for t in found if t.startswith(language)] or found or [str(best)]
    return _same(entry, [want] if want in found else own, [want])


def _mentions(entry: Expectation, runner: Runner, logits: Tensor) -> Finding:
    """The spans of a text (1, E, L) that are of any class but the first, with their classes."""
    spans, text = entry.input.get("entity_spans"), entry.input.get("text")
    if not isinstance(spans, list) or not isinstance(text, str) or logits.shape[:2] != (1, len(spans)):
        raise Skip("the entry does not give the spans of its text")
    classes = logits[0].argmax(-1).tolist()
    found = [f"{text[a:b]} {runner.label(k)}" for (a, b), k in zip(spans, classes, strict=True) if k != 0]
    return _same(entry, found, [" ".join(pair) for pair in entry.expected.values])


def _likeliest(entry: Expectation, runner: Runner, logits: Tensor) -> Finding:
    values, more = entry.expected.values, entry.expected.more
    want = more.get("derived_token_ids")
    if want is None:
        if runner.tokenizer is None:
            raise Skip("the documented words have no ids, and the output has no tokenizer.json")
        words = values if isinstance(values, list) else [values]
        encoded = [runner.tokenizer.encode(w, add_special_tokens=False).ids for w in words]
        if any(len(ids) != 1 for ids in encoded):
            raise Skip("a documented word is not one token here")
        want = [ids[0] for ids in encoded]
    found = logits.topk(len(want)).indices.tolist()
    return _same(entry, [str(i) for i in found], [str(i) for i in want])


def _words(entry: Expectation, runner: Runner) -> Finding:
    """The word in a masked place, or the answer to a question as the tokens from the first to the last."""
    _precise_enough(entry, runner)
    batch, more = runner.batch(entry), entry.expected.more
    if entry.head == "masked_lm":
        if not isinstance(more.get("position"), int):
            raise Skip("the entry does not say where the masked word is")
        return _likeliest(entry, runner, runner.result(entry, batch)[0, more["position"]].double().cpu())
    made = runner.outputs(entry.head, batch)
    first, last = (int(made[name][0].argmax()) for name in ("start_logits", "end_logits"))
    span = more.get("derived_answer_span")
    if span is not None:
        return _same(entry, [str(first), str(last)], [str(k) for k in span])
    if runner.tokenizer is None:
        raise Skip("the documented answer has no positions, and the output has no tokenizer.json")
    return _same(
        entry, [runner.tokenizer.decode(batch.ids[0, first : last + 1].tolist())], [entry.expected.values]
    )


def _same(entry: Expectation, found: list[str], want: list[str]) -> Finding:
    text = f"{', '.join(want[:8])}, as documented"
    if found != want:
        text = f"expected {', '.join(want[:8])}, found {', '.join(found[:8])}"
    return _verdict(entry, found == want, text)


def _scores(entry: Expectation, runner: Runner) -> Finding:
    """Scores of the tokens that a run chose, or of each token of the prompt given those before."""
    atol, rtol = _tolerance(entry, runner)
    if entry.head == "generation":
        return documented_generation.scores(entry, runner, _verdict, (atol, rtol))
    more, rows = entry.expected.more, runner.unpadded(entry)
    values = entry.expected.values
    nested = values if isinstance(values[0], list) else [values]
    if len(nested) != len(rows):
        raise Skip(f"scores of {len(nested)} rows for {len(rows)} prompts")
    worst, bar, holds = 0.0, 0.0, True
    for ids, wanted in zip(rows, nested, strict=True):
        logits = (
            runner.result(entry, Batch(torch.tensor([ids], device=runner.device), {}))[0, :-1].double().cpu()
        )
        if more.get("normalize_logits"):
            logits = logits.log_softmax(-1)
        scores = logits.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0][-len(wanted) :]
        if len(scores) != len(wanted):
            raise Skip(f"documented for {len(wanted)} tokens, the prompt has {len(scores)} after the first")
        want = torch.tensor(wanted, dtype=torch.float64)
        delta, bars = (scores - want).abs(), atol + rtol * want.abs()
        holds &= bool((delta <= bars).all())
        if float(delta.max()) >= worst:
            worst, bar = float(delta.max()), float(bars[int(delta.argmax())])
    text = f"{sum(map(len, nested))} documented scores, computed in {runner.dtype}"
    text = text if holds else _outside(f"{text},", bar, "some", worst)
    return _verdict(entry, holds, text, measured=worst, bar=bar)


def _precise_enough(entry: Expectation, runner: Runner) -> None:
    if PRECISION[runner.dtype] < PRECISION.get(entry.dtype, 0):
        raise Skip(
            f"documented in {entry.dtype}, computed in {runner.dtype}: a lower precision may choose another"
        )


def _generation(entry: Expectation, runner: Runner) -> Finding:
    """Decoding from the documented prompt; the ids that the entry gives, or its text, must come out."""
    if entry.dtype not in PRECISION:
        raise Skip(f"documented in {entry.dtype}, which cannot be computed here")
    _precise_enough(entry, runner)
    return documented_generation.tokens(entry, runner, _verdict)


RUN: dict[str, Callable[[Expectation, Runner], Finding]] = {
    "logits_slice": _numbers,
    "hidden_slice": _numbers,
    "logits_mean": _numbers,
    "loss": _loss,
    "inequality": _inequality,
    "label": _labels,
    "labels": _labels,
    "token_ids": _generation,
    "text": _generation,
    "transition_scores": _scores,
}


def _encode(entry: Expectation, tokenizer: Any) -> Finding:
    if tokenizer is None:
        raise Skip("the output has no tokenizer.json that can be read")
    text = entry.input.get("text")
    if entry.expected.kind != "token_ids" or not isinstance(text, str):
        raise Skip("needs more of a tokenizer than encoding one text")
    if set(entry.input) - {"text", "bos", "eos", "add_special_tokens"} or entry.input.get("eos"):
        raise Skip("asks for options that tokenizer.json does not take")
    special = bool(entry.input.get("add_special_tokens", True))
    found, want = tokenizer.encode(text, add_special_tokens=special).ids, list(entry.expected.values)
    same = found == want
    text = (
        f"{len(want)} token ids are the documented ones"
        if same
        else f"expected {want[:12]}, found {found[:12]}"
    )
    return _verdict(entry, same, text)
