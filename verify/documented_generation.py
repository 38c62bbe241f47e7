"""Documented values of generation: tokens, text and scores that came out of a run of the library, greedy,
drawn or by beams, under the rules of the release that documents them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from ckpt_tool.errors import CkptToolError
from ckpt_tool.verify.answers import Runner, Skip
from ckpt_tool.verify.expectations import Expectation
from ckpt_tool.verify.generate_options import RULES, rules_for
from ckpt_tool.verify.generate_run import Made, Request, run
from ckpt_tool.verify.report import Finding, number

FIRST_IDS = 10  # generated ids that must agree where the documented dtype is another one
# Of an entry, beside options of the library.
OURS = ("seed", "note", "rules")
NEWER = re.compile(r"transformers v?(5\.\d+)")
OLDER = re.compile(r"\bv?4\.(\d+)")

Verdict = Callable[..., Finding]
Tolerances = Callable[[Expectation, Runner], tuple[float, float]]


def rules_of(entry: Expectation) -> str:
    """The entry's own word, else those of the release that its source names: 4.37 for 4.x, also where none
    is named, as the documented values are of its time."""
    said = (entry.generate or {}).get("rules")
    if said is not None:
        if said not in RULES:
            raise Skip(f"documented under rules {said}, which are none of {', '.join(RULES)}")
        return str(said)
    text = " ".join(str(v) for v in entry.source.values())
    named = NEWER.search(text)
    return "4.37" if named is None or OLDER.search(text) else rules_for(named[1])


def asked_of(entry: Expectation) -> tuple[dict[str, Any], int | None]:
    """Options and seed. Skip for draws that cannot be made again here."""
    told = dict(entry.generate or {})
    seed = told.get("seed")
    if told.get("do_sample"):
        if entry.device == "gpu":
            raise Skip("sampled on a GPU, which draws by other numbers")
        if type(seed) is not int:
            raise Skip("sampled, and no seed is documented")
    return {k: v for k, v in told.items() if k not in OURS}, seed


def made_of(entry: Expectation, runner: Runner, steps: int) -> list[Made]:
    """The runs that the entry documents: rows of several lengths without a mask ran one by one."""
    asked, seed = asked_of(entry)
    rows, mask = runner.rows(entry), entry.input.get("attention_mask")
    if asked.get("num_beams") in (None, 1):
        asked["max_new_tokens"] = min(steps, asked.get("max_new_tokens") or steps)
    beams, subject = int(asked.get("num_beams") or 1), runner.subject
    runner.affordable(sum(map(len, rows)) + steps * beams * len(rows))
    if subject.hf is not None and "generation_config.json" not in subject.hf.documents:
        asked.setdefault("eos_token_id", subject.config.get("eos_token_id"))
    alone = mask is None and len({len(row) for row in rows}) > 1
    ones = [[1] * len(row) for row in rows]
    parts = [([r], [m]) for r, m in zip(rows, ones, strict=True)] if alone else [(rows, mask or ones)]
    requests = [Request(r, m, asked, rules_of(entry), seed) for r, m in parts]
    return [_made(runner, request) for request in requests]


def _made(runner: Runner, request: Request) -> Made:
    """Entries that one run can answer share it."""
    if repr(request) not in runner.runs:
        try:
            made = run(runner.subject, runner.side, request, device=runner.device)
        except CkptToolError as error:
            raise Skip(f"cannot be generated: {error.problems[0].message}") from None
        runner.runs[repr(request)] = made
    found: Made = runner.runs[repr(request)]
    return found


def tokens(entry: Expectation, runner: Runner, verdict: Verdict) -> Finding:
    """The ids that the entry gives, or its text, must come out; of another dtype the first ones."""
    real = runner.unpadded(entry)
    want = _wanted(entry, runner, real)
    asked, _ = asked_of(entry)
    searched = int(asked.get("num_beams") or 1) > 1 or bool(asked.get("do_sample"))
    per = int(asked.get("num_return_sequences") or 1)
    steps = max(len(w) - len(real[k // per]) for k, w in enumerate(want))
    if entry.dtype != runner.dtype:
        if searched:
            raise Skip(f"searched in {entry.dtype}, computed in {runner.dtype}: others may be the best")
        steps = min(steps, FIRST_IDS)
    found = [(m.width, row) for m in made_of(entry, runner, steps) for row in m.generated.sequences]
    if len(want) != len(found):
        return verdict(entry, False, f"expected {len(want)} rows, found {len(found)}")
    how, most = "ids" if searched else "greedy ids", 0
    for k, (ids, (width, row)) in enumerate(zip(want, found, strict=True)):
        whole = ids[:width] == row[:width]  # with its padding, as the library gives it
        expected = ids[width if whole else len(real[k // per]) :][: None if searched else steps]
        new = row[width:]
        same = next((j for j, i in enumerate(expected) if j >= len(new) or new[j] != i), len(expected))
        most = max(most, len(expected))
        if same < len(expected):
            both = f"{expected[same]} documented, {new[same] if same < len(new) else 'an end'} here"
            text = f"{how} differ after {same} of {len(expected)}: {both}"
            return verdict(entry, False, text, counted=True, measured=float(same), bar=float(len(expected)))
    text = f"{most} {how} of {len(real)} prompts are the documented ones, computed in {runner.dtype}"
    text += f", by the rules of transformers {rules_of(entry)}" if searched else ""
    return verdict(entry, True, text, measured=float(most), bar=float(most))


def scores(entry: Expectation, runner: Runner, verdict: Verdict, bars: tuple[float, float]) -> Finding:
    """`compute_transition_scores` of the run, raw or normalised; the ids too where the entry gives them."""
    atol, rtol = bars
    values, more = entry.expected.values, entry.expected.more
    nested = values if isinstance(values[0], list) else [values]
    made = made_of(entry, runner, max(map(len, nested)))
    given = [m.generated for m in made]
    normal = more.get("normalize_logits")
    found = [row for g in given for row in (g.normalized if normal else g.transition_scores)]
    if len(found) != len(nested):
        raise Skip(f"scores of {len(nested)} rows for {len(found)}")
    documented_ids = more.get("token_ids")
    if documented_ids is not None:
        ids = documented_ids if isinstance(documented_ids[0], list) else [documented_ids]
        rows = [row[m.width :] for m in made for row in m.generated.sequences]
        new = [row[: len(w)] for row, w in zip(rows, ids, strict=False)]
        if new != [list(w) for w in ids]:
            return verdict(entry, False, f"expected the ids {documented_ids}, found {new}")
    worst, bar, holds = 0.0, 0.0, True
    for row, wanted in zip(found, nested, strict=True):
        if len(row) < len(wanted):
            return verdict(entry, False, f"expected {len(wanted)} scores, found {len(row)}")
        want = torch.tensor(wanted, dtype=torch.float64)
        delta = (torch.tensor(row[: len(wanted)], dtype=torch.float64) - want).abs()
        limits = atol + rtol * want.abs()
        holds &= bool((delta <= limits).all())
        if float(delta.max()) >= worst:
            worst, bar = float(delta.max()), float(limits[int(delta.argmax())])
    text = f"{sum(map(len, nested))} documented scores, computed in {runner.dtype}"
    if not holds:
        off = f"found some outside, the farthest {number(worst)} off"
        text = f"expected {text}, within {number(bar)}, {off}"
    return verdict(entry, holds, text, measured=worst, bar=bar)


def reconstruction(entry: Expectation, runner: Runner, verdict: Verdict) -> Finding:
    """The sums by length of a beam search, out of its transition scores; the length is that of the beams
    that a hypothesis came by, which the documented count of negative scores is but for scores of 0."""
    asked, _ = asked_of(entry)
    if int(asked.get("num_beams") or 1) < 2:
        raise Skip("a rule about beams, and there are none")
    worst, bar, holds, counts = 0.0, 0.0, True, [0, 0]
    prompt = "prompt length" in str(entry.expected.more.get("output_length"))
    for made in made_of(entry, runner, int(asked.get("max_new_tokens") or 20)):
        g, power = made.generated, made.options.length_penalty
        lengths = [n + prompt * made.width for n in g.lengths()]
        counts[0] += sum(g.lengths())
        counts[1] += sum(x < 0 for row in g.transition_scores for x in row)
        for row, n, value in zip(g.transition_scores, lengths, g.sequences_scores or [], strict=True):
            away = abs(sum(row) / n**power - value)
            limit = entry.tolerance.atol + entry.tolerance.rtol * abs(value)
            holds &= away <= limit
            if away >= worst:
                worst, bar = away, limit
    text = f"sums of transition scores by the length of {counts[0]} beams are the scores of the sequences"
    text += f" ({counts[1]} scores are negative)" if counts[0] != counts[1] else ""
    return verdict(entry, holds, text if holds else f"expected that {text}", measured=worst, bar=bar)


def _wanted(entry: Expectation, runner: Runner, rows: list[list[int]]) -> list[list[int]]:
    """Prompt and new ids of each row, the prompt with or without its padding."""
    expected, more = entry.expected, entry.expected.more
    derived = more.get("derived_token_ids")
    if derived is not None:
        return [list(ids) for ids in (derived if isinstance(derived[0], list) else [derived])]
    if expected.kind == "token_ids":
        values = expected.values if isinstance(expected.values[0], list) else [expected.values]
        scope = str(more.get("scope", "prompt + new"))
        if scope.startswith("prompt + new"):
            return [list(v) for v in values]
        if scope.startswith("new"):
            per = len(values) // len(rows)
            return [[*rows[k // per], *v] for k, v in enumerate(values)]
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
