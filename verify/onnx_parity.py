"""Does an ONNX graph compute what its source does? onnxruntime's results against the readings in float64,
with bars from the noise of float32, and mistakes planted in the graph."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ckpt_tool.checkpoint.base import DTYPES
from ckpt_tool.checkpoint.onnx_file import OnnxFile, open_onnx
from ckpt_tool.convert.facts import class_of, classes
from ckpt_tool.errors import fail
from ckpt_tool.verify.binomial import interval
from ckpt_tool.verify.claims import Claim
from ckpt_tool.verify.compute import as_read, computing_for, lengths_of
from ckpt_tool.verify.measure import CAPS, Bar, Distance, bar_for, distance
from ckpt_tool.verify.onnx_export import PRODUCER, for_task, kept_shapes
from ckpt_tool.verify.onnx_judges import Results, Source, picked, results
from ckpt_tool.verify.onnx_mistakes import Mistake, mistakes
from ckpt_tool.verify.onnx_names import EXPORTER_RTOL, of_rows, own_task, tolerance
from ckpt_tool.verify.onnx_partly import in_part
from ckpt_tool.verify.onnx_runs import Case, Interface, opened_graph, recognised
from ckpt_tool.verify.onnx_weights import in_graph
from ckpt_tool.verify.prompts import (
    Lengths,
    Prompts,
    named_prompts,
    padding_of,
    positions,
    prompts_for,
    tokenizer_of,
    with_inputs,
)
from ckpt_tool.verify.report import Finding, Report, Status, Table, number
from ckpt_tool.verify.sides import Side

LEVEL = "onnx"
LARGE = 50_000_000  # weights; larger models are compared on shorter prompts
SHORTER = 48  # tokens of these
ROWS, TOKENS = 3, 9  # of the batch: those that the documentation validates with
FIXED = 4096  # tokens of one pass that a graph of fixed sizes may want
PASTS = (1, 7)

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Compared:
    """One result of one case: onnxruntime's distance to the reading in float64, the largest difference to it
    in float32, the bar, and whether the tolerance of the documentation holds."""

    case: str
    output: str
    exact: Distance
    near: float
    bar: Bar
    documented: bool

    @property
    def holds(self) -> bool:
        return self.bar.holds(self.exact)


@dataclass
class Judged:
    """All that is known of the right results: by case the reading's in float64, the bar of each, and those in
    float32."""

    cases: list[Case]
    wanted: list[Results]
    single: list[Results]
    bars: list[dict[str, Bar]]
    variances: Mapping[str, float | None] = field(default_factory=dict)
    words: str = ""
    without: str | tuple[str, ...] = ()  # ends of names of weights whose mistakes have no effect to be seen

    def far(self, k: int, name: str, found: Tensor) -> Distance:
        """How far a result of case k is from the right one; infinite where it is of another shape."""
        wanted = self.wanted[k][name]
        if found.shape != wanted.shape:
            return Distance(math.inf, math.inf, 0, float(wanted.abs().max()))
        return distance(found.double()[None], wanted[None], self.variances.get(name))

    def order(self) -> list[int]:
        """Cases, the shortest first."""
        return sorted(range(len(self.cases)), key=lambda k: self.cases[k].ids.numel())


def verify_onnx(
    file: OnnxFile, source: Source, *, prompts: Prompts | None = None, tell: Tell = lambda text: None
) -> Report:
    """The report of a graph and what it was made from."""
    began, report = time.monotonic(), Report("ckpt-tool verify", claim=Claim("source"))
    interface = recognised(file)
    task = _task_of(interface, source)
    with computing_for(source.checkpoint):
        single = for_task(source.converted(torch.float32), task)
        sizes = _sizes(single, interface)
        cases, left = _cases(source, single, interface, prompts, task)
        report.facts |= _facts(file, source, single, interface, task)
        tell("onnx: computing with the readings")
        judged = _judged(source, single, task, cases, bool(interface.past or interface.present))
        tell("onnx: computing with onnxruntime")
        found = _found(file, interface, sizes, task, judged.cases)
        unjudged = [name for name in interface.results if name not in judged.wanted[0]]
        if len(unjudged) == len(interface.results):
            text = f"expected a result that the source has for the task {task}, found {', '.join(unjudged)}"
            fail("unsupported", text, file=file.name, hint="--source names a model of that class")
        report.findings += [_interface(file, interface, left, unjudged), *_weights(file, single)]
        compared = _compare(judged, found, tolerance(single.module, source.config)[0])
        report.findings.append(_outputs(compared, judged, source))
        if all(c.holds for c in compared):
            tell("onnx: planting mistakes")
            report.findings.append(_control(file, interface, sizes, task, judged, found))
        report.facts["computed"] = _computed()
    report.facts["seconds"] = f"{time.monotonic() - began:.1f}"
    return report


def verify_file(
    path: Path, source: Source, *, prompts: Prompts | None = None, tell: Tell = lambda text: None
) -> Report:
    """Raises `input-changed` where the file is no longer the one that was opened, or one beside it."""
    with closing(open_onnx(path)) as file:
        report = verify_onnx(file, source, prompts=prompts, tell=tell)
        file.check_unchanged()
        return report


def _computed() -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__} on cpu, torch {torch.__version__}"


def _task_of(interface: Interface, source: Source) -> str:
    """By what the graph gives: results of the model itself, answers, or those of the source's own class."""
    names = interface.results.keys()
    if "start_logits" in names or "end_logits" in names:
        return "question-answering"
    if "logits" in names:
        return own_task(source.config)
    return "default"


