"""A judge that is not ours: `transformers` loads the output as any user would, and what its heads give is
held against the original layout's own reading."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.convert.plan import Foretold
from ckpt_tool.convert.quantised import FP8_BLOCKS, Quantised, found_in
from ckpt_tool.records import dataclass
from ckpt_tool.reference.hf_blocks import of_last_token
from ckpt_tool.verify import foretold, library, logits
from ckpt_tool.verify.library import Library, NotLoaded, Unavailable, one_line, release
from ckpt_tool.verify.measure import CAPS, MARGIN, Bar
from ckpt_tool.verify.missing import not_run
from ckpt_tool.verify.needs import free_memory
from ckpt_tool.verify.noise import ReversedSums
from ckpt_tool.verify.parity import WholePasses
from ckpt_tool.verify.prompts import Prompt
from ckpt_tool.verify.report import Finding, Status, number, shown
from ckpt_tool.verify.sides import Phase, Sample, Side, tensors
from ckpt_tool.verify.subject import Subject

LEVEL = "transformers"
# What the library says when weights and model do not fit together; other warnings are about other things.
ABOUT_WEIGHTS = re.compile(
    r"newly initialized|not initialized|not used when|missing|unexpected|mismatch|reinitiali[sz]ed|"
    r"do(es)? not match|tied|size|shape",
    re.IGNORECASE,
)
# That a factor is not the ratio of two lengths: the library says so, and takes the factor.
OF_A_RATIO = re.compile(r"RoPE scaling factor .* does not match the ratio", re.DOTALL)
EXPERT = ".experts."  # in the names of their weights, stacked or one by one
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
    names of foretold differences, `elsewhere` where the user has another release (verify.library). `whole`
    are passes of the original that parity made; the others are made here."""

    reference: Side
    converted: Side | None
    accepted: tuple[str, ...] = ()
    elsewhere: str | os.PathLike[str] | None = None
    padding: int | None = None  # the id of config.json
    whole: WholePasses = field(default_factory=dict)


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
    found = _against(subject, judged, prompts, dtype, device, progress)
    return [*map(_of_the_source, found)] if subject.direction == "to-original" else found


def _of_the_source(f: Finding) -> Finding:
    """On the way back the library reads the source: that it does not load says nothing of the output."""
    text = f.message.replace("the output", "the source").replace("loads it with", "loads the source with")
    at_fault = f.check == "load" and f.status == "fail"
    return replace(f, message=text, status="undecided" if at_fault else f.status)


def _against(
    subject: Subject,
    judged: Judged,
    prompts: Mapping[str, Prompt],
    dtype: str,
    device: str,
    progress: Callable[[str], None] | None,
) -> list[Finding]:
    assert subject.hf is not None
    if (reason := _unaffordable(subject, dtype, device)) is not None:
        return [finding("load", "skipped", reason)]
    try:
        judge = _judge(subject, library.elsewhere(judged.elsewhere))
    except ImportError as error:
        return [not_run(LEVEL, "import", error)]
    except Unavailable as reason:
        return [finding("logits", "skipped", str(reason), data={"open": True})]
    try:
        made = _loaded(judge, subject, prompts, dtype, device, progress)
    except Unavailable as reason:
        return [finding("logits", "skipped", str(reason), data={"open": True})]
    except NotLoaded as error:
        text = f"transformers {error.version} cannot load the output: {error.error}"
        if (method := _unknown_method(subject)) is not None:
            text = f"transformers {error.version} has no reader of weights that {method} quantised"
            return [finding("load", "undecided", text)]
        deviations = _deviations(subject, error.version)
        if deviations and release(error.version) < (4, 43):
            return [finding("load", "skipped", text), *deviations]
        return [finding("load", _fault(judge, subject, error), text), *deviations]
    version = made.version
    unused = (judged.converted or judged.reference).unused
    loading = [*_loading(version, made.info, made.said, unused), *_deviations(subject, version)]
    loading += _plain_inputs(version, made.info)
    if (odd := _other_blocks(subject, version) or _rounded(subject, version, made.info)) is not None:
        return [*loading, finding("logits", "undecided", odd)]
    if (drawn := _made_up(version, made.info, unused)) is not None:
        return [*loading, finding("logits", "skipped", drawn)]
    try:
        return [*loading, *_logits(subject, made, judged, prompts, progress)]
    except Exception as error:
        text = f"transformers {version} cannot compute it in {dtype}: {one_line(error)}"
        return [*loading, finding("logits", "undecided", text)]


