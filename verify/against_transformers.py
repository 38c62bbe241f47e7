"""A judge that is not ours: `transformers` loads the output as any user would, and its logits are held
against the original layout's own reading.

Eager attention is asked for, since other kernels have deviated from the models: sdpa ignores the sliding
window in transformers 4.37, flash kernels see one key more or less (transformers issues 28980, 29623)."""

from __future__ import annotations

import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ckpt_tool.convert.plan import Foretold
from ckpt_tool.verify import foretold, logits
from ckpt_tool.verify.measure import CAPS, MARGIN, Bar
from ckpt_tool.verify.missing import not_run
from ckpt_tool.verify.noise import ReversedSums
from ckpt_tool.verify.prompts import Prompt
from ckpt_tool.verify.report import Finding, Status, shown
from ckpt_tool.verify.sides import Phase, Sample, Side, tensors
from ckpt_tool.verify.subject import Subject

LEVEL = "transformers"
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# What the library says when weights and model do not fit together; other warnings are about other things.
ABOUT_WEIGHTS = re.compile(
    r"newly initialized|not initialized|not used when|missing|unexpected|mismatch|reinitiali[sz]ed|"
    r"do(es)? not match|tied|size|shape",
    re.IGNORECASE,
)
# Of an exception while the weights are loaded: the files are at fault, and not the library.
OF_THE_FILES = re.compile(
    r"size mismatch|mismatched|shape|state_dict|no file named|does not appear to have|safetensors|"
    r"incomplete metadata|header",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Judged:
    """`reference` is what the library is held against: the original's reading, or the converted one without a
    source. `converted` is that of config.json, where it can be read and is not the reference. `accepted` are
    names of foretold differences."""

    reference: Side
    converted: Side | None
    accepted: tuple[str, ...] = ()


def finding(check: str, status: Status, message: str, **more: Any) -> Finding:
    return Finding(LEVEL, check, status, message, **more)


def against_transformers(
    subject: Subject,
    judged: Judged,
    prompts: Mapping[str, Prompt],
    *,
    dtype: str,
    device: str,
    progress: Callable[[str], None] | None = None,
) -> list[Finding]:
    """The findings of this comparison. What the library raises is no difference: it could not be judged then,
    unless the files of the output are at fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import transformers
        except ImportError as error:
            return [not_run(LEVEL, "import", error)]
    assert subject.hf is not None
    if (reason := _unaffordable(subject, dtype, device)) is not None:
        return [finding("load", "skipped", reason)]
    if progress is not None:
        progress(f"transformers {transformers.__version__}: loading")
    deviations = [
        finding("deviation", "note", text) for text in _deviations(subject, transformers.__version__)
    ]
    said: list[str] = []
    version = transformers.__version__
    try:
        model, info = _load(transformers, subject, dtype, device, said)
    except Exception as error:  # a library may raise anything
        text = f"transformers {version} cannot load the output: {_one_line(error)}"
        if deviations and _version(version) < (4, 43):
            return [finding("load", "skipped", text), *deviations]
        return [finding("load", _fault(transformers, subject, error), text), *deviations]
    made = [*_loading(version, info, said), *deviations]
    try:
        return [*made, *_logits(version, subject, model, judged, prompts, progress)]
    except Exception as error:
        text = f"transformers {version} cannot compute it in {dtype}: {_one_line(error)}"
        return [*made, finding("logits", "undecided", text)]


def _one_line(error: Exception) -> str:
    return shown(" ".join(f"{type(error).__name__}: {error}".split()), 400)


def _fault(transformers: Any, subject: Subject, error: Exception) -> Status:
    """Whether the output is at fault for an exception while it was loaded: its files, or a config.json of
    which the library makes no model."""
    if isinstance(error, FileNotFoundError) or OF_THE_FILES.search(_one_line(error)):
        return "fail"
    assert subject.hf is not None
    (architecture, *_) = subject.config.get("architectures") or [""]
    chosen = getattr(transformers, str(architecture), None)
    if chosen is None:
        return "undecided"  # this release does not have it
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            chosen(chosen.config_class.from_pretrained(os.fspath(subject.hf.path), local_files_only=True))
    except (ImportError, MemoryError, NotImplementedError):
        return "undecided"  # what this machine lacks says nothing of the output
    except Exception:
        return "fail"
    return "undecided"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(p) for p in text.split(".")[:2] if p.isdecimal())


def _unaffordable(subject: Subject, dtype: str, device: str) -> str | None:
    assert subject.hf is not None
    itemsize = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    need = sum(t.numel for t in subject.hf) * itemsize
    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need <= free:
        return None
    return f"the whole model takes {need / 1e9:.1f} GB in {dtype}, {free / 1e9:.1f} GB are free"


def _load(transformers: Any, subject: Subject, dtype: str, device: str, said: list[str]) -> tuple[Any, Any]:
    """The model in eval mode and what loading reports; warnings that were logged or raised are added to
    `said`."""
    assert subject.hf is not None and subject.family is not None
    (architecture, *_) = subject.config.get("architectures") or [""]
    if architecture not in subject.family.architectures:  # a name in a file decides nothing but this
        raise ValueError(f"expected one of {subject.family.architectures}, found {architecture!r}")
    chosen = getattr(transformers, architecture)
    word = "dtype" if _version(transformers.__version__) >= (4, 56) else "torch_dtype"
    more: dict[str, Any] = {word: getattr(torch, dtype)}
    if _version(transformers.__version__) >= (5, 0) and any(map(subject.config.get, EXPERTS)):
        more["experts_implementation"] = "eager"  # the default, a grouped product, has no float64
    transformers.utils.logging.disable_progress_bar()
    with _listening(said):
        model, info = chosen.from_pretrained(
            os.fspath(subject.hf.path),
            attn_implementation="eager",
            output_loading_info=True,
            local_files_only=True,
            **more,
        )
    return model.to(device).eval(), info


@contextmanager
def _listening(said: list[str]) -> Iterator[None]:
    """What the library logs or raises as a warning inside is added to `said`, and printed nowhere."""
    logger = logging.getLogger("transformers")
    before = logger.propagate, logger.handlers[:]
    logger.handlers, logger.propagate = [_Listener(said)], False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        own = [w for w in caught if not issubclass(w.category, DeprecationWarning | FutureWarning)]
        said += [str(w.message) for w in own]
    finally:
        logger.propagate, logger.handlers = before


class _Listener(logging.Handler):
    """Collects what the library logs as a warning or worse."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def _loading(version: str, info: Mapping[str, Any], said: list[str]) -> list[Finding]:
    """Keys that do not fit fail, as do warnings about weights; other warnings are notes."""
    names = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    wrong = {k: sorted(map(str, info[k])) for k in names if info.get(k)}
    if wrong:
        text = "; ".join(f"{k.replace('_', ' ')}: {', '.join(v[:4])}" for k, v in wrong.items())
        return [finding("load", "fail", f"transformers {version} loads it with {text}", data=wrong)]
    grave = [text for text in said if ABOUT_WEIGHTS.search(text)]
    if grave:
        text = f"transformers {version} loads it with a warning: {grave[0]}"
        return [finding("load", "fail", shown(text, 400), data={"warnings": grave[:20]})]
    text = f"transformers {version} loads it: no missing, unexpected or mismatched key"
    if not said:
        return [finding("load", "pass", f"{text}, no warning")]
    note = shown(f"transformers {version} warns while it loads: {said[0]}", 400)
    return [finding("load", "pass", text), finding("warnings", "note", note, data={"warnings": said[:20]})]


def _deviations(subject: Subject, version: str) -> list[str]:
    """Where this release is known not to compute what the model is, in words."""
    made, release, config = [], _version(version), subject.config
    if isinstance(config.get("sliding_window"), int) and release < (4, 43):
        made.append(
            f"transformers {version} ignores the sliding window in its default sdpa attention; eager does not"
        )
    width = config.get("hidden_size", 0) // max(1, config.get("num_attention_heads", 1))
    if config.get("head_dim") not in (None, width) and release < (4, 43):
        made.append(
            f"transformers {version} has no head_dim and takes hidden_size / num_attention_heads = {width}"
        )
    if (config.get("rope_scaling") or {}).get("rope_type") == "llama3" and release < (4, 43):
        made.append(f"transformers {version} does not know rope_type llama3")
    return made


def _logits(
    version: str,
    subject: Subject,
    model: Any,
    judged: Judged,
    prompts: Mapping[str, Prompt],
    progress: Callable[[str], None] | None,
) -> list[Finding]:
    reference = judged.reference
    dtype = reference.weights[0].dtype
    passes: dict[str, list[logits.Pass]] = {}
    raws: dict[str, dict[str, tuple[Sample, Tensor]]] = {}
    expected = foretold.expected(subject) if judged.converted is not None else {}
    said: list[str] = []
    for name, prompt in prompts.items():
        if progress is not None:
            progress(f"transformers {version}: prompt {name}")
        ids, given = tensors(prompt, reference.weights[0].device)
        ours = reference.outputs(ids, given)
        with ReversedSums():
            noisy = reference.outputs(ids, given)
        with _listening(said), torch.inference_mode():
            out = model(**_arguments(model, ids, given))
        for head, wanted in ours.items():
            if (found := _of(out, head)) is None:
                continue  # of a class that does not give it
            found = found.to(wanted.dtype)
            if head in expected:
                assert judged.converted is not None
                encoded = reference.encode(ids, given)
                raws.setdefault(head, {})[name] = Sample(encoded, wanted, given), found
                wanted = judged.converted.run(head, encoded)
                with ReversedSums():
                    noisy[head] = judged.converted.run(head, reference.encode(ids, given))
            passes.setdefault(head, []).append(
                logits.Pass(name, Sample(ids, wanted, given), found, noisy[head])
            )
    side = "the original layout's reading" if subject.original is not None else "our reading (no source)"
    words = f"transformers {version}, eager, against {side}"
    made = []
    for head, own in passes.items():
        rows = int(subject.config.get("vocab_size") or 0)
        results = _by_prompt(own, dtype, logits.kind_of(head, own[0].sample.wanted, rows))
        text = f"{words}, {expected[head].name} aside" if head in expected else words
        verdict = logits.finding(LEVEL, text, results, dtype, None if head == "head" else head)
        if verdict.status == "fail":
            converted = judged.converted if head in expected else None
            verdict = _by_rounding(verdict, own, prompts, reference, converted)
        made.append(verdict)
        if head in expected:
            alone = verdict.status == "pass"
            bars = {name: x.bar for name, x in results.items()}
            made += _foretold(judged, expected[head], head, raws[head], bars, alone)
    if said:
        text = f"transformers {version} warns while it computes: {said[0]}"
        made.append(finding("warnings", "note", shown(text, 400), data={"warnings": said[:20]}))
    return made


def _by_prompt(passes: list[logits.Pass], dtype: torch.dtype, kind: logits.Kind) -> dict[str, logits.Logits]:
    """Of one head. Results of one row each share a bar, others have their own."""
    if all(p.sample.wanted.ndim == 2 for p in passes):
        return logits.by_prompt(passes, dtype, kind)
    return {name: x for p in passes for name, x in logits.by_prompt([p], dtype, kind).items()}


def _foretold(
    judged: Judged,
    known: Foretold,
    head: Phase,
    raws: Mapping[str, tuple[Sample, Tensor]],
    bars: Mapping[str, Bar],
    alone: bool,
) -> list[Finding]:
    """The difference itself, the library's result against the original's, against the bound."""
    assert judged.converted is not None
    made = {
        name: foretold.raw(judged.converted, head, sample, found, bars[name].max_delta)
        for name, (sample, found) in raws.items()
    }
    largest = max(bars.values(), key=lambda b: b.max_delta)
    met = foretold.Met(known, head, made, largest, alone)
    return foretold.findings(LEVEL, [met], judged.accepted)


def _wanted(
    reference: Side, converted: Side | None, head: str, ids: Tensor, given: Mapping[str, Tensor]
) -> Tensor:
    """What the library is to compute: the reference's result of a head, or what `converted` makes of the
    reference's last layer where the head itself is foretold to differ."""
    if converted is None:
        return reference.outputs(ids, given)[head]
    found: Tensor = converted.run(head, reference.encode(ids, given))
    return found


def _by_rounding(
    verdict: Finding,
    passes: Collection[logits.Pass],
    prompts: Mapping[str, Prompt],
    reference: Side,
    converted: Side | None,
) -> Finding:
    """A difference once more, by what rounding it may be. The library keeps parts of a float64 model in
    float32 (norms, rotary angles), and rounds to 16 bits in other places than the original does: noise of our
    own sums does not show that. Our reading in float32 beside the one in this precision does; a hundred times
    its NMSE may be rounding, up to the cap of the coarser of the two precisions."""
    weights, head = reference.weights[0], verdict.where or "head"
    name = str(weights.dtype).removeprefix("torch.")
    if name == "float32":
        return verdict
    other = reference.computed_in(torch.float32)
    its = None if converted is None else converted.computed_in(torch.float32)
    cap = CAPS["float32" if name == "float64" else name]
    worst, bar = 0.0, math.inf
    for p in passes:
        ids, given = tensors(prompts[p.name], weights.device)
        rounded = p.sample.of(_wanted(other, its, head, ids, given).to(weights.dtype)).nmse
        assert p.found is not None
        d, limit = p.sample.of(p.found).nmse, min(cap, MARGIN**2 * rounded)
        if not d <= limit:
            return verdict
        if d >= worst:
            worst, bar = d, limit
    whole = name == "float64" and verdict.data["top1"] == 1.0
    why = (
        "transformers keeps norms and rotary angles of a float64 model in float32, whose rounding is the bar"
        if name == "float64"
        else f"{name} is rounded in other places there, which may be all: --compute-dtype float32 can tell"
    )
    data = {k: v for k, v in verdict.data.items() if k != "exactness"}
    if whole:
        data["exactness"] = "within noise floor"
    status: Status = "pass" if whole else "undecided"
    return replace(
        verdict, status=status, message=f"{verdict.message}; {why}", measured=worst, bar=bar, data=data
    )


def _arguments(model: Any, ids: Tensor, given: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of a call of the model: the mask even if nothing is padded, since some warn without one; no cache."""
    named = {
        "attention_mask": given.get("mask", torch.ones_like(ids)),
        "token_type_ids": given.get("token_types"),
        "entity_ids": given.get("entity_ids"),
        "entity_attention_mask": given.get("entity_mask"),
        "entity_position_ids": given.get("entity_positions"),
        "use_cache": False,
    }
    known = signature(model.forward).parameters
    return {"input_ids": ids, **{k: v for k, v in named.items() if k in known and v is not None}}


def _of(out: Any, head: str) -> Tensor | None:
    """The logits of a head, by our name for it: the first one of a class is `logits` or, beside others,
    `prediction_logits`."""
    names = ("logits", "prediction_logits") if head == "head" else (head,)
    found: Tensor | None = next((out[name] for name in names if name in out), None)
    return found
