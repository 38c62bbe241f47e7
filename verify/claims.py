"""What a report may claim: the verdict, its exit code and one headline, from the findings and from what was
asked for.

A finding passes, fails, was skipped (did not run, or there was nothing to compare), or is undecided (it ran
and could not be judged). A verdict passes only where something was shown: with a source the round trip or the
lockstep run, without one nothing but the manifest, and that only where it was asked for (`no_source`)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, get_args

from ckpt_tool.records import dataclass

if TYPE_CHECKING:
    from ckpt_tool.verify.expectations import Expectation
    from ckpt_tool.verify.prompts import Prompts
    from ckpt_tool.verify.report import Finding

Mode = Literal["default", "quick", "thorough"]
MODES: tuple[Mode, ...] = get_args(Mode)
Verdict = Literal["pass", "fail", "undecided"]
Against = Literal["source", "manifest", "baseline", "nothing"]

# The checks of which one must pass where there is a source, with what each shows; see verify.bits,
# verify.parity, verify.against_transformers.
PROOFS = {
    ("bits", "round trip"): "the bits",
    ("parity", "lockstep"): "the numbers",
    ("transformers", "logits"): "what transformers computes of it",
    ("training", "step"): "the changes of one training step on these prompts",
    ("generation", "greedy"): "the tokens that it goes on with from these prompts",
    ("onnx", "outputs"): "the numbers that onnxruntime gives",
}
NOT_COMPARED = "not compared with a source"
AS_SOURCE = "as the source has it"  # in the data of a fault that was there before
CAST_FIRST = "cast_first"  # in the data of what says that the source was cast before it was compared
OF_MANIFEST = ("coverage", "bits")  # the levels that compare with the manifest, where there is no source
WITHOUT_COPIES = "identical without copies"  # that the way back was asked to leave out unseen
CLASSES = (
    "differs",
    "within the foretold difference",
    "within noise floor",
    WITHOUT_COPIES,
    "identical after cast",
    "bit-identical",
)


@dataclass(frozen=True)
class Asked:
    """What the caller of `verify` asked for."""

    levels: tuple[str, ...]
    against: str | None
    prompts: str | os.PathLike[str] | Prompts | None
    dtype: str
    device: str
    checkpoint_id: str | None
    accept: tuple[str, ...] = ()  # foretold differences that do not fail
    elsewhere: str | os.PathLike[str] | None = None  # where another release of transformers is
    recorded: Sequence[Expectation] | None = None  # values to hold against instead of the documented ones
    mode: Mode = "default"  # how much of parity runs (verify.effort)
    memory: int | None = None  # bytes that parity may take; None: as verify.pace has it


@dataclass(frozen=True)
class Claim:
    """What a report was asked to show. `against` is what the output is compared with, `asked` the levels and
    checks that were named by the user, each as (level, words for it): one of which nothing passed could not
    be shown. `no_source`: the user knows that there is no source."""

    against: Against = "source"
    asked: tuple[tuple[str, str], ...] = ()
    no_source: bool = False


def words_for(
    levels: Iterable[str], against: str | None, checkpoint_id: str | None
) -> tuple[tuple[str, str], ...]:
    """What was asked for by name, each as (level, words for it)."""
    asked = [(level, f"level {level}") for level in levels]
    if against is not None:
        asked.append((against, f"--against {against}"))
    if checkpoint_id is not None:
        asked.append(("documented", f"--checkpoint-id {checkpoint_id}"))
    return tuple(asked)


@dataclass(frozen=True)
class Judgement:
    """`headline` is one sentence without the verdict's word; `missing` says what was asked for and not
    shown."""

    verdict: Verdict
    headline: str
    missing: tuple[str, ...] = ()


def judge(findings: Sequence[Finding], claim: Claim, could_not_run: bool = False) -> Judgement:
    """The verdict over all findings."""
    failures = [f for f in findings if f.status == "fail"]
    undecided = [f for f in findings if f.status == "undecided"]
    if could_not_run:
        return Judgement("undecided", _first(undecided) or "could not run")
    if failures:
        return Judgement("fail", _cause(findings) or _first(failures))
    missing = tuple(_not_shown(findings, claim))
    if undecided:
        return Judgement("undecided", f"could not be judged: {_first(undecided)}", missing)
    if missing:
        return Judgement("undecided", missing[0], missing)
    if claim.against == "source":
        return Judgement("pass", _proved(findings))
    if claim.against == "baseline":
        return Judgement(
            "pass", "no worse than the baseline, of which it has the shortcomings that are noted"
        )
    shown = [f"{_of_manifest(findings)}; {NOT_COMPARED}"] if claim.against == "manifest" else []
    if count := _documented(findings, claim):
        shown.insert(0, f"gives the {count} values that were asked for" if shown else (
            f"gives the {count} values that were asked for; {NOT_COMPARED}"
        ))  # fmt: skip
    return Judgement("pass", ", and is ".join(shown))


def _documented(findings: Sequence[Finding], claim: Claim) -> int:
    """How many documented or recorded values it gives, where it was asked by name whether it does."""
    if not any(level == "documented" for level, _ in claim.asked):
        return 0
    return sum(1 for f in findings if f.level == "documented" and f.status == "pass")


def exactness(findings: Sequence[Finding]) -> str | None:
    """The best class that was shown (`CLASSES`), the worst where anything failed; None where neither bits nor
    numbers were compared."""
    found = {str(f.data["exactness"]) for f in findings if "exactness" in f.data}
    if "differs" in found or (
        found and any(f.status == "fail" and not f.data.get(AS_SOURCE) for f in findings)
    ):
        return "differs"
    if "within the foretold difference" in found:
        return "within the foretold difference"
    return next((c for c in reversed(CLASSES) if c in found), None)


def _not_shown(findings: Sequence[Finding], claim: Claim) -> Iterable[str]:
    """What keeps a report without failures from passing, in words."""
    for level, words in claim.asked:
        own = [f for f in findings if f.level == level]
        if not any(f.status == "pass" for f in own):
            reason = next((f.message for f in own if f.status == "skipped"), "nothing was measured")
            yield f"{words} was asked for and did not run: {reason}"
    if claim.against == "source":
        proofs = [f for f in findings if (f.level, f.check) in PROOFS]
        if not any(f.status == "pass" for f in proofs):
            why = next((f.message for f in proofs if f.status == "skipped"), None)
            why = why or next(
                (f.message for f in findings if f.status == "skipped" and f.check in ("plan", "round trip")),
                "neither level ran",
            )
            yield f"nothing was compared with the source, neither bits nor numbers: {why}"
    elif claim.against == "baseline" or _documented(findings, claim):
        return
    elif claim.against == "nothing":
        yield f"there is no manifest either; {NOT_COMPARED} (--source PATH compares)"
    elif not any(f.level in OF_MANIFEST and f.status == "pass" for f in findings):
        yield f"nothing was compared with its manifest either; {NOT_COMPARED} (--source PATH compares)"
    elif not claim.no_source:
        what = _of_manifest(findings)
        yield f"{what}; {NOT_COMPARED} (--source PATH compares, --no-source accepts this)"


def _of_manifest(findings: Sequence[Finding]) -> str:
    """What was compared with the manifest: of names, shapes and values alone no bit is known."""
    if any((f.level, f.check, f.status) == ("bits", "checksums", "pass") for f in findings):
        return "consistent with its manifest"
    return "of the names, shapes and values of its manifest, whose checksums were compared with nothing"


def _proved(findings: Sequence[Finding]) -> str:
    """Which proofs passed, and what stayed open."""
    passed = {(f.level, f.check): f for f in findings if f.status == "pass"}
    shown = [
        f"{words} of {part}" if (part := passed[proof].data.get("sampled")) else words
        for proof, words in PROOFS.items()
        if proof in passed
    ]
    text = f"{', '.join(shown[:-1])}{' and ' * (len(shown) > 1)}{shown[-1]} are those of its source"
    recipe = next((f.data["recipe"] for f in findings if f.check == "dequantised"), None)
    if recipe is not None:
        text += f" once it is dequantised by the recipe {recipe}"
    elif (wider := next((f.data["wider"] for f in findings if "wider" in f.data), None)) is not None:
        text += f" once they are cast ({wider}), which keeps every value"
    elif exactness(findings) == "identical after cast" or any(f.data.get(CAST_FIRST) for f in findings):
        text += " once it is cast or pooled as recorded or accepted"
    if exactness(findings) == WITHOUT_COPIES:
        text += ", but for the copies that were left out and compared with nothing"
    for level, check in PROOFS:
        own = [f for f in findings if (f.level, f.check) == (level, check) and f.status == "skipped"]
        if own and level != "transformers":
            text += f"; {level} not shown: {own[0].message}"
    for f in findings:
        if (f.level, f.check, f.status) == ("parity", "equivalence", "pass"):
            text += _equivalent(f.data.get("upper"), f.data.get("margin"))
        of_numbers = f.level == "parity" or (f.level == "training" and ("parity", "lockstep") not in passed)
        if of_numbers and (part := f.data.get("part")):
            by_bits = ("bits", "round trip") in passed
            text += f"; {part} {'by its bits alone' if by_bits else 'was not compared'}"
        if f.data.get("by_results"):  # of a graph, in which weights may be folded
            text += f"; {f.data['by_results']} are not in it as they are, and judged by these prompts alone"
        if f.data.get("without"):
            text += f"; {f.data['without']} left out with --drop and compared with nothing"
        if f.data.get("aside"):
            text += f"; {f.data['aside']}"
        if f.data.get("insisted"):
            text += f"; {f.data['insisted']} as given with --set, against what its files say"
        if f.data.get("trusted"):
            text += f"; only the manifest tells {f.data['trusted']}"
        if f.status == "skipped" and f.data.get("open"):
            text += f"; {f.check} not compared: {f.message}"
    return text


def _equivalent(upper: object, margin: object) -> str:
    """The bound of the mean KL of a token against its margin; see verify.equivalence. A certificate from
    elsewhere may hold anything."""
    if not (isinstance(upper, int | float) and isinstance(margin, int | float)):
        return ""
    if upper == 0:
        return "; KL 0 on every token tried"
    return f"; KL at most {upper:.2g} nats a token on prompts like those tried (95 %, margin {margin:.0e})"


def claimed_without_numbers(headline: str) -> str:
    """A headline without what was measured, which differs from machine to machine."""
    return re.sub(r"; KL (at most \S+ nats a token|0 on every token)", "; KL of a token", headline)


def _cause(findings: Sequence[Finding]) -> str | None:
    """The cause that a diagnosis found, where it is."""
    for f in findings:
        if f.level == "diagnosis" and f.data.get("cause"):
            return f"{f.where}: {f.data['cause']}" if f.where else str(f.data["cause"])
    return None


def _first(findings: Sequence[Finding]) -> str:
    if not findings:
        return ""
    f = findings[0]
    return f"{f.where}: {f.message}" if f.where else f.message
