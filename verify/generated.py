"""The level `generation`: do both sides of a conversion go on from the same prompts with the same tokens,
greedily, drawn and by beams, and does what they keep of earlier tokens change nothing?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckpt_tool.errors import CkptToolError
from ckpt_tool.verify.generate_run import Made, Request, bar_of, compared, decodes, run
from ckpt_tool.verify.prompts import Lengths
from ckpt_tool.verify.report import Finding
from ckpt_tool.verify.sides import Side
from ckpt_tool.verify.subject import Subject

LEVEL = "generation"
STEPS = 12
LENGTHS = (9, 5, 7)  # tokens of the prompts
MODES: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2, "early_stopping": "never"},
}
SEED = 7


def generated(
    subject: Subject,
    original: Side,
    converted: Side,
    rows: Mapping[str, Sequence[int]],
    *,
    dtype: str,
    device: str,
    lengths: Lengths,
    table: int | None,
    tell: Callable[[str], None],
) -> list[Finding]:
    """A finding for each mode and for the caches. `rows` are the prompts of parity, of which the first tokens
    are taken."""
    if not decodes(subject):
        return [Finding(LEVEL, "decoder", "skipped", "the model does not go on from a prompt: no decoder")]
    prompts = _prompts(rows, lengths, table)
    if not prompts:
        return [Finding(LEVEL, "prompts", "skipped", "no prompt has room for new tokens")]
    made: list[Finding] = []
    for mode, asked in MODES.items():
        tell(f"generation: {mode}")
        own = {"max_new_tokens": STEPS, "pad_token_id": 0, **asked}  # the model's would hide what tokens say
        ones, seed = [[1] * len(p) for p in prompts], SEED if asked["do_sample"] else None
        request = Request(prompts, ones, own, seed=seed, of_model=False)
        try:
            made += _mode(subject, original, converted, mode, request, dtype, device)
        except CkptToolError as error:
            # that the greedy one, which is the level's proof, did not run is said by itself
            data = {"open": True} if mode != "greedy" else {}
            made.append(Finding(LEVEL, mode, "skipped", error.problems[0].message, data=data))
    return made


def _prompts(rows: Mapping[str, Sequence[int]], lengths: Lengths, table: int | None) -> list[list[int]]:
    """Three of several lengths, short enough that what is new fits behind them."""
    long = [list(r) for r in rows.values() if len(r) >= max(LENGTHS)]
    room = lengths.fits(max(LENGTHS) + STEPS) if table is None else min(table, lengths.fits(table))
    if not long or room < 1 + STEPS:
        return []
    taken = [min(n, room - STEPS) for n in LENGTHS]
    return [long[k % len(long)][:n] for k, n in enumerate(taken)]


def _mode(
    subject: Subject, original: Side, converted: Side, mode: str, request: Request, dtype: str, device: str
) -> list[Finding]:
    def on(side: Side, cache: bool = True) -> Made:
        return run(subject, side, replace(request, cache=cache), device=device, keep=True)

    one, other = on(original), on(converted)
    plain = on(original, cache=False) if one.kept else one
    bar = bar_of(dtype, one, plain)
    tokens = sum(len(row) - one.width for row in one.generated.sequences)
    found = [_finding(mode, one, other, bar, f"{tokens} tokens of {len(request.rows)} prompts are the same")]
    if mode == "greedy" and one.kept:
        rest = ((one, plain, "original"), (other, on(converted, cache=False), "converted"))
        for kept, whole, name in rest:
            text = f"the {name} goes on with its cache as without"
            found.append(_finding(f"cache, {name}", kept, whole, bar, text))
    return found


def _finding(check: str, one: Made, other: Made, bar: float, text: str) -> Finding:
    apart = compared(one, other, bar)
    if apart.tie:
        text = f"{apart.first}, but no score before is more than {bar:.3g} apart: a tie decides nothing"
        return Finding(LEVEL, check, "undecided", text)
    if apart.first is not None:
        return Finding(LEVEL, check, "fail", f"expected the same tokens, found another in {apart.first}")
    good = apart.worst <= bar
    text = text if good else "the tokens are the same, their scores are not"
    return Finding(LEVEL, check, "pass" if good else "fail", text, measured=apart.worst, bar=bar)