def _judge(subject: Subject, other: Path | None) -> Any:
    """The installed release where it has the architecture, else the Python of another that the user named.
    ImportError or Unavailable where there is neither."""
    try:
        transformers = library.installed()
    except ImportError:
        if other is None:
            raise
        return other
    try:
        architecture = library.architecture_of(subject)
    except ValueError:
        return transformers  # which tells what is wrong when it loads
    if hasattr(transformers, architecture):
        return transformers
    if other is None:
        text = f"transformers {transformers.__version__} has no {architecture}"
        raise Unavailable(f"{text}; {library.HINT}")
    return other


def _loaded(
    judge: Any,
    subject: Subject,
    prompts: Mapping[str, Prompt],
    dtype: str,
    device: str,
    progress: Callable[[str], None] | None,
) -> Library:
    if progress is not None:
        progress(f"transformers {getattr(judge, '__version__', judge)}: loading")
    make = library.there if isinstance(judge, Path) else library.here
    return make(judge, subject, prompts, dtype, device)


def _other_blocks(subject: Subject, version: str) -> str | None:
    """That the library takes other blocks of fp8 than config.json says: where it makes numbers of them while
    loading, it divides rows by rows of scales (5.23.0, integrations/finegrained_fp8.py)."""
    if subject.hf is None or not subject.config.get("quantization_config"):
        return None
    inventory = found_in(subject.hf)
    weights = [] if inventory is None else list(inventory.weights.values())
    odd = [w for w in weights if w.kind == FP8_BLOCKS and _divided(w) != w.block]
    if not odd:
        return None
    rows, columns = _divided(odd[0])
    text = f"transformers {version} reads {len(odd)} weights in other blocks than config.json says, the first"
    return f"{text} {odd[0].name} in {rows} x {columns}: it divides rows by rows of scales"


def _rounded(subject: Subject, version: str, info: Mapping[str, Any]) -> str | None:
    """That the library makes other numbers of codes than their products: those of experts, which it stacks,
    it rounds to the dtype of their scales (5.23.0 with compressed-tensors 0.20.1), and holds them so."""
    narrow = [n for n in info.get(library.NARROW) or () if EXPERT in n]
    inventory = found_in(subject.hf) if narrow and subject.hf is not None else None
    own = {} if inventory is None else inventory.weights
    short = next((w for n, w in own.items() if EXPERT in n and w.scales.dtype in ("BF16", "F16")), None)
    if short is None:
        return None
    dtype = DTYPES[short.scales.dtype].torch
    text = f"transformers {version} rounds the numbers of experts to {dtype}, the dtype of their scales"
    return f"{text}, and no reading of ours does: {narrow[0]}, and {len(narrow) - 1} more alike"


def _plain_inputs(version: str, info: Mapping[str, Any]) -> list[Finding]:
    """That it would have computed with rounded inputs, which says nothing of weights."""
    if not (count := info.get(library.INPUTS)):
        return []
    text = f"as config.json says, transformers {version} rounds the inputs of {count} layers to codes"
    return [finding("inputs", "note", f"{text}; here they were left as they are, so that weights are judged")]


