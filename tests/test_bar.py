"""The bar: the KL of a token with an upper bound that holds as often as it says, and what a verdict makes of
it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ckpt_tool.api import Options, convert
from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.families import family
from ckpt_tool.convert.layout import Part
from ckpt_tool.convert.plan import Plan
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import verify
from ckpt_tool.verify.claims import Claim, judge
from ckpt_tool.verify.equivalence import BLOCK, MARGINS, blocks_of, bound, findings, histogram
from ckpt_tool.verify.logits import Logits, finding
from ckpt_tool.verify.measure import CAPS, Bar, Distance, LogitDistance, divergence
from ckpt_tool.verify.report import Finding

PROMPTS = (8, 19, 5, 48, 600)  # tokens of the fixed ones


def exact(p: Sequence[float], q: Sequence[float]) -> float:
    """KL with sixty digits."""
    from decimal import Decimal, localcontext

    with localcontext() as context:
        context.prec = 60
        one, other = ([Decimal(x).exp() for x in logits] for logits in (p, q))
        terms = [
            a / sum(one) * (a / sum(one) / (b / sum(other))).ln() for a, b in zip(one, other, strict=True)
        ]
        return float(sum(terms))


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-2, 3.0, 40.0])
def test_a_divergence_has_its_digits_however_small_it_is(size: float) -> None:
    made = np.random.default_rng(3)
    p = made.normal(size=(4, 50)) * 3
    q = p + size * made.normal(size=p.shape)
    found = divergence(*(torch.tensor(x).log_softmax(-1) for x in (p, q))).tolist()
    assert found == pytest.approx([exact(a, b) for a, b in zip(p, q, strict=True)], rel=1e-5)
    assert all(x > 0 for x in found)


def test_a_token_that_both_rule_out_does_not_count() -> None:
    p = torch.tensor([[0.0, 1.0, -math.inf]], dtype=torch.float64).log_softmax(-1)
    assert divergence(p, p).tolist() == [0.0]
    q = torch.tensor([[0.0, -math.inf, 1.0]], dtype=torch.float64).log_softmax(-1)
    assert divergence(p, q).tolist() == [math.inf]


def drawn(kind: str, size: float, correlation: float, draws: int) -> tuple[np.ndarray, float]:
    """Values of the tokens of PROMPTS, each depending on the one before, and their true mean."""
    made = np.random.default_rng(7)
    runs = []
    for tokens in PROMPTS:
        z = made.normal(size=(draws, tokens))
        for t in range(1, tokens):
            z[:, t] = correlation * z[:, t - 1] + math.sqrt(1 - correlation**2) * z[:, t]
        runs.append(z)
    z = np.concatenate(runs, 1)
    if kind == "log-normal":
        return np.exp(size * z), math.exp(size**2 / 2)
    tail = torch.special.ndtr(-torch.tensor(z)).numpy()
    return tail ** (-1 / size), size / (size - 1)


@pytest.mark.parametrize("correlation", [0.0, 0.9, 0.97])
@pytest.mark.parametrize(("kind", "size"), [("log-normal", 1.0), ("log-normal", 2.0), ("pareto", 1.5)])
def test_the_bound_is_above_the_true_mean_as_often_as_it_says(
    kind: str, size: float, correlation: float
) -> None:
    values, mean = drawn(kind, size, correlation, 300)
    ends = np.cumsum(PROMPTS)
    held = 0
    for row in values:
        prompts = {str(k): part.tolist() for k, part in enumerate(np.split(row, ends[:-1]))}
        held += bound(prompts).upper >= mean
    assert held >= 0.95 * len(values)


def test_blocks_are_of_tokens_that_follow_each_other_in_one_prompt() -> None:
    assert blocks_of([[1.0] * 5, [0.0] * BLOCK + [2.0] * BLOCK]) == [1.0, 0.0, 2.0]
    assert len(blocks_of([[1.0] * n for n in PROMPTS])) == 24


def test_what_a_bound_is_made_of() -> None:
    found = bound({"a": [1.0] * 32, "b": [3.0] * 32})
    # by hand: mean 2, variance 2, ln 40, range 6
    upper = 2 + math.sqrt(2 * 2 * math.log(40) / 2) + 7 * 6 * math.log(40) / 3
    assert found.upper == pytest.approx(upper)
    assert (found.mean, found.largest, found.tokens, found.blocks) == (2.0, 3.0, 64, 2)
    assert found.worse == pytest.approx(1 - math.sqrt(0.05))


def logits_of(kls: Sequence[float], holds: bool = True) -> Logits:
    far = Distance(0.1, 1e-13 if holds else 1.0, 0, 4.0)
    return Logits(far, LogitDistance(tuple(kls), 1.0, 1.0, 0.0, 0), Bar(1e-12, 1.0, far), len(kls))


def test_single_logits_of_a_narrow_dtype_do_not_fail_a_pass() -> None:
    """Of a right Code Llama in bfloat16: the mean square is below the bar, one logit of 600 tokens over."""
    quiet, far = Distance(0.05, 3e-5, 0, 6.2), Distance(0.64, 7e-4, 470, 6.2)
    same = LogitDistance((0.01,), 1.0, 1.0, 0.0, 0)
    x = Logits(far, same, Bar(3e-3, 0.5, quiet), 600, narrow=True)
    found = finding("parity", "logits", {"long": x}, torch.bfloat16)
    assert found.status == "undecided" and "their mean square is not" in found.message
    for wrong in (
        replace(x, narrow=False),
        replace(x, distance=replace(far, nmse=0.1)),
        replace(x, logits=replace(same, top1=0.99)),
    ):
        assert finding("parity", "logits", {"long": wrong}, torch.bfloat16).status == "fail"


def one(results: dict[str, Logits], dtype: str = "float32") -> Finding:
    (made,) = findings("parity", results, dtype)
    return made


def test_a_verdict_states_the_bound_against_the_margin() -> None:
    made = one({"long": logits_of([1e-13] * 320)})
    assert (made.status, made.bar) == ("pass", MARGINS["float32"])
    assert made.measured is not None and 1e-13 < made.measured < 1e-12
    shown = judge([Finding("parity", "lockstep", "pass", "equal"), made], Claim()).headline
    assert "KL at most" in shown and "95 %, margin 1e-09" in shown
    assert "up to 26% of such blocks may be worse" in made.message


@pytest.mark.parametrize("data", [{}, {"upper": "inf", "margin": []}, {"upper": None, "margin": 1}])
def test_a_finding_from_elsewhere_without_the_numbers_claims_nothing(data: dict[str, object]) -> None:
    proof = Finding("parity", "lockstep", "pass", "equal")
    said = judge([proof, Finding("parity", "equivalence", "pass", "so it says", data=data)], Claim())
    assert said.headline == "the numbers are those of its source"


def test_what_is_not_shown_to_be_below_the_margin_is_undecided() -> None:
    made = one({"long": logits_of([1e-10] * 319 + [1e-7])})  # the mean alone is below it
    assert made.data["mean"] < MARGINS["float32"] < made.data["upper"]
    assert made.status == "undecided" and "is not shown" in made.message
    assert judge([Finding("bits", "round trip", "pass", "equal"), made], Claim()).verdict == "undecided"


def test_few_tokens_have_no_bound() -> None:
    made = one({"short": logits_of([0.0] * 5)})
    assert made.status == "undecided" and "too few tokens" in made.message


def test_logits_that_differ_have_no_bound() -> None:
    made = one({"long": logits_of([1e-13] * 320, holds=False)})
    assert (made.status, made.measured) == ("note", None)


def test_equal_logits_are_said_to_be_equal() -> None:
    made = one({"long": logits_of([0.0] * 320)})
    assert made.data["upper"] == 0.0
    assert (
        "KL 0 on every token"
        in judge([Finding("parity", "lockstep", "pass", "equal"), made], Claim()).headline
    )


def test_margins_follow_the_caps() -> None:
    assert MARGINS.keys() == CAPS.keys()
    assert all(MARGINS[d] <= 10 * CAPS[d] for d in CAPS)
    assert MARGINS["bfloat16"] < 6e-3  # the strictest bar that is published for 16 bits


def test_a_histogram_counts_every_token_once() -> None:
    table = histogram({"a": [0.0, 2e-14, 3e-14, 5e-12], "b": [math.inf, math.nan]})
    counts = {row[0]: row[2] for row in table.rows}
    assert counts == {0: 1, 1e-14: 2, 1e-13: 0, 1e-12: 1, math.inf: 2}


# --- mistakes that the bits cannot show -----------------------------------------------------


def exchanged(p: Part) -> Part:
    """The two norms of a layer in each other's places."""
    a, b = "input_layernorm", "post_attention_layernorm"
    name = p.name.replace(a, "*").replace(b, a).replace("*", b)
    return replace(p, name=name)


