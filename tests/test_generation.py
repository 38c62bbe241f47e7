"""Generation: the rules of two releases of transformers against golden runs of both and against the one that
is installed, with what is kept of earlier tokens and without, and what users see of it."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tool.errors import CkptToolError
from ckpt_tool.reference import blocks, hf_blocks
from ckpt_tool.verify import documented_generation, generated, verify
from ckpt_tool.verify.answers import Skip
from ckpt_tool.verify.expectations import parse
from ckpt_tool.verify.generate import Generated, best_of, generate
from ckpt_tool.verify.generate_options import Options, of_model, options, rules_for
from ckpt_tool.verify.generate_run import Made, Request, compared, options_apart, run
from ckpt_tool.verify.generate_scores import Place, processed
from ckpt_tool.verify.generate_session import Session, prompts_of
from ckpt_tool.verify.sides import Side, converted_side, original_side
from ckpt_tool.verify.subject import Subject, opened
from tests.in_process import program

pytestmark = pytest.mark.usefixtures("one_thread")
Written = Callable[[str], Path]
CASES = Path(__file__).parents[2] / "shared" / "cases"
GOLDEN = ("generation-gpt2", "generation-llama")


# --- golden runs of both releases -------------------------------------------------------------------------


def golden(case: str) -> tuple[Path, dict[str, Any]]:
    folder = CASES / case
    if not folder.is_dir():
        pytest.skip("the golden runs are not beside this checkout")
    return folder, json.loads((folder / "expected.json").read_text())


def near(found: Any, wanted: Any) -> bool:
    if isinstance(found, list):
        return len(found) == len(wanted) and all(map(near, found, wanted))
    return bool(found == float(wanted) or abs(found - float(wanted)) < 1e-4)


@pytest.mark.parametrize("rules", ["5", "4.37"])
@pytest.mark.parametrize("case", GOLDEN)
def test_golden_runs_come_out(case: str, rules: str) -> None:
    folder, known = golden(case)
    with opened(folder, None, look_for_source=False) as subject:
        side = converted_side(subject, torch.float32, "cpu")
        for name, wanted in known["runs"].items():
            expected = {**wanted["5.23.0"], **(wanted["4.37.2 differs in"] if rules == "4.37" else {})}
            request = Request(
                known["input_ids"], known["attention_mask"], wanted["arguments"], rules, wanted["seed"]
            )
            found = run(subject, side, request).generated
            assert found.sequences == expected["sequences"], name
            assert found.steps == expected["steps"], name
            assert near(found.transition_scores, expected["transition_scores"]), name
            assert near(found.normalized, expected["transition_scores_normalized"]), name
            if "beam_indices" in expected:
                assert found.beam_indices == expected["beam_indices"], name
                assert near(found.sequences_scores, expected["sequences_scores"]), name
                penalty = wanted["arguments"].get("length_penalty", 1.0)
                if not (rules == "4.37" and name == "beam_eos_list"):  # whose scores are of other tokens
                    assert near(found.reconstructed(penalty), expected["sequences_scores"]), name


def test_the_documented_length_is_wrong_where_a_score_is_zero() -> None:
    folder, known = golden("generation-gpt2")
    asked = known["runs"]["beam_forced_eos"]["arguments"]
    with opened(folder, None, look_for_source=False) as subject:
        side = converted_side(subject, torch.float32, "cpu")
        found = run(subject, side, Request(known["input_ids"], known["attention_mask"], asked)).generated
    negative = [sum(x < 0 for x in row) for row in found.transition_scores]
    assert found.lengths() != negative and negative[0] == found.lengths()[0] - 1
    by_sign = [sum(row) / n for row, n in zip(found.transition_scores, negative, strict=True)]
    assert near(found.reconstructed(1.0), found.sequences_scores) and not near(
        by_sign, found.sequences_scores
    )


def entry(case: str, name: str, rules: str, kind: str) -> dict[str, Any]:
    """A golden run as a documented value of the model given."""
    _, known = golden(case)
    ran = known["runs"][name]
    values = {**ran["5.23.0"], **(ran["4.37.2 differs in"] if rules == "4.37" else {})}
    told = values["sequences"] if kind == "token_ids" else values["transition_scores_normalized"]
    tolerance = {"atol": 0 if kind == "token_ids" else 1e-4, "rtol": 0, "basis": "exact"}
    more = {"scope": "prompt + new"} if kind == "token_ids" else {"normalize_logits": True}
    return {
        "id": f"gold.{name}.{kind}", "family": "gpt2", "status": "gate", "checkpoint": "mine",
        "head": "generation",
        "input": {"input_ids": known["input_ids"], "attention_mask": known["attention_mask"]},
        "input_ids_origin": "documented", "dtype": "float32", "device": "cpu", "offline_inputs": True,
        "notes": "", "source": {"document": "gold", "path": "gold"}, "tolerance": tolerance,
        "generate": {**ran["arguments"], "rules": rules, **({"seed": ran["seed"]} if ran["seed"] else {})},
        "expected": {"kind": kind, "values": told, **more},
    }  # fmt: skip


@pytest.mark.parametrize(("rules", "status"), [("4.37", "pass"), ("5", "fail")])
def test_documented_values_are_judged_by_the_release_that_documents_them(
    rules: str, status: str, tmp_path: Path
) -> None:
    folder, _ = golden("generation-gpt2")
    entries = [
        entry("generation-gpt2", "beam_penalties", "4.37", kind)
        for kind in ("token_ids", "transition_scores")
    ]
    entries += [entry("generation-gpt2", "sample_t08_p09_seed11", "4.37", "token_ids")]
    for e in entries:
        e["generate"]["rules"] = rules
    file = tmp_path / "gold.json"
    file.write_text(json.dumps({"schema_version": 1, "family": "gpt2", "entries": entries}))
    report = verify(folder, levels=("documented",), no_source=True, expectations=file)
    found = {f.check: f.status for f in report.findings}
    assert found["gold.sample_t08_p09_seed11.token_ids"] == "pass"
    assert {found["gold.beam_penalties.token_ids"], found["gold.beam_penalties.transition_scores"]} == {
        status
    }
    assert report.status == status


def test_which_release_an_entry_is_of() -> None:
    _, _ = golden("generation-gpt2")
    made = entry("generation-gpt2", "greedy", "5", "token_ids")
    del made["generate"]["rules"]
    for source, rules in (
        ({"document": "d", "path": "p", "version": "transformers v4.37.2 docs"}, "4.37"),
        ({"document": "d", "path": "p", "version": "transformers v5.23.0 docs"}, "5"),
        ({"document": "d", "path": "p", "version": "transformers 5.24.0"}, "5.24"),
        ({"document": "d", "path": "p"}, "4.37"),
    ):
        (e,) = parse(
            {"schema_version": 1, "family": "gpt2", "entries": [{**made, "source": source}]}, file="x"
        )
        assert documented_generation.rules_of(e) == rules
    made["generate"]["rules"] = "3"
    (e,) = parse({"schema_version": 1, "family": "gpt2", "entries": [made]}, file="x")
    with pytest.raises(Skip, match="none of 4.37, 5, 5.24"):
        documented_generation.rules_of(e)


# --- the installed release, and what is kept --------------------------------------------------------------

SETTINGS: tuple[tuple[dict[str, Any], int | None], ...] = (
    ({"eos_token_id": 7, "min_new_tokens": 3, "repetition_penalty": 1.4}, None),
    ({"do_sample": True, "temperature": 1.3, "typical_p": 0.7, "num_return_sequences": 2}, 5),
    ({"do_sample": True, "top_k": 0, "min_p": 0.05, "eta_cutoff": 0.02, "epsilon_cutoff": 0.01}, 6),
    ({"num_beams": 3, "num_return_sequences": 3, "length_penalty": 2.0, "early_stopping": True,
      "eos_token_id": list(range(60, 110)), "no_repeat_ngram_size": 2, "bad_words_ids": [[7], [9, 9]]}, None),
    ({"num_beams": 4, "do_sample": True, "top_p": 0.8, "eos_token_id": [5, 6], "renormalize_logits": True,
      "suppress_tokens": [8], "exponential_decay_length_penalty": [1, 1.1]}, 9),
)  # fmt: skip
ROWS = [[0, 0, 17, 40, 23], [9, 31, 12, 44, 8]]
MASK = [[0, 0, 1, 1, 1], [1] * 5]


def sides(variant: str, originals: Written, conversions: Written, stack: Any) -> tuple[Subject, Side, Side]:
    subject = stack.enter_context(opened(conversions(variant), originals(variant)))
    return (
        subject,
        original_side(subject, torch.float32, "cpu"),
        converted_side(subject, torch.float32, "cpu"),
    )


@pytest.mark.parametrize("variant", ["gemma-2-2b", "gpt2-v2-tp2"])
def test_both_sides_go_on_as_transformers_does(
    variant: str, originals: Written, conversions: Written
) -> None:
    from contextlib import ExitStack

    from transformers import AutoModelForCausalLM

    rules = rules_for(version("transformers"))
    model = AutoModelForCausalLM.from_pretrained(
        conversions(variant), dtype=torch.float32, attn_implementation="eager"
    )
    with ExitStack() as stack:
        subject, *both = sides(variant, originals, conversions, stack)
        for asked, seed in SETTINGS:
            asked = {"max_new_tokens": 7, "pad_token_id": 3, "do_sample": False, **asked}
            if seed is not None:
                torch.manual_seed(seed)
            out = model.generate(
                torch.tensor(ROWS), attention_mask=torch.tensor(MASK), return_dict_in_generate=True,
                output_scores=True, **asked,
            )  # fmt: skip
            beams = getattr(out, "beam_indices", None)
            wanted = model.compute_transition_scores(out.sequences, out.scores, beams)
            for side in both:
                found = run(subject, side, Request(ROWS, MASK, asked, rules, seed)).generated
                assert found.sequences == out.sequences.tolist(), asked
                assert near(found.transition_scores, wanted.tolist()), asked
                if beams is not None:
                    assert found.beam_indices == beams.tolist()
                    assert near(found.sequences_scores, out.sequences_scores.tolist())


def test_what_beams_draw_is_put_in_order_but_by_releases_5_0_to_5_23() -> None:
    sums = torch.linspace(-3, 0, 12).reshape(1, -1)
    found = {}
    for rules in ("4.37", "5", "5.24"):
        asked = Options(rules=rules, do_sample=True, num_beams=4)
        values, places = best_of(sums, asked, torch.Generator().manual_seed(1), 0)
        assert values.equal(sums.gather(1, places))
        found[rules] = values[0].tolist()
    assert found["4.37"] == found["5.24"] == sorted(found["5"], reverse=True) != found["5"]


# Engines and traits: ranks, heads that share keys, windows, fused tensors, learned positions.
KEPT = ("llama-1-13b", "gemma-2-2b", "gpt2-v2-tp2", "codegen-350m-mono")


@pytest.mark.parametrize("variant", KEPT)
def test_what_is_kept_changes_nothing(
    variant: str, originals: Written, conversions: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where queries are taken a few at a time."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        subject, *both = sides(variant, originals, conversions, stack)
        asked = {"max_new_tokens": 8, "num_beams": 2, "pad_token_id": 3, "eos_token_id": 5}
        rows = [ROWS[0][2:], ROWS[1] * 3]
        ones = [[1] * len(row) for row in rows]
        for side in both:
            with monkeypatch.context() as few:
                few.setattr(blocks, "AT_ONCE", 1 << 10)
                few.setattr(hf_blocks, "HELD", 1 << 10)
                kept = run(subject, side, Request(rows, ones, asked))
            whole = run(subject, side, Request(rows, ones, asked, cache=False))
            assert kept.kept > 0 and whole.kept == 0
            apart = compared(kept, whole, 1e-4)
            assert apart.first is None and apart.worst < 1e-4
            prompts = prompts_of(rows, ones, pad=3, eos=())
            words = subject.config["vocab_size"]
            first = [Session(side, prompts, words, cache=c).first() for c in (True, False)]
            assert torch.equal(*first)  # equal shapes, equal bits


MISTAKES = {
    "keys for values": (blocks, "recalled", "zip(past[place], ", "zip(past[place][::-1], ", "llama-1-13b"),
    "positions begin again": (blocks, "remembered", "[0].shape[1]", "[0].shape[1] * 0", "llama-1-13b"),
    "learned positions begin again": (blocks, "before", "shape[1] if", "shape[1] * 0 if", "gpt2-v2-tp2"),
    "the converted one keeps nothing": (
        hf_blocks,
        "grown",
        "past[name], y)",
        "past[name] * 0, y)",
        "llama-1-13b",
    ),
    "the converted one begins again": (hf_blocks, "cached", "y.shape[2]", "0 * y.shape[2]", "llama-1-13b"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_what_is_kept_is_caught(
    name: str, originals: Written, conversions: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    from contextlib import ExitStack

    module, function, old, new, variant = MISTAKES[name]
    source = inspect.getsource(getattr(module, function))
    assert source.count(old) == 1
    made: dict[str, Any] = {}
    code = compile("from __future__ import annotations\n" + source.replace(old, new), "a mistake", "exec")
    exec(code, vars(module), made)
    for known in list(sys.modules.values()):
        if known.__name__.startswith("ckpt_tool.reference") and hasattr(known, function):
            monkeypatch.setattr(known, function, made[function])
    with ExitStack() as stack:
        subject, *both = sides(variant, originals, conversions, stack)
        request = Request(
            [ROWS[1]],
            None,
            {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0},
        )
        worst = 0.0
        for side in both:
            try:
                one, other = (
                    run(subject, side, Request(request.rows, None, request.asked, cache=c), keep=True)
                    for c in (True, False)
                )
                worst = max(worst, compared(one, other, 1e-3).worst)
            except CkptToolError:
                worst = math.inf
    assert worst > 1e-2


# --- options and scores -----------------------------------------------------------------------------------


def test_the_order_of_precedence() -> None:
    model = {"do_sample": True, "temperature": 0.6, "eos_token_id": [4, 5], "max_length": 30, "top_k": None}
    found = options({}, model, "5")
    assert (found.do_sample, found.temperature, found.top_k, found.eos, found.pad) == (
        True,
        0.6,
        50,
        (4, 5),
        4,
    )
    assert options({}, model, "4.37").top_k == 0  # none in a file of that release switches it off
    none = {"eos_token_id": None}
    assert options(none, model, "5").eos == () and options(none, model, "4.37").eos == (4, 5)
    assert options({"temperature": None}, model, "5").temperature == 1.0
    both = options({"max_length": 12, "max_new_tokens": 3}, model, "5")
    assert both.total(10, None) == 13  # max_new_tokens wins


@pytest.mark.parametrize(
    ("rules", "prompt", "asked", "positions", "total"),
    [
        ("4.37", 8, {}, 512, 20), ("4.37", 25, {}, 512, 26), ("5", 8, {}, 512, 28), ("5", 8, {}, 20, 20),
        ("5", 8, {"max_length": 9}, 512, 9), ("4.37", 9, {"max_length": 9}, 512, 10),
    ],
)  # fmt: skip
def test_how_long_a_text_gets(
    rules: str, prompt: int, asked: dict[str, Any], positions: int, total: int
) -> None:
    assert options(asked, {}, rules).total(prompt, positions) == total


def test_none_and_0_of_new_tokens_are_not_the_same_in_5() -> None:
    for asked, shortest in (({}, 12), ({"min_new_tokens": None}, 12), ({"min_new_tokens": 0}, 9)):
        assert options({"min_length": 12, **asked}, {}, "5").shortest(9) == shortest
        assert options({"min_length": 12, **asked}, {}, "4.37").shortest(9) == 12


def test_names_that_a_file_alone_has_change_nothing() -> None:
    assert options({}, {"chat_format": "chatml", "top_k": 3}, "5").top_k == 3
    with pytest.raises(CkptToolError, match="another name"):
        options({"chat_format": "chatml"}, {}, "5")
    assert options({"num_beam_groups": 2}, {}, "4.37").num_beams == 1  # without beams there are no groups


@pytest.mark.parametrize(
    ("asked", "rules", "said"),
    [
        ({"temperatur": 1.0}, "5", "temperature"), ({"temperature": 0.0, "do_sample": True}, "5", "above 0"),
        ({"num_return_sequences": 2}, "5", "at most 1"),
        ({"num_beams": 2, "num_return_sequences": 3}, "5", "at most 2"),
        ({"guidance_scale": 1.5}, "5", "computed here"), ({"penalty_alpha": 0.6}, "4.37", "computed here"),
        ({"num_beams": 4, "num_beam_groups": 2}, "5", "without groups"), ({"min_p": 0.1}, "4.37", "4.37 has"),
        ({"num_beams": 4, "num_beam_groups": 2}, "4.37", "diversity_penalty"),
        ({"early_stopping": "soon"}, "5", "never"), ({"length_penalty": None}, "5", "a number"),
        ({"eos_token_id": "x"}, "5", "token id"), ({"top_k": -1}, "5", "from 0"),
        ({"max_new_tokens": 0}, "5", "at least 1"), ({"bad_words_ids": [3]}, "5", "lists of token ids"),
        ({"bad_words_ids": [[-1]]}, "5", "from 0"), ({"sequence_bias": [[[4], "x"]]}, "5", "a bias"),
        ({"sequence_bias": [[[4], math.nan]]}, "5", "a bias"), ({"early_stopping": 1}, "5", "never"),
        ({"exponential_decay_length_penalty": [1, "x"]}, "5", "a factor"),
        ({"length_penalty": 10**400}, "5", "a number"), ({"pad_token_id": 1 << 64}, "5", "token id"),
        ({"do_sample": True, "typical_p": 0.0}, "5", "part of 1"),
        ({"forced_eos_token_id": -1}, "5", "from 0"),
        ({"forced_eos_token_id": [4], "suppress_tokens": [4, 5]}, "5", "suppress_tokens leaves"),
        ({"diversity_penalty": 0.5, "num_beams": 2}, "4.37", "without groups"),
        ({"diversity_penalty": 0.5, "num_beams": 2, "num_beam_groups": 0}, "4.37", "without groups"),
    ],
)  # fmt: skip
def test_options_that_are_refused(asked: dict[str, Any], rules: str, said: str) -> None:
    with pytest.raises(CkptToolError, match=said):
        options(asked, {}, rules)


def test_without_a_word_on_what_ends_a_row_it_is_asked_for() -> None:
    with pytest.raises(CkptToolError, match="eos_token_id in generation_config.json or config.json"):
        of_model(None, {}, {})
    assert of_model(None, {}, {"eos_token_id": None}) == {}
    assert (
        of_model(None, {"eos_token_id": 2, "temperature": 0.5, "use_cache": False}, {})["temperature"] == 0.5
    )


def cut(likely: list[float], **asked: Any) -> list[int]:
    """Which of these probabilities stay."""
    o = options({"do_sample": True, "top_k": 0, **asked}, {}, "5")
    at = Place(torch.tensor([[1, 2]]), 2, 9, torch.tensor([0]))
    scores = processed(torch.tensor([likely]).log(), at, o)
    return torch.isfinite(scores[0]).nonzero().flatten().tolist()


def test_the_cuts_of_sampling_by_hand() -> None:
    p = [0.5, 0.3, 0.2]
    assert [cut(p, top_p=x) for x in (0.0, 0.5, 0.6, 0.9)] == [[0], [0], [0, 1], [0, 1, 2]]
    assert cut([0.4, 0.2, 0.2, 0.2], top_k=2) == [0, 1, 2, 3]  # ties of the last one stay
    assert cut(p, min_p=0.5) == [0, 1] and cut(p, epsilon_cutoff=0.25) == [0, 1]
    assert cut(p, top_p=0.0, num_beams=2, eos_token_id=[5, 6]) == [0, 1, 2]  # beams keep what can go on


def test_padding_is_seen_by_the_older_penalty_alone() -> None:
    ids, pads = torch.tensor([[3, 3, 1, 2]]), torch.tensor([2])
    scores = torch.ones(1, 5)
    found = [
        processed(scores, Place(ids, 4, 9, pads), Options(rules=r, repetition_penalty=2.0))[0].tolist()
        for r in ("4.37", "5")
    ]
    assert found == [[1, 0.5, 0.5, 0.5, 1], [1, 0.5, 0.5, 1, 1]]


# --- a model of a few words, whose logits are given -------------------------------------------------------


class Told:
    """The logits of the next token, whatever came before."""

    def __init__(self, logits: list[float]) -> None:
        self.logits = torch.tensor(logits)

    def fits(self, tokens: int) -> int:
        return tokens

    def takes(self, given: Mapping[str, Any]) -> set[str]:
        return set()

    def reading(self, given: Mapping[str, Any]) -> dict[str, Any]:
        from ckpt_tool.reference.phases import Phase

        embed = Phase("embed", "embed", None, lambda ids: ids[..., None].float())
        return {
            "embed": embed,
            "head": Phase("head", "head", None, lambda x: self.logits.expand(*x.shape[:2], -1)),
        }


def told(logits: list[float], asked: dict[str, Any], rules: str = "5", seed: int = 1) -> Any:
    o = options(asked, {}, rules)
    session = Session(Told(logits), prompts_of([[0]], None, pad=None, eos=()), len(logits), o.rows)  # type: ignore[arg-type]
    return generate(session, o, seed=seed)


def test_ties_infinities_and_no_numbers() -> None:
    assert told([1.0, 1.0, 0.0], {"max_new_tokens": 2}).sequences == [[0, 0, 0]]  # the first of equals
    assert told([-math.inf, -math.inf, 0.0], {"max_new_tokens": 2}).sequences == [[0, 2, 2]]
    with pytest.raises(CkptToolError, match="found NaN in row 0 of new token 1"):
        told([math.nan, 0.0], {})
    assert told([math.nan, -1.0], {"remove_invalid_values": True, "max_new_tokens": 1}).sequences == [[0, 0]]
    with pytest.raises(CkptToolError, match="all of them banned"):
        told([0.0, 0.0], {"do_sample": True, "suppress_tokens": [0, 1]})


def test_what_only_a_run_refuses() -> None:
    for seed in (1 << 64, -1 - (1 << 63)):
        with pytest.raises(CkptToolError, match="seed of 64 bits"):
            told([0.0], {}, seed=seed)
    with pytest.raises(CkptToolError, match="below 2, the size of the vocabulary, found 7"):
        told([0.0, 1.0], {"forced_eos_token_id": 7})


def test_a_token_behind_the_length_is_not_the_last_one() -> None:
    for asked, ended in (({"max_length": 1}, 0), ({"max_length": 2}, 1), ({"max_new_tokens": 1}, 1)):
        found = told([1.0, 0.0], {"forced_eos_token_id": 1, **asked}, "4.37")
        assert found.sequences == [[0, ended]]


def test_an_end_that_is_not_a_number_is_no_better_in_437() -> None:
    asked = {"num_beams": 2, "max_new_tokens": 6, "min_new_tokens": 3, "eos_token_id": 1}
    found = told([1.0, 0.5, 0.2], {**asked, "exponential_decay_length_penalty": [1, 1.2]}, "4.37")
    assert len(found.sequences[0]) == 4 and math.isnan(found.sequences_scores[0])


def test_a_vocabulary_of_one() -> None:
    assert told([0.5], {"max_new_tokens": 3}).sequences == [[0] * 4]
    with pytest.raises(CkptToolError, match="at most 1 candidates of each beam"):
        told([0.5], {"num_beams": 2})


@pytest.mark.parametrize("rules", ["4.37", "5"])
def test_beams_without_an_end_and_with_a_sure_token(rules: str) -> None:
    found = told([0.0, -1e9, -1e9], {"num_beams": 2, "max_new_tokens": 3}, rules)
    assert found.sequences == [[0, 0, 0, 0]] and found.transition_scores == [[0.0, 0.0, 0.0]]
    assert found.lengths() == [3] and found.reconstructed(1.0) == [0.0]


@pytest.mark.parametrize(
    ("rows", "mask", "said"),
    [
        ([], None, "bos_token_id"), ([[]], None, "an empty one"), ([[1, 0]], [[1, 0]], "on the left"),
        ([[1, 2]], [[0, 0]], "on the left"), ([[1]], [[0.5]], "0 and 1"),
        ([[1]], [[1, 1]], "shape of the prompts"),
        ([[1], [1, 2]], None, "pad_token_id"),
    ],
)  # fmt: skip
def test_prompts_that_are_refused(rows: list[list[int]], mask: Any, said: str) -> None:
    with pytest.raises(CkptToolError, match=said):
        prompts_of(rows, mask, pad=None, eos=())


def test_a_pad_inside_a_prompt_is_told_with_a_way_out() -> None:
    with pytest.raises(CkptToolError, match="9 is the id for padding") as told:
        prompts_of([[1, 9, 2]], None, pad=9, eos=())
    assert "attention_mask" in str(told.value.problems[0].hint)
    assert prompts_of([[1, 9, 2]], [[1, 1, 1]], pad=9, eos=()).pads == (0,)


def made(tokens: list[int], logits: list[list[float]]) -> Made:
    """A run of beams without its numbers: what each step read, and what it gave."""
    passes = [(torch.tensor([[0, *tokens[:k]]]), torch.tensor([row])) for k, row in enumerate(logits)]
    g = Generated([[0, *tokens]], [[0.0] * len(tokens)], [], len(logits), [0.0], [[0] * len(tokens)], passes)
    return Made(g, Options(num_beams=2), prompts_of([[0]], None, pad=None, eos=()), 0)


def test_other_beams_are_a_tie_where_all_that_both_read_scores_the_same() -> None:
    """In 16 bits a right conversion chooses other beams; a wrong one has other scores before it does."""
    one = made([3, 4], [[1.0, 2.0], [5.0, 6.0]])
    tie = compared(one, made([3, 5], [[1.0, 2.1], [5.0, 6.0]]), 0.15)
    assert tie.first == "row 0, new token 2: 4 and 5" and tie.tie
    assert compared(one, made([2, 5], [[1.0, 2.1], [9.0, 9.0]]), 0.15).tie  # of other texts from there on
    assert not compared(one, made([3, 5], [[1.0, 2.2], [5.0, 6.0]]), 0.15).tie
    assert not compared(one, made([3, 5], [[1.0, math.nan], [5.0, 6.0]]), 0.15).tie


def test_padding_is_told_by_its_id_unless_that_ends_a_row() -> None:
    assert prompts_of([[9, 9, 1], [1, 2, 3]], None, pad=9, eos=()).pads == (2, 0)
    assert prompts_of([[9, 9, 1], [1, 2, 3]], None, pad=9, eos=(9,)).pads == (0, 0)
    assert prompts_of([[1], [1, 2, 3]], None, pad=9, eos=()).rows == ((9, 9, 1), (1, 2, 3))
    assert prompts_of([], None, pad=None, eos=(), bos=4).rows == ((4,),)


# --- what users see ---------------------------------------------------------------------------------------


@cache
def changed(folder: Path, scratch: Path) -> Path:
    shutil.copytree(folder, scratch)
    file = next(scratch.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["transformer.ln_f.weight"] = tensors["transformer.ln_f.weight"].flip(0)
    save_file(tensors, file, metadata={"format": "pt"})
    return scratch


def test_the_command_says_what_follows_and_where_the_source_goes_on_otherwise(
    originals: Written, conversions: Written, tmp_path: Path
) -> None:
    folder, source = conversions("gpt2-v2-tp2"), originals("gpt2-v2-tp2")
    asked = ("--prompt-ids", "5,6,7,8", "--prompt-ids", "9 10", "--option", "max_new_tokens=4")
    asked = (*asked, "--option", "pad_token_id=0")
    found = program("generate", str(folder), "--source", str(source), *asked, cwd=tmp_path)
    assert found.returncode == 0
    assert "greedy search by the rules of transformers 5: 4 steps with a cache of" in found.stdout
    assert "the source goes on with the same tokens" in found.stdout
    other = changed(folder, tmp_path / "other")
    worse = program("generate", str(other), "--source", str(source), *asked, "--json", cwd=tmp_path)
    assert worse.returncode == 1
    told = json.loads(worse.stdout)
    assert told["input_ids"] == [[5, 6, 7, 8], [0, 0, 9, 10]] and not told["source"]["same_tokens"]
    beams = program(
        "generate", str(folder), "--prompt-ids", "5 6", "--mode", "beam", "--rules", "4.37", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    made = json.loads(beams.stdout)
    assert near(made["reconstructed_scores"], made["sequences_scores"]) and made["rules"] == "4.37"
    assert len(made["sequences"][0]) == 20  # the prompt is counted there


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--prompt-ids", "5,x"), "token ids such as"),
        (("--prompt-ids", "5", "--prompt", "a"), "in one way"),
        (("--prompt-ids", "99999"), "the size of the vocabulary"),
        (("--prompt-ids", "5", "--mode", "sample"), "a seed"),
        (("--prompt-ids", "5", "--option", "top_k"), "KEY=VALUE"),
        (("--prompts", "no.json"), "error[not-found]: no.json: --prompts: expected a file, found none"),
    ],
)  # fmt: skip
def test_slips_of_the_command(
    asked: tuple[str, ...], said: str, conversions: Written, tmp_path: Path
) -> None:
    found = program("generate", str(conversions("llama-1-13b")), *asked, cwd=tmp_path)
    assert found.returncode == 2 and said in " ".join(found.stderr.split())


def test_the_level_passes_and_fails(originals: Written, conversions: Written, tmp_path: Path) -> None:
    source = originals("gpt2-v2-tp2")
    good = verify(conversions("gpt2-v2-tp2"), source, levels=("generation",))
    assert good.status == "pass"
    assert "the tokens that it goes on with from these prompts are those" in good.judgement.headline
    found = {f.check: f.status for f in good.findings if f.level == "generation"}
    assert found == dict.fromkeys(
        ("greedy", "sampled", "beams", "cache, original", "cache, converted"), "pass"
    )
    bad = verify(changed(conversions("gpt2-v2-tp2"), tmp_path / "other"), source, levels=("generation",))
    assert bad.status == "fail"


def test_a_mode_that_did_not_run_is_in_the_headline(
    originals: Written, conversions: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what greedy search alone has shown would stand for all of them."""
    greedy, none = generated.MODES["greedy"], {"do_sample": False, "num_beams": 0}
    monkeypatch.setattr(generated, "MODES", {"greedy": greedy, "beams": none})
    report = verify(conversions("llama-1-13b"), originals("llama-1-13b"), levels=("generation",))
    assert report.status == "pass"
    assert report.headline.endswith("; beams not compared: expected at least 1, found 0")
    monkeypatch.setattr(generated, "MODES", {"greedy": none, "beams": greedy})
    source = originals("llama-1-13b")
    report = verify(conversions("llama-1-13b"), source, levels=("bits", "generation"))
    assert report.headline == (
        "the bits are those of its source; generation not shown: expected at least 1, found 0"
    )