def _divided(weight: Quantised) -> tuple[int, int]:
    rows, columns, high, wide = (*weight.shape[-2:], *weight.scales.shape[-2:])
    return (rows // high if high > 1 else weight.block[0]), (columns // wide if wide > 1 else weight.block[1])


def _unknown_method(subject: Subject) -> str | None:
    """The method by which weights are quantised, where the installed release takes their codes as numbers."""
    try:
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    except ImportError:
        return None
    said = subject.config.get("quantization_config")
    method = said.get("quant_method") if isinstance(said, Mapping) else None
    return method if isinstance(method, str) and method not in AUTO_QUANTIZER_MAPPING else None


def _fault(transformers: Any, subject: Subject, error: NotLoaded) -> Status:
    """Whether the output is at fault for an exception while it was loaded: its files, or a config.json of
    which the library makes no model."""
    if isinstance(error.own, FileNotFoundError) or OF_THE_FILES.search(error.error):
        return "fail"
    if error.own is None:
        return "undecided"  # raised elsewhere, where no model is made of config.json alone
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


def _unaffordable(subject: Subject, dtype: str, device: str) -> str | None:
    assert subject.hf is not None
    itemsize = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    need = sum(t.numel for t in subject.hf) * itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else free_memory()
    if need <= free:
        return None
    return f"the whole model takes {need / 1e9:.1f} GB in {dtype}, {free / 1e9:.1f} GB are free"


def _loading(
    version: str, info: Mapping[str, Any], said: list[str], unused: Collection[str] = ()
) -> list[Finding]:
    """Keys that do not fit fail, as do warnings about weights; other warnings are notes. Missing keys that
    are `unused` are named, and no failure: what the class fills them with is in no result."""
    names = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    wrong = {k: sorted(map(str, info[k])) for k in names if info.get(k)}
    idle = [name for name in wrong.get("missing_keys", []) if name in unused]
    if idle and len(idle) == len(wrong["missing_keys"]):
        del wrong["missing_keys"]
    if wrong:
        text = "; ".join(f"{k.replace('_', ' ')}: {', '.join(v[:4])}" for k, v in wrong.items())
        return [finding("load", "fail", f"transformers {version} loads it with {text}", data=wrong)]
    other = [text for text in said if not any(name in text for name in idle)]
    grave = [text for text in other if ABOUT_WEIGHTS.search(text) and not OF_A_RATIO.search(text)]
    if grave:
        text = f"transformers {version} loads it with a warning: {grave[0]}"
        return [finding("load", "fail", shown(text, 400), data={"warnings": grave[:20]})]
    text = f"transformers {version} loads it: no missing, unexpected or mismatched key"
    if idle:
        text += f" but {', '.join(idle)}, which the class makes and does not use"
    if not other:
        return [finding("load", "pass", text if said else f"{text}, no warning")]
    note = shown(f"transformers {version} warns while it loads: {other[0]}", 400)
    return [finding("load", "pass", text), finding("warnings", "note", note, data={"warnings": other[:20]})]


def _made_up(version: str, info: Mapping[str, Any], unused: Collection[str]) -> str | None:
    """That the library drew weights at random which the output has not, as of a head that it is without: what
    it computes of them is nothing to compare. None where it made up none that are used."""
    names = sorted({*map(str, info.get("missing_keys") or ())} - {*unused})
    if not names:
        return None
    shown_names = ", ".join(names[:4]) + ", ..." * (len(names) > 4)
    return f"transformers {version} made up what the output has not ({shown_names}): not compared"


def _deviations(subject: Subject, version: str) -> list[Finding]:
    """Where this release is known not to compute what the model is."""
    made, config = [], subject.config
    if isinstance(config.get("sliding_window"), int) and release(version) < (4, 43):
        made.append(
            f"transformers {version} ignores the sliding window in its default sdpa attention; eager does not"
        )
    width = config.get("hidden_size", 0) // max(1, config.get("num_attention_heads", 1))
    if config.get("head_dim") not in (None, width) and release(version) < (4, 43):
        made.append(
            f"transformers {version} has no head_dim and takes hidden_size / num_attention_heads = {width}"
        )
    if (config.get("rope_scaling") or {}).get("rope_type") == "llama3" and release(version) < (4, 43):
        made.append(f"transformers {version} does not know rope_type llama3")
    return [finding("deviation", "note", text) for text in made]


@dataclass
class Passes:
    """What was computed of each prompt: by head the passes to compare, and where a difference is foretold the
    original's own result with the library's. `lacking` are heads that the library does not
    give, `more` its outputs that no head of ours is."""

    by_head: dict[str, list[logits.Pass]] = field(default_factory=dict)
    raws: dict[str, dict[str, tuple[Sample, Tensor]]] = field(default_factory=dict)
    lacking: set[str] = field(default_factory=set)
    more: set[str] = field(default_factory=set)
    said: list[str] = field(default_factory=list)


def _passes(
    made: Library,
    judged: Judged,
    expected: Mapping[Phase, Foretold],
    prompts: Mapping[str, Prompt],
    progress: Callable[[str], None] | None,
) -> Passes:
    found, reference, trunk = Passes(), judged.reference, _trunk(judged, expected)
    for name, prompt in prompts.items():
        if progress is not None:
            progress(f"transformers {made.version}: prompt {name}")
        ids, given = tensors(prompt, reference.weights[0].device)
        ours, noisy = _ours(judged, name, ids, given)
        out, said = made.compute(name)
        found.said += said
        used = {head: _name(out, head, wanted, ours) for head, wanted in ours.items()}
        found.lacking |= {head for head, name in used.items() if name is None}
        found.more |= {n for n, x in out.items() if isinstance(x, Tensor)} - {*used.values()} - {"loss"}
        for head, output in used.items():
            if output is None:
                continue
            wanted, its = ours[head], out[output].to(ours[head].dtype)
            if wanted.ndim == its.ndim + 1:  # a class of sequences gives the last token's of what has all
                ours[head] = wanted = of_last_token(wanted, ids, judged.padding)
                noisy[head] = of_last_token(noisy[head], ids, judged.padding)
            if head in expected or trunk:
                assert judged.converted is not None
                found.raws.setdefault(head, {})[name] = Sample(ids, wanted, given), its
                wanted = _wanted(reference, judged.converted, head, ids, given, trunk)
                with ReversedSums():
                    noisy[head] = _wanted(reference, judged.converted, head, ids, given, trunk)
            one = logits.Pass(name, Sample(ids, wanted, given), its, noisy[head])
            found.by_head.setdefault(head, []).append(one)
    return found


def _ours(
    judged: Judged, name: str, ids: Tensor, given: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What each head of the reference gives, and the same with reversed sums: of parity where that ran the
    prompt, since it is the same reading of the same weights."""
    if (known := judged.whole.get(name)) is not None:
        heads = [head for head in map(str, judged.reference.reading(given)) if head in known]
        return {h: known[h][0] for h in heads}, {h: known[h][1] for h in heads}
    ours = judged.reference.outputs(ids, given)
    with ReversedSums():
        return ours, judged.reference.outputs(ids, given)


def _trunk(judged: Judged, expected: Mapping[Phase, Foretold]) -> bool:
    """Whether a difference is foretold before the heads, so that it reaches all of them."""
    heads = {"head", *judged.reference.heads()}
    return bool(expected.keys() - heads)


def _logits(
    subject: Subject,
    library: Library,
    judged: Judged,
    prompts: Mapping[str, Prompt],
    progress: Callable[[str], None] | None,
) -> list[Finding]:
    reference, version = judged.reference, library.version
    dtype = reference.weights[0].dtype
    expected = foretold.expected(subject) if judged.converted is not None else {}
    found, trunk = _passes(library, judged, expected, prompts, progress), _trunk(judged, expected)
    side = "the original layout's reading" if subject.original is not None else "our reading (no source)"
    words = f"transformers {version}, eager, against {side}"
    made = []
    for head, own in found.by_head.items():
        vocabulary = (judged.converted or reference).vocabulary
        results = _by_prompt(own, dtype, logits.kind_of(head, own[0].sample.wanted, vocabulary))
        known = [expected[head]] if head in expected else [*expected.values()] if trunk else []
        text = f"{words}, {known[0].name} aside" if known else words
        verdict = logits.finding(LEVEL, text, results, dtype, None if head == "head" else head)
        if verdict.status == "fail":
            verdict = _by_rounding(verdict, own, prompts, judged, bool(known), trunk)
        made.append(verdict)
        if head in expected and not trunk:
            alone = verdict.status == "pass"
            bars = {name: x.bar for name, x in results.items()}
            made += _foretold(judged, expected[head], head, found.raws[head], bars, alone)
    if trunk:
        made += _of_the_whole(judged, expected, found)
    return [*made, *_not_compared(found, version)]


def _of_the_whole(judged: Judged, expected: Mapping[Phase, Foretold], found: Passes) -> list[Finding]:
    """Of each difference that is foretold before the heads, what all that are come to at their end."""
    sizes = [sample.of(its) for raws in found.raws.values() for sample, its in raws.values()]
    worst = max(sizes, key=lambda d: d.max_delta)
    size = f"largest |delta| {number(worst.max_delta)} of values up to {number(worst.magnitude)}"
    known = {f.name: f for f in expected.values()}
    return [foretold.of_the_whole(LEVEL, f, size, name in judged.accepted) for name, f in known.items()]


def _not_compared(found: Passes, version: str) -> list[Finding]:
    """What the library does not give, or gives beside, and what it warned of."""
    made = []
    if silent := sorted(found.lacking - found.by_head.keys()):
        status: Status = "undecided" if "head" in silent and not found.by_head else "note"
        words = ", ".join("last hidden state" if h == "head" and found.by_head else h for h in silent)
        text = f"transformers {version} gives no {words} for the class in config.json"
        made.append(finding("logits", status, f"{text}: not compared"))
    if found.more:
        text = f"{', '.join(sorted(found.more))} of transformers {version} has no reading of ours beside it"
        made.append(finding("unseen", "note", f"{text}: not compared"))
    if found.said:
        text = f"transformers {version} warns while it computes: {found.said[0]}"
        made.append(finding("warnings", "note", shown(text, 400), data={"warnings": found.said[:20]}))
    return made


def _name(out: Mapping[str, Any], head: str, wanted: Tensor, ours: Collection[str]) -> str | None:
    """What the library calls a head that we know by its name for it: of a class with one the logits are
    `logits`, whichever it is, beside others `prediction_logits`; of one without any the head is the last
    hidden state, which classes that put one of `ours` on it do not give."""
    main = [n for n in ("logits", "prediction_logits", "last_hidden_state") if n not in ours]
    held = [n for n in (main if head == "head" else [head, *main]) if out.get(n) is not None]
    alike = [n for n in held if out[n].shape == wanted.shape]
    if head != "head":
        return head if head in held else "logits" if "logits" in alike else None
    fallback = [n for n in held if n != "last_hidden_state" and out[n].ndim == wanted.ndim]
    return next(iter([*alike, *fallback]), None)


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
    made = {}
    for name, (sample, found) in raws.items():
        encoded = replace(sample, x=judged.reference.encode(sample.x, sample.given))
        made[name] = foretold.raw(judged.converted, head, encoded, found, bars[name].max_delta)
    largest = max(bars.values(), key=lambda b: b.max_delta)
    met = foretold.Met(known, head, made, largest, alone)
    return foretold.findings(LEVEL, [met], judged.accepted)


def _wanted(
    reference: Side, converted: Side | None, head: str, ids: Tensor, given: Mapping[str, Tensor], trunk: bool
) -> Tensor:
    """What the library is to compute: the reference's result of a head, or what `converted` makes of the
    reference's last layer where the head itself is foretold to differ, of the whole where what comes before
    is (`trunk`)."""
    if converted is None:
        return reference.outputs(ids, given)[head]
    if trunk:
        return converted.outputs(ids, given)[head]
    found: Tensor = converted.run(head, reference.encode(ids, given))
    return found


def _by_rounding(
    verdict: Finding,
    passes: Collection[logits.Pass],
    prompts: Mapping[str, Prompt],
    judged: Judged,
    known: bool,
    trunk: bool,
) -> Finding:
    """A difference once more, by what rounding it may be. The library keeps parts of a float64 model in
    float32 (norms, rotary angles), and rounds to 16 bits in other places than the original does: noise of our
    own sums does not show that. Our reading in float32 beside the one in this precision does; a hundred times
    its NMSE may be rounding, up to the cap of the coarser of the two precisions. `known` and `trunk` say
    what is foretold to differ."""
    reference, converted = judged.reference, judged.converted if known else None
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
        rounded = p.sample.of(_wanted(other, its, head, ids, given, trunk).to(weights.dtype)).nmse
        assert p.found is not None
        d, limit = p.sample.of(p.found).nmse, min(cap, MARGIN**2 * rounded)
        if not d <= limit:
            return verdict
        if d >= worst:
            worst, bar = d, limit
    whole = name == "float64" and verdict.data.get("top1", 1.0) == 1.0
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