def by_channel(p: Part) -> Part:
    """Query's rows with all heads inside of each channel."""
    if not p.name.endswith("0.self_attn.q_proj.weight"):
        return p
    (n, two, half), columns = p.dims
    return replace(p, dims=((half, two, n), columns))


@pytest.mark.parametrize(
    ("edit", "headline"),
    [
        (exchanged, "layer 0: input_layernorm and post_attention_layernorm exchanged"),
        (
            by_channel,
            "layer 0: self_attn.q_proj written as (half two n) where it should be (n two half)",
        ),
    ],
)
def test_a_wrong_row_of_the_table_passes_the_round_trip_and_not_parity(
    edit: Callable[[Part], Part], headline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = VARIANTS["mistral-7b-v0.3"].write(tmp_path / "original")
    chosen = family("mistral")
    right = chosen.plan

    def wrong(checkpoint: Checkpoint, options: Options) -> Plan:
        made = right(checkpoint, options)
        return replace(made, steps=tuple(s.with_targets(tuple(map(edit, s.targets))) for s in made.steps))

    monkeypatch.setitem(chosen.__dict__, "plan", wrong)
    convert(source, tmp_path / "out")
    report = verify(tmp_path / "out", source, mode="quick")
    assert {f.status for f in report.level("bits") if f.check == "round trip"} == {"pass"}
    assert [f.status for f in report.level("parity") if f.check == "lockstep"] == ["fail"]
    assert report.headline == headline
    (told, *_) = report.level("diagnosis")
    assert "or the table that both ways go by" in told.message