def test_long_options_are_cut() -> None:
    one, other = Options(), Options(suppress_tokens=tuple(range(100_000)))
    (text,) = options_apart(one, other)
    assert text.startswith("suppress_tokens () and (0, 1, 2, ") and len(text) < 120


@pytest.mark.parametrize("side", ["output", "source"])
def test_the_source_goes_on_by_its_own_options(
    side: str, originals: Written, conversions: Written, tmp_path: Path
) -> None:
    """Those of the output would hide that it generates otherwise."""
    sides = {"output": conversions("qwen2-0.5b"), "source": originals("qwen2-0.5b")}
    changed_side = shutil.copytree(sides[side], tmp_path / side)
    file = changed_side / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 1.8}))
    asked = ("--prompt-ids", "5,9,31,7,12", "--mode", "greedy", "--option", "max_new_tokens=5", "--json")
    both = {**sides, side: changed_side}
    found = program("generate", str(both["output"]), "--source", str(both["source"]), *asked, cwd=tmp_path)
    told = json.loads(found.stdout)["source"]
    values = "1.0 and 1.8" if side == "output" else "1.8 and 1.0"
    assert found.returncode == 1 and not told["same_tokens"] and not told["tie"]
    assert told["other_options"] == [f"repetition_penalty {values}"]


def test_an_encoder_does_not_go_on(conversions: Written, tmp_path: Path) -> None:
    found = program("generate", str(conversions("mluke-base")), "--prompt-ids", "5", cwd=tmp_path)
    assert found.returncode == 2 and "expected a decoder" in found.stderr