def _facts(file: OnnxFile, source: Source, side: Side, interface: Interface, task: str) -> dict[str, str]:
    past = f", past keys and values of {len(interface.past) // 2} layers" if interface.past else ""
    size = sum(t.nbytes for t in file.tensors.values())
    atol, whose = tolerance(side.module, source.config)
    return {
        "output": f"{file.path} ({len(file.tensors)} initializers, {size:,} bytes)",
        "source": source.words,
        "graph": f"{task}{past}; opset {file.opset}, IR {file.model.ir_version}",
        "tolerance": f"{atol:g} absolute and {EXPORTER_RTOL:g} relative, of {whose}",
    }


def _sizes(side: Side, interface: Interface) -> tuple[int, int] | None:
    """(heads, width) of keys and values that go in; `config-mismatch` where the graph has other layers than
    the source."""
    if not interface.past and not interface.present:
        return None
    shapes = list(kept_shapes(side).values())
    layers = range(len(shapes) // 2)
    for what, found in (("past_key_values", interface.past), ("present", interface.present)):
        if found and found.keys() != {(i, part) for i in layers for part in ("key", "value")}:
            numbers = ", ".join(map(str, sorted({i for i, _ in found})[:5]))
            text = f"expected keys and values of {len(layers)} layers from 0 on, found {len(found)} tensors"
            fail("config-mismatch", f"{text} of the layers {numbers}", where=what)
    _, heads, _, width = shapes[0]
    return heads, width


# --- cases ------------------------------------------------------------------------------------------------


def rows_of(source: Source, side: Side, more: Prompts | None) -> dict[str, list[int]]:
    """The prompts by name, those of the user among them; `usage` for what the model does not take."""
    config, lengths = as_read(source.config, [side]), lengths_of([side])
    table, words = positions(source.config, source.checkpoint), tokenizer_of(source.checkpoint)
    rows = prompts_for(config, more, words, table=table, lengths=lengths)
    if sum(t.numel for t in source.checkpoint) > LARGE:
        short = prompts_for(config, None, words, table=min(table or SHORTER, SHORTER), lengths=lengths)
        own = named_prompts(more)  # which the user wants whole
        rows = {name: short.get(name, row) if name not in own else row for name, row in rows.items()}
    return rows


def _cases(
    source: Source, side: Side, interface: Interface, more: Prompts | None, task: str
) -> tuple[list[Case], list[str]]:
    """What goes through the graph, and the names of those that its fixed sizes do not take. Without an id for
    padding a sequence is labelled by its last token, so no padding may come after it."""
    config, lengths = as_read(source.config, [side]), lengths_of([side])
    rows = rows_of(source, side, more)
    known = {"mask": torch.ones(1, 1, dtype=torch.long)}
    takes = {"mask"} & side.takes(known) | {"token_types"} & set(side.inputs)
    inputs = takes & interface.inputs.keys()
    if _choices(interface):
        made = [_of_choices(rows)]
    else:
        prompts = with_inputs(rows, inputs, config, lengths)
        made = [_case(name, p.ids, p.given) for name, p in prompts.items()]
        made += _further(rows, inputs, config, lengths.fits, bool(interface.past))
        made += _of_sizes(rows, inputs, config, lengths, interface)
    made = [replace(case, counted="positions" in interface.inputs) for case in made]
    if task == "sequence-classification" and padding_of(source.config) is None:
        made = [case for case in made if bool(case.mask[..., -1].all())]
    fitting = [case for case in made if _fits(case, interface)]
    left = [case.name for case in made if not _fits(case, interface)]
    if not fitting:
        text = f"expected free sizes, or 2 to {FIXED} tokens that the model takes"
        text += f", found {interface.inputs['ids'].words}"
        text += " and a past of a fixed length" if _past_is_fixed(interface) else ""
        fail("unsupported", text, where="input_ids", hint="export it with dynamic axes")
    return fitting, left


def _case(
    name: str, ids: Sequence[Sequence[int]], given: Mapping[str, Any] | None = None, past: int = 0
) -> Case:
    given = given or {}
    rows = torch.tensor(ids)
    mask = torch.tensor(given["mask"]) if "mask" in given else torch.ones_like(rows)
    types = torch.tensor(given["token_types"]) if "token_types" in given else None
    return Case(name, rows, mask, types, past)


def _choices(interface: Interface) -> bool:
    shape = interface.inputs["ids"].shape
    return shape is not None and len(shape) == 3


def _of_choices(rows: Mapping[str, list[int]]) -> Case:
    long = max(rows.values(), key=len)
    tokens = [
        [[long[(17 * r + 5 * c + t) % len(long)] for t in range(TOKENS)] for c in range(4)] for r in range(2)
    ]
    return _case("choices", tokens)  # type: ignore[arg-type]


def _of_sizes(
    rows: Mapping[str, list[int]],
    inputs: set[str],
    config: Mapping[str, Any],
    lengths: Lengths,
    interface: Interface,
) -> list[Case]:
    """Of a graph with a fixed batch or length: so many rows of it, whole, padded on either side, and after
    earlier tokens, which go in as many at a time. One token alone shows nothing of attention."""
    shape, past = interface.inputs["ids"].shape, bool(interface.past)
    if shape is None or len(shape) != 2 or all(isinstance(n, str) for n in shape):
        return []
    batch, width = (n if isinstance(n, int) else usual for n, usual in zip(shape, (1, TOKENS), strict=True))
    long, pad = max(rows.values(), key=len, default=[]), padding_of(config) or 0
    whole = width * (1 + max(1, TOKENS // max(width, 1))) if past else width
    if not long or whole < 2 or not 0 < whole * batch <= FIXED or lengths.fits(whole) != whole:
        return []
    ids = [[long[(7 * r + t) % len(long)] for t in range(whole)] for r in range(batch)]
    after = [_case("fixed sizes, past", ids, past=whole - width)] if past else []
    ids = [row[:width] for row in ids]
    types = [[2 * t // width for t in range(width)]] * batch
    given: dict[str, Any] = {"token_types": types} if "token_types" in inputs else {}
    made = [_case("fixed sizes", ids, given), *after]
    fewer = lengths.padded(max(1, width * 2 // 3), width)  # tokens that the first row has
    if "mask" in inputs and 0 < fewer < width:
        hidden = [0] * (width - fewer)
        for name, mask in (("right", [1] * fewer + hidden), ("left", hidden + [1] * fewer)):
            masks = [mask] + [[1] * width] * (batch - 1)
            padded = [
                [i if m else pad for i, m in zip(r, own, strict=True)]
                for r, own in zip(ids, masks, strict=True)
            ]
            made.append(_case(f"fixed sizes, padded {name}", padded, {**given, "mask": masks}))
    return made


def _further(
    rows: Mapping[str, list[int]],
    inputs: set[str],
    config: Mapping[str, Any],
    fits: Callable[[int], int],
    past: bool,
) -> list[Case]:
    """A batch, one with padding on the left, and passes that go on from earlier tokens."""
    long, other = rows.get("long", []), rows.get("other", [])
    width = fits(TOKENS)
    made = []
    if width and len(long) >= ROWS * width:
        batch = [long[k * width : (k + 1) * width] for k in range(ROWS)]
        made.append(_case("batch", batch))
        if "mask" in inputs and width > 3:
            pad = config.get("pad_token_id")
            pad = pad if type(pad) is int and pad >= 0 else 0
            hidden = [[0] * k + [1] * (width - k) for k in (0, 2, 3)]
            padded = [
                [pad if not m else i for i, m in zip(row, mask, strict=True)]
                for row, mask in zip(batch, hidden, strict=True)
            ]
            made.append(_case("padded left", padded, {"mask": hidden}))
            if past:
                made.append(_case("padded, past 4", padded, {"mask": hidden}, past=4))
    if past:
        made += [_case(f"past {n}", [other], past=n) for n in PASTS if n < len(other)]
    return made


def _fits(case: Case, interface: Interface) -> bool:
    """Whether the graph's sizes take a case, and what goes in before: those that are no numbers take any."""
    shape = interface.inputs["ids"].shape
    if _past_is_fixed(interface) or shape is not None and len(shape) != case.ids.ndim:
        return False
    sizes = (*case.ids.shape[:-1], case.ids.shape[-1] - case.past)
    if case.past and shape is not None and isinstance(shape[1], int) and case.past % shape[1]:
        return False
    return all(not isinstance(d, int) or d == n for d, n in zip(shape or (), sizes, strict=False))


def _past_is_fixed(interface: Interface) -> bool:
    past = next(iter(interface.past.values()), None)
    return past is not None and past.shape is not None and isinstance(past.shape[2], int)


# --- what is right ----------------------------------------------------------------------------------------


def _judged(source: Source, single: Side, task: str, cases: list[Case], with_past: bool) -> Judged:
    """The original's pass judges, where there is one; padding on the left, which it cannot be told of, and
    keys and values, which it keeps in its own order, the converted one's."""
    double = (
        single.computed_in(torch.float64)
        if single.ranks is single.weights
        else for_task(source.converted(torch.float64), task)
    )
    own = [results(side, task, cases, with_past=with_past) for side in (double, single)]
    noisy = [results(single, task, cases, with_past=with_past, reversed_sums=True)]
    wanted, words = own[0], "the reading of the Hugging Face layout"
    first = source.original(torch.float64, task)
    if first is not None:
        words = f"the original's own reading, and {words} where that has no such case"
        fitting = [c for c in cases if not c.left or c.counted or "mask" in first.inputs]
        theirs = results(first, task, fitting, with_past=False)
        second = source.original(torch.float32, task)
        assert second is not None
        theirs32 = results(second, task, fitting, with_past=False)
        wanted = [{**w, **_of(c, fitting, theirs)} for c, w in zip(cases, own[0], strict=True)]
        noisy.append([{**w, **_of(c, fitting, theirs32)} for c, w in zip(cases, own[1], strict=True)])
    kind = classes().get(class_of(source.config) or "")
    made = Judged(cases, wanted, own[1], [], words=words, without=() if kind is None else kind.key_bias)
    made.variances = _variances(wanted, task)
    made.bars = [
        {
            name: bar_for([made.far(k, name, x[k][name]) for x in (own[1], *noisy)], torch.float32)
            for name in w
        }
        for k, w in enumerate(wanted)
    ]
    return made


def _of(case: Case, cases: list[Case], found: list[Results]) -> Results:
    return next((y for c, y in zip(cases, found, strict=True) if c is case), {})


def _variances(wanted: list[Results], task: str) -> dict[str, float | None]:
    """Over all cases, of results with one row for a whole sequence or one number for each token, too few
    to have their own."""
    made: dict[str, float | None] = {}
    for name in wanted[0]:
        few = of_rows(task, name) or name in ("start_logits", "end_logits")
        whole = torch.cat([x[name].flatten() for x in wanted]) if few else None
        made[name] = None if whole is None else float(whole.var(correction=0))
    return made


def _found(
    file: OnnxFile, interface: Interface, sizes: tuple[int, int] | None, task: str, cases: list[Case]
) -> list[Results]:
    """What the graph gives for each case; it is closed again, as one takes the memory of its weights."""
    graph = opened_graph(file, interface, sizes)
    return [{name: picked(task, c, name, y) for name, y in graph.run(c).items()} for c in cases]


def _compare(judged: Judged, found: list[Results], atol: float) -> list[Compared]:
    made = []
    for k, case in enumerate(judged.cases):
        for name, y in found[k].items():
            if name not in judged.wanted[k]:
                continue
            near, made32 = judged.single[k][name], y.float()
            same = y.shape == near.shape
            delta = float((made32 - near).abs().max()) if same else math.inf
            close = same and bool(torch.allclose(made32, near, rtol=EXPORTER_RTOL, atol=atol))
            made.append(Compared(case.name, name, judged.far(k, name, y), delta, judged.bars[k][name], close))
    return made


# --- findings ---------------------------------------------------------------------------------------------


def _interface(file: OnnxFile, interface: Interface, left: list[str], unjudged: list[str]) -> Finding:
    others = [*interface.others, *unjudged]
    given = [f"{v.name} {v.words}" for v in interface.inputs.values()]
    given += [f"{len(interface.past)} past keys and values"] if interface.past else []
    gives = [f"{v.name} {v.words}" for v in interface.results.values()]
    gives += [f"{len(interface.present)} present ones"] if interface.present else []
    text = f"takes {', '.join(given)}; gives {', '.join(gives)}"
    if others:
        text += f"; not compared: {', '.join(others[:5])}"
    narrow = {t.dtype for t in file.tensors.values()} & {"F16", "BF16"}
    if narrow:
        text += f"; weights in {' and '.join(sorted(narrow))} are held to the bars of float32"
    if left:
        text += f"; its fixed sizes do not take the prompts {', '.join(left)}"
    return Finding(LEVEL, "interface", "note", text, data={"not_compared": others, "left": left})


def _weights(file: OnnxFile, side: Side) -> list[Finding]:
    """How many tensors of the source are in the graph bit for bit, as they are or transposed. What is there
    under its name and in its shape has to be so itself, the rest may have any name: exporters give others."""
    (tensors,) = side.ranks
    names, missing, other, exchanged, rounded = list(tensors), [], [], [], []
    renamed = [name for name in names if not in_graph(file, tensors, name)]
    held = _held(file) if renamed else {}
    wanted: dict[str, bytes] = {}
    seen: set[bytes] = set()
    for name in renamed:
        x = tensors[name].numpy()
        right = {_digest(x), _digest(x.T)}
        seen |= right
        there = name in file.tensors and file.tensors[name].shape in (x.shape, x.T.shape)
        if x.size and not right & ({held[name]} if there and name in held else set(held.values())):
            missing.append(name)
            if there and held.get(name) in _halved(x):
                rounded.append(name)
            elif there:
                other.append(name)
                wanted[name] = held.get(name, b"")
    if other:
        theirs = {_digest(tensors[name].numpy()): name for name in names}
        exchanged = [(name, theirs[wanted[name]]) for name in other if wanted[name] in theirs]
    own = file.model.producer_name == PRODUCER and any(file.tensors[n].dtype == "F32" for n in other)
    found = {*names} - {*renamed}
    loose = [n for n, digest in held.items() if n not in found and digest not in seen]
    partly = [*in_part(file, tensors, [n for n in missing if n not in rounded], loose)]
    return [_in_it(len(names), missing, other, exchanged, rounded, own, partly)]


def _halved(x: np.ndarray) -> set[bytes]:
    """Of float32 numbers rounded to float16, as they are and transposed."""
    if x.dtype != np.float32:
        return set()
    with np.errstate(over="ignore"):
        half = x.astype("<f2")
    return {_digest(half), _digest(half.T)}


def _in_it(
    count: int,
    missing: list[str],
    other: list[str],
    exchanged: list[tuple[str, str]],
    rounded: list[str],
    own: bool,
    partly: list[str],
) -> Finding:
    """`rounded` are those that are there in float16. `own`: of an export of this program, which keeps every
    bit, where others may fold numbers in; `partly` says which are there but for some numbers."""
    found = count - len(missing)
    if not missing:
        text = f"all {found} tensors of the source are in it bit for bit, in float32"
        return Finding(LEVEL, "weights", "pass", text, data={"tensors": found})
    absent = [name for name in missing if name not in {*other, *rounded}]
    text = f"{found} of {count} tensors of the source are in it bit for bit"
    if exchanged:
        pairs = [f"{name} holds {whose}" for name, whose in exchanged]
        text += f"; exchanged: {_few_of(pairs)}"
    if partly:
        text += f"; not folded and not the same: {_few_of(partly)}"
    if rounded:
        text += f"; {len(rounded)} rounded to float16: {_few_of(rounded)}"
    if other:
        text += f"; with other bits under its name: {_few_of(other)}"
    if absent:
        text += f"; not {_few_of(absent)}: folded, or not used"
    data: dict[str, Any] = {"tensors": found, "missing": missing[:100], "other_bits": other[:100]}
    data["by_results"] = f"{len(missing)} of {count} tensors"
    data |= {"float16": rounded[:100]} if rounded else {}
    status: Status = "fail" if exchanged or partly or (own and other) else "note"
    return Finding(LEVEL, "weights", status, text, data=data | {"exchanged": exchanged[:100]})


def _few_of(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _held(file: OnnxFile) -> dict[str, bytes]:
    found = {}
    for t in file.tensors.values():
        if (dtype := DTYPES[t.dtype].value) is not None:
            x = np.empty(t.shape, dtype)
            file.read_into(t.name, 0, x.reshape(-1).view(np.uint8).data)
            found[t.name] = _digest(x)
    return found


def _digest(x: np.ndarray) -> bytes:
    made = hashlib.sha256(f"{x.dtype.str} {x.shape}".encode())
    made.update(np.ascontiguousarray(x).data)
    return made.digest()


def _outputs(compared: list[Compared], judged: Judged, source: Source) -> Finding:
    rows = [_row(c) for c in _worst_of_each(compared)]
    columns = ("prompt", "output", "|delta|", "bar", "NMSE", "bar", "|delta| f32", "|value|", "tolerance")
    table = Table(columns, tuple(rows), brief=16)
    worst = max(compared, key=lambda c: c.exact.nmse / c.bar.nmse)
    over = [c for c in compared if not c.holds]
    delta = max(c.exact.max_delta for c in compared)
    near = max(c.near for c in compared)
    agree = sum(c.documented for c in compared)
    text = (
        f"{len(compared) - len(over)} of {len(compared)} results agree with {judged.words}: largest |delta| "
        f"{number(delta)} to float64, {number(near)} to float32; within the documented tolerance: {agree}"
    )
    data: dict[str, Any] = {"exactness": "differs" if over else "within noise floor", "max_delta": delta}
    data |= {"max_delta_float32": near, "within_tolerance": agree, "results": len(compared)}
    longest = max(case.ids.shape[-1] for case in judged.cases)  # a graph may do anything beyond
    data["sampled"] = f"prompts of up to {longest:,} tokens"
    if over:
        c = max(over, key=lambda c: c.exact.nmse)
        text = (
            f"{len(over)} of {len(compared)} results differ from {judged.words}, the most {c.output} of "
            f"prompt {c.case}: |delta| {number(c.exact.max_delta)} of values up to "
            f"{number(c.exact.magnitude)}"
        )
        return Finding(
            LEVEL, "outputs", "fail", text, c.output, measured=c.exact.nmse, bar=c.bar.nmse, data=data,
            tables=(table,),
        )  # fmt: skip
    return Finding(
        LEVEL,
        "outputs",
        "pass",
        text,
        measured=worst.exact.nmse,
        bar=worst.bar.nmse,
        data=data,
        tables=(table,),
    )


def _worst_of_each(compared: list[Compared]) -> list[Compared]:
    """Of the keys and values of a case the worst one."""
    groups: dict[tuple[str, str], list[Compared]] = {}
    for c in compared:
        kind = "present" if c.output.startswith("present.") else c.output
        groups.setdefault((c.case, kind), []).append(c)
    return [max(g, key=lambda c: c.exact.nmse / c.bar.nmse) for g in groups.values()]


def _row(c: Compared) -> tuple[str | float | None, ...]:
    numbers = (c.exact.max_delta, c.bar.max_delta, c.exact.nmse, c.bar.nmse, c.near, c.exact.magnitude)
    return (c.case, c.output, *numbers, "yes" if c.documented else "NO")


@dataclass(frozen=True)
class Caught:
    name: str
    nmse: float
    caught: bool
    blind: bool = False

    @property
    def words(self) -> str:
        return "yes" if self.caught else "float32 cannot see it" if self.blind else "NO"


def _control(
    file: OnnxFile,
    interface: Interface,
    sizes: tuple[int, int] | None,
    task: str,
    judged: Judged,
    right: list[Results],
) -> Finding:
    known = mistakes(file, interface, sizes, judged.without)
    planted = [c for m in known if (c := _planted(m, task, judged, right)) is not None]
    if not planted:
        return Finding(
            LEVEL, "negative control", "skipped", "expected weights to plant a mistake in, found none"
        )
    caught, blind = sum(c.caught for c in planted), [c for c in planted if c.blind]
    missed = [c for c in planted if not c.caught and not c.blind]
    low, high = interval(caught, len(planted))
    text = (
        f"{caught} of {len(planted)} mistakes planted in the graph are caught at these bars (95 % interval "
        f"of the rate {low:.1%} to {high:.1%})"
    )
    if missed:
        text += f"; not caught: {', '.join(c.name for c in missed[:3])}"
    if blind:
        text += f"; float32 cannot see {', '.join(c.name for c in blind[:3])}"
    rows = [(c.name, c.nmse, c.words) for c in sorted(planted, key=lambda c: (c.caught, c.nmse))]
    table = Table(("mistake (smallest effect first)", "NMSE", "caught"), tuple(rows), brief=6)
    data = {"rate": caught / len(planted), "planted": len(planted), "caught": caught, "more_is_better": True}
    status: Status = "fail" if missed else "pass"
    return Finding(
        LEVEL, "negative control", status, text, measured=caught / len(planted), bar=1.0, data=data,
        tables=(table,),
    )  # fmt: skip


def _planted(mistake: Mistake, task: str, judged: Judged, right: list[Results]) -> Caught | None:
    """The shortest cases first, until one shows it; None where it changes no number of any: the triangle of
    later tokens, say, of a pass that sees them all."""
    graph, worst, moved = mistake.graph(), 0.0, False
    for k in judged.order():
        case = mistake.case(judged.cases[k])
        if case is not judged.cases[k] and _alike(case, judged.cases[k]):
            continue
        try:
            found = graph.run(case)
        except Exception:  # onnxruntime's classes have no base of their own
            return Caught(mistake.name, math.inf, True)
        for name, whole in found.items():
            if name in judged.wanted[k]:
                y = picked(task, judged.cases[k], name, whole)
                moved = moved or not torch.equal(y, right[k][name])
                d = judged.far(k, name, y)
                worst = max(worst, d.nmse)
                if not judged.bars[k][name].holds(d):
                    return Caught(mistake.name, d.nmse, True)
    return Caught(mistake.name, worst, False, worst <= 2 * CAPS["float32"]) if moved else None


def _alike(one: Case, other: Case) -> bool:
    """Whether two cases put the same in: padding that is none, token types that are all 0."""
    types = [torch.zeros_like(c.ids) if c.token_types is None else c.token_types for c in (one, other)]
    return torch.equal(one.mask, other.mask) and torch.equal(*types)
