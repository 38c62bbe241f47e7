"""Generation with the model of a folder: what a run needs, what came out, and how two sides of a conversion
compare."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field, fields
from typing import Any

import torch

from ckpt_tool.checkpoint.strict_json import parse_object
from ckpt_tool.errors import fail, fail_unread, printable
from ckpt_tool.records import dataclass
from ckpt_tool.verify.generate import Generated, generate
from ckpt_tool.verify.generate_options import Options, of_model, options
from ckpt_tool.verify.generate_session import Prompts, Session, prompts_of
from ckpt_tool.verify.needs import free_memory
from ckpt_tool.verify.prompts import positions
from ckpt_tool.verify.sides import BROKEN, Side
from ckpt_tool.verify.subject import Subject

DECODERS = re.compile(r"(ForCausalLM|LMHeadModel)$")
# How far scores of the same tokens may be apart that were computed in this dtype; more where a run with the
# cache and one without are farther apart.
BARS = {"float64": 1e-8, "float32": 1e-3, "float16": 0.02, "bfloat16": 0.15}
FLOORS = 10  # times what the cache alone moves
SHOWN = 60  # characters of an option's value
SHARE = 0.4  # of the free memory, which weights may take to stay there between two tokens


@dataclass(frozen=True)
class Request:
    """Rows of token ids with a mask, or without; options by the library's names; whose rules; the seed of the
    draws; whether what was computed of earlier tokens is kept; whether the model's generation_config.json
    counts where nothing is asked for, and what it says where that is not what lies beside the weights."""

    rows: Sequence[Sequence[int]]
    mask: Sequence[Sequence[int]] | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)
    rules: str = "5"
    seed: int | None = None
    cache: bool = True
    of_model: bool = True
    said: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Made:
    """`kept` are the bytes of the cache at its longest, 0 without one."""

    generated: Generated
    options: Options
    prompts: Prompts
    kept: int

    @property
    def width(self) -> int:
        return len(self.prompts.rows[0])


def decodes(subject: Subject) -> bool:
    """Whether the model has a head whose tokens follow on each other."""
    (architecture, *_) = subject.config.get("architectures") or [""]
    return DECODERS.search(str(architecture)) is not None


def run(
    subject: Subject,
    side: Side,
    request: Request,
    *,
    device: str = "cpu",
    tell: Callable[[str], None] = lambda text: None,
    keep: bool = False,
) -> Made:
    """Kinds: `usage` for options and prompts that do not fit, `unsupported` for a model that does not go on
    from a prompt and for options that are not computed here, `out-of-memory` for a cache that has no room."""
    if not decodes(subject):
        (found, *_) = subject.config.get("architectures") or ["none"]
        fail(
            "unsupported",
            f"expected a decoder with a language model's head, found {found}",
            where="config.json",
        )
    o = chosen_options(subject, request)
    prompts = prompts_of(request.rows, request.mask, pad=o.pad, eos=o.named_eos, bos=o.bos)
    vocabulary = subject.config.get("vocab_size")
    words = vocabulary if type(vocabulary) is int else side.vocabulary
    table = positions(subject.config, subject.hf, subject.original)
    longest = _longest(subject.config)
    session = Session(side, prompts, words, o.rows, o.use_cache and request.cache, table, device)
    total = o.total(session.width, longest)
    with broken_passes(), in_memory(subject, side):
        kept = session.bytes_of(max(map(len, prompts.alone)) + total - session.width)
        if kept:
            tell(f"the cache takes up to {kept / 1e6:,.1f} MB")
        _room(kept + session.prompts * o.rows * words * 4 * (total - session.width if keep else 1))
        made = generate(session, o, positions=longest, seed=request.seed, keep=keep)
    return Made(made, o, prompts, kept)


def chosen_options(subject: Subject, request: Request) -> Options:
    """Those of the model under the caller's."""
    own, asked = None, request.asked
    if not request.of_model:
        return options(asked, {}, request.rules)
    if request.said is not None:
        return options(asked, request.said, request.rules)
    if subject.hf is not None and "generation_config.json" in subject.hf.documents:
        own = subject.hf.json("generation_config.json")
    return options(asked, of_model(own, subject.config, asked), request.rules)


def said_by_source(subject: Subject) -> Mapping[str, Any] | None:
    """What the source's files say of how to generate, as its conversion would have it; None where what lies
    beside the weights is the source's own."""
    if subject.direction != "to-hf" or subject.plan is None:
        return None
    for document in subject.plan.documents:
        if document.name == "generation_config.json":
            return parse_object(document.content, file=document.name)
    return of_model(None, {k: v.value for k, v in subject.plan.config.items()}, {"eos_token_id": None})


def options_apart(one: Options, other: Options) -> list[str]:
    """The options that are others, with the values of both, long lists of ids cut."""
    return [
        f"{f.name} {printable(a, SHOWN)} and {printable(b, SHOWN)}"
        for f in fields(Options)
        if (a := getattr(one, f.name)) != (b := getattr(other, f.name))
    ]


def _longest(config: Mapping[str, Any]) -> int | None:
    for name in ("max_position_embeddings", "n_positions"):
        if type(found := config.get(name)) is int:
            return found
    return None


@contextmanager
def broken_passes() -> Iterator[None]:
    """What a pass raises that does not take a text of this length, or lacks a tensor, in one sentence."""
    try:
        yield
    except BROKEN as error:
        said = f"no {error.args[0]}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        fail(
            "unsupported",
            f"expected a pass that takes this text, found one that stops: {said}",
            file="the model",
        )


