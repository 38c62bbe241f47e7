"""Level 4: does it say what its publishers documented? Entries of fixtures/expectations that name this
checkpoint are run where that can be done offline; the others are skipped with the reason, and nothing that
did not run passes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ckpt_tool import reference
from ckpt_tool.fixtures.expectations import Expectation, match
from ckpt_tool.verify.report import Finding, Status
from ckpt_tool.verify.sides import Side
from ckpt_tool.verify.subject import Subject
from ckpt_tool.verify.weights import largest

LEVEL = "documented"
WORK_LIMIT = {"cpu": 3e13, "cuda": 3e16}  # floating-point operations for one entry: some minutes
FIRST_IDS = 10  # generated ids that must agree where the documented dtype is another one
PRECISION = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}
# |delta| allowed when float32 is held against half-precision values, by family, dtype and kind: wider than
# the spread between the documented variants (docs/tolerances.md).
WIDER = {
    ("mistral", "float16", "logits_slice"): 1e-2,
    ("mistral", "float16", "logits_mean"): 1e-2,
    ("llama", "float16", "logits_slice"): 0.15,
    ("llama", "float16", "logits_mean"): 5e-2,
}
FLOAT32_ATOL = 1e-3  # float32 against float32 of other hardware


class Skip(Exception):
    """Why an entry cannot be run here."""


class Contradiction(Exception):
    """What makes it plain, without running anything, that the checkpoint is not the documented one."""


@dataclass(frozen=True)
class Runner:
    """The converted side, ready to answer entries; `tokenizer` encodes text, None where there is none."""

    subject: Subject
    side: Side
    dtype: str
    device: str
    tokenizer: Any

    def forward(self, ids: Tensor) -> Tensor:
        return self.side.forward(ids)


def finding(check: str, status: Status, message: str, **more: Any) -> Finding:
    return Finding(LEVEL, check, status, message, **more)


def documented(
    subject: Subject,
    side: Side | None,
    checkpoint_ids: Iterable[str],
    *,
    dtype: str,
    device: str,
    progress: Callable[[str], None] | None = None,
) -> list[Finding]:
    """The findings of this level. `side` is the converted reading; None where it could not be made."""
    ids = list(checkpoint_ids)
    if not ids:
        reason = "no published name of this checkpoint is known: --checkpoint-id gives one"
        return [finding("documented values", "skipped", reason)]
    entries = match(ids)
    if not entries:
        return [finding("documented values", "skipped", f"nothing is documented for {', '.join(ids)}")]
    made, doubtful = [], [e.id for e in entries if not e.shown]
    runner = None if side is None else Runner(subject, side, dtype, device, _tokenizer(subject))
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
            made.append(_verdict(entry, False, str(reason)))
    if doubtful:
        text = f"{len(doubtful)} documented values are doubtful or known wrong and never decide"
        made.append(finding("doubtful", "note", text, where=", ".join(doubtful[:4]), data={"ids": doubtful}))
    return made


def _tokenizer(subject: Subject) -> Any:
    """tokenizer.json of the Hugging Face side through the `tokenizers` library; None without either."""
    if subject.hf is None or "tokenizer.json" not in subject.hf.documents:
        return None
    try:
        from tokenizers import Tokenizer

        return Tokenizer.from_str(subject.hf.documents["tokenizer.json"].read(64 << 20).decode())
    except Exception:  # the library raises bare Exception for a file that it cannot read
        return None


def _run(entry: Expectation, runner: Runner | None, subject: Subject) -> Finding:
    if entry.head == "tokenizer":
        return _encode(entry, _tokenizer(subject) if runner is None else runner.tokenizer)
    assert runner is not None
    kind = entry.expected.kind
    if kind in ("logits_slice", "logits_mean"):
        return _logits(entry, runner)
    if kind == "loss":
        return _loss(entry, runner)
    if kind in ("token_ids", "text"):
        return _generation(entry, runner)
    raise Skip(f"values of kind {kind} are not run by this level")


def _verdict(entry: Expectation, holds: bool, message: str, **more: Any) -> Finding:
    """Only a gate may fail; anything else is shown beside what was measured."""
    source = ", ".join(entry.source[k] for k in ("repository", "document", "path") if k in entry.source)
    data = {"source": source, "status": entry.status}
    if entry.gates:
        return finding(entry.id, "pass" if holds else "fail", message, data=data, **more)
    words = "agrees" if holds else "differs"
    return finding(entry.id, "note", f"{message}; {words}, and is {entry.status}: no gate", data=data, **more)


def _rows(entry: Expectation, runner: Runner) -> list[list[int]]:
    rows = entry.input_ids
    if rows is None:
        text = entry.input.get("text")
        if not isinstance(text, str):
            raise Skip("the entry gives no token ids and no single text")
        if runner.tokenizer is None:
            raise Skip("the entry gives text only, and the output has no tokenizer.json that can be read")
        rows = [runner.tokenizer.encode(text).ids]
    vocabulary, largest_id = int(runner.subject.config.get("vocab_size") or 0), max(map(max, rows))
    if largest_id >= vocabulary:
        raise Contradiction(f"expected a vocabulary that has token {largest_id}, found {vocabulary} words")
    mask = entry.input.get("attention_mask")
    if mask is not None and any(0 in row for row in mask):
        raise Skip("the batch is padded, and this reading takes no mask")
    return rows


def _affordable(runner: Runner, tokens: int) -> None:
    """Skip what would take too long or too much memory, with the numbers."""
    assert runner.subject.hf is not None
    parameters = sum(t.numel for t in runner.subject.hf)
    work = 2.0 * parameters * tokens
    kind = "cuda" if runner.device.startswith("cuda") else "cpu"
    if work > WORK_LIMIT[kind]:
        raise Skip(
            f"too big: about {work / 1e12:,.0f} TFLOP on {kind} for {tokens} tokens through "
            f"{parameters / 1e9:.1f} G weights, the limit is {WORK_LIMIT[kind] / 1e12:,.0f}"
        )
    need = largest(runner.subject.hf, torch.empty(0, dtype=getattr(torch, runner.dtype)).element_size())
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if kind == "cpu" and need > free:
        raise Skip(f"too big: one layer takes {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")


def _tolerance(entry: Expectation, runner: Runner) -> tuple[float, float]:
    """(atol, rtol) for a documented number held against one computed in this dtype."""
    t = entry.tolerance
    if entry.dtype not in PRECISION:
        raise Skip(f"documented in {entry.dtype}, which cannot be computed here")
    if entry.dtype == runner.dtype == "float32":
        return max(t.atol, FLOAT32_ATOL), t.rtol
    if entry.dtype == runner.dtype:
        return t.atol, t.rtol
    wider = WIDER.get((entry.family, entry.dtype, entry.expected.kind))
    if PRECISION[runner.dtype] < PRECISION["float32"] or wider is None:
        raise Skip(f"documented in {entry.dtype}, computed in {runner.dtype}: no bar is known between them")
    return max(wider, t.atol), t.rtol


def _logits(entry: Expectation, runner: Runner) -> Finding:
    atol, rtol = _tolerance(entry, runner)
    rows = _rows(entry, runner)
    _affordable(runner, sum(map(len, rows)))
    if len({len(r) for r in rows}) > 1:
        raise Skip("rows of different lengths")
    logits = runner.forward(torch.tensor(rows, device=runner.device)).double().cpu()
    expected = entry.expected
    if expected.kind == "logits_mean":
        logits = logits.mean(-1)
    try:
        found = logits if expected.index is None else logits[expected.index]
        values = torch.tensor(expected.values, dtype=torch.float64)
        delta = (found.reshape(values.shape) - values).abs()
    except (IndexError, RuntimeError):
        raise Skip(f"documented for a result of another shape than {tuple(logits.shape)}") from None
    over = delta - (atol + rtol * values.abs())
    worst = int(over.flatten().argmax())
    bar = float((atol + rtol * values.abs()).flatten()[worst])
    worst_delta = float(delta.flatten()[worst])
    text = f"{values.numel()} documented values of {expected.kind}, computed in {runner.dtype}"
    return _verdict(entry, bool((over <= 0).all()), text, measured=worst_delta, bar=bar)


def _loss(entry: Expectation, runner: Runner) -> Finding:
    rows = _rows(entry, runner)
    _affordable(runner, sum(map(len, rows)))
    if entry.labels is not None and entry.labels != rows:
        raise Skip("the labels are not the input ids")
    ids = torch.tensor(rows, device=runner.device)
    found = reference.loss(runner.forward(ids), ids)
    want = float(entry.expected.values)
    bar = max(0.005, entry.tolerance.atol)
    text = f"loss {found:.4f}, documented {want}"
    return _verdict(entry, abs(found - want) <= bar, text, measured=abs(found - want), bar=bar)


def _generation(entry: Expectation, runner: Runner) -> Finding:
    """Greedy decoding from the documented prompt; the ids that the entry gives, or its text, must come
    out."""
    options = entry.generate or {}
    if options.get("do_sample"):
        raise Skip("sampled, not greedy")
    if entry.dtype not in PRECISION:
        raise Skip(f"documented in {entry.dtype}, which cannot be computed here")
    if PRECISION[runner.dtype] < PRECISION[entry.dtype]:
        raise Skip(
            f"documented in {entry.dtype}, computed in {runner.dtype}: a lower precision may choose other ids"
        )
    rows = _rows(entry, runner)
    steps = int(options.get("max_new_tokens") or 20)
    want = _wanted(entry, runner, rows)
    if entry.dtype != runner.dtype:
        steps = min(steps, FIRST_IDS)
    steps = min(steps, max(len(w) - len(r) for w, r in zip(want, rows, strict=True)))
    _affordable(runner, sum(steps * len(r) + steps * steps // 2 for r in rows))
    shortest, asked = steps, 0
    for row, ids in zip(rows, want, strict=True):
        made = reference.generate(runner.forward, torch.tensor([row], device=runner.device), steps)[
            0
        ].tolist()
        new, expected = made[len(row) :], ids[len(row) : len(row) + steps]
        same = next((k for k, (a, b) in enumerate(zip(new, expected, strict=False)) if a != b), len(expected))
        shortest, asked = min(shortest, same), max(asked, len(expected))
        if same < len(expected):
            both = f"{expected[same]} documented, {new[same]} here"
            text = f"greedy ids differ after {same} of {len(expected)}: {both}"
            return _verdict(entry, False, text, measured=float(same), bar=float(len(expected)))
    text = f"{asked} greedy ids of {len(rows)} prompts are the documented ones, computed in {runner.dtype}"
    return _verdict(entry, True, text, measured=float(asked), bar=float(asked))


def _wanted(entry: Expectation, runner: Runner, rows: list[list[int]]) -> list[list[int]]:
    """Prompt and new ids for each row."""
    expected, more = entry.expected, entry.expected.more
    derived = more.get("derived_token_ids")
    if derived is not None:
        return [list(ids) for ids in derived]
    if expected.kind == "token_ids":
        values = expected.values if isinstance(expected.values[0], list) else [expected.values]
        scope = str(more.get("scope", "prompt + new"))
        if scope.startswith("prompt + new"):
            return [list(v) for v in values]
        if scope.startswith("new"):
            return [[*r, *v] for r, v in zip(rows, values, strict=True)]
        raise Skip(f"only the {scope} are documented")
    if runner.tokenizer is None:
        raise Skip("the documented text has no ids, and the output has no tokenizer.json that can be read")
    texts = expected.values if isinstance(expected.values, list) else [expected.values]
    made = []
    for row, text in zip(rows, texts, strict=True):
        ids = runner.tokenizer.encode(text).ids
        if ids[: len(row)] != row:
            raise Skip("the documented text does not encode to a continuation of the prompt")
        made.append(ids)
    return made


def _encode(entry: Expectation, tokenizer: Any) -> Finding:
    if tokenizer is None:
        raise Skip("the output has no tokenizer.json that can be read")
    text = entry.input.get("text")
    if entry.expected.kind != "token_ids" or not isinstance(text, str):
        raise Skip("needs more of a tokenizer than encoding one text")
    if set(entry.input) - {"text", "bos", "eos"} or entry.input.get("eos"):
        raise Skip("asks for options that tokenizer.json does not take")
    found, want = tokenizer.encode(text).ids, list(entry.expected.values)
    same = found == want
    text = (
        f"{len(want)} token ids are the documented ones"
        if same
        else f"expected {want[:12]}, found {found[:12]}"
    )
    return _verdict(entry, same, text)