@contextmanager
def in_memory(subject: Subject, side: Side) -> Iterator[None]:
    """Weights stay between two tokens where there is room for all; else each token reads them again."""
    item = side.weights[0].dtype.itemsize if side.weights else 4
    checkpoint = subject.hf or subject.output
    need = sum(t.numel for t in checkpoint) * item
    if need < SHARE * free_memory():
        with side.keep():
            yield
    else:
        yield


def _room(need: int) -> None:
    if need > free_memory():
        both = [f"{count / 1e9:,.2f} GB" for count in (need, free_memory())]
        text = f"expected {both[0]} of free memory for the cache and scores, found {both[1]}"
        fail("out-of-memory", text, hint="fewer beams, prompts or new tokens, or --no-cache")


# --- two sides --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Apart:
    """How two runs differ: by the first token that is another, or by how far their scores are apart."""

    worst: float
    first: str | None = None
    tie: bool = False  # by the same options, and scores of all that both read were within the bar


def compared(one: Made, other: Made, bar: float) -> Apart:
    a, b = one.generated, other.generated
    text = _difference(one, other)
    if text is not None:
        return Apart(math.inf, text, one.options == other.options and _parted(a, b, bar))
    pairs = [*zip(a.transition_scores, b.transition_scores, strict=True)]
    if a.sequences_scores is not None and b.sequences_scores is not None:
        pairs.append((a.sequences_scores, b.sequences_scores))
    return Apart(max((_distance(x, y) for p in pairs for x, y in zip(*p, strict=True)), default=0.0))


def _distance(x: float, y: float) -> float:
    return 0.0 if x == y else abs(x - y) if math.isfinite(x - y) else math.inf


def _difference(one: Made, other: Made) -> str | None:
    a, b = one.generated, other.generated
    if len(a.sequences) != len(b.sequences):
        return f"{len(a.sequences)} and {len(b.sequences)} rows"
    for r, (x, y) in enumerate(zip(a.sequences, b.sequences, strict=True)):
        k = next((k for k, pair in enumerate(zip(x, y, strict=False)) if pair[0] != pair[1]), None)
        if k is not None:
            return f"row {r}, new token {k - one.width + 1}: {x[k]} and {y[k]}"
    if a.sequences != b.sequences:
        return f"rows of {len(a.sequences[0])} and {len(b.sequences[0])} tokens"
    if a.steps != b.steps:
        return f"the same tokens after {a.steps} and {b.steps} steps"
    return "the same tokens by other beams" if a.beam_indices != b.beam_indices else None


def _parted(a: Generated, b: Generated, bar: float) -> bool:
    """Whether all logits were within the bar as long as both sides read the same: then a choice between
    scores that are nearly the same was made otherwise, and what follows is of other texts."""
    for (ids, logits), (others, found) in zip(a.passes, b.passes, strict=False):
        if not torch.equal(ids, others):
            return True
        apart = torch.where(logits == found, 0.0, (logits - found).abs().double())
        if not bool((apart <= bar).all()):
            return False
    return bool(a.passes)


def bar_of(dtype: str, with_cache: Made, without: Made) -> float:
    """What two sides may be apart: ten times what one side is from itself without its cache, or what its
    dtype allows if that is more."""
    floor = compared(with_cache, without, 0.0)
    return max(BARS[dtype], FLOORS * floor.worst if math.isfinite(floor.worst) else 0.0)


# --- as data ----------------------------------------------------------------------------------------------


def plain(x: Any) -> Any:
    """Numbers that JSON has no form for as words."""
    if isinstance(x, float):
        return x if math.isfinite(x) else str(x)
    return [plain(y) for y in x] if isinstance(x, list) else x


def to_json(made: Made, request: Request) -> dict[str, Any]:
    g, o = made.generated, made.options
    found: dict[str, Any] = {
        "rules": o.rules,
        "seed": request.seed,
        "arguments": dict(request.asked),
        "input_ids": [list(row) for row in made.prompts.rows],
        "attention_mask": [[0] * n + [1] * (made.width - n) for n in made.prompts.pads],
        "sequences": g.sequences,
        "steps": g.steps,
        "transition_scores": plain(g.transition_scores),
        "transition_scores_normalized": plain(g.normalized),
        "cache_bytes": made.kept,
    }
    if g.beam_indices is not None:
        found |= {
            "beam_indices": g.beam_indices,
            "sequences_scores": plain(g.sequences_scores),
            "lengths": g.lengths(),
            "reconstructed_scores": plain(g.reconstructed(o.length_penalty)),
        }
    return found


def read_json(path: str, option: str, most: int) -> Any:
    """What the file of an option holds; more than `most` bytes are cut off, and no JSON then."""
    try:
        with open(path, "rb") as file:
            return json.loads(file.read(most))
    except OSError as error:
        fail_unread(error, path, option)
    except ValueError as error:
        fail("usage", f"expected JSON, found {error}", file=path, where=option)


def read_request(path: str) -> tuple[list[list[int]], list[list[int]] | None]:
    """Rows and mask of a JSON file: a list of rows, or an object of `input_ids` and `attention_mask`."""
    data = read_json(path, "--prompts", 64 << 20)
    if not isinstance(data, dict):
        return _rows(data, "input_ids", path), None
    mask = data.get("attention_mask")
    rows = _rows(data.get("input_ids"), "input_ids", path)
    return rows, None if mask is None else _rows(mask, "attention_mask", path)


def _rows(found: Any, name: str, path: str) -> list[list[int]]:
    if isinstance(found, list) and all(isinstance(row, list) for row in found):
        rows: list[list[int]] = found
        if all(type(i) is int and i >= 0 for row in rows for i in row):
            return rows
    fail("usage", f"expected rows of whole numbers as {name}, found something else", file=path)
