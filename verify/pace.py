"""How long parity takes and what memory it needs, told before it starts: from sizes, and a short measurement
of how fast this machine multiplies."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import field

import torch
from torch.nn.functional import linear

from ckpt_tool.checkpoint.base import TensorInfo
from ckpt_tool.checkpoint.tensor_names import layer_of
from ckpt_tool.errors import fail
from ckpt_tool.records import dataclass
from ckpt_tool.verify import needs
from ckpt_tool.verify.effort import Effort
from ckpt_tool.verify.holding import Room
from ckpt_tool.verify.needs import size_text
from ckpt_tool.verify.prompts import Prompt
from ckpt_tool.verify.sides import Phase, Side

FEW = 16  # tokens that take as long as fewer do: the weights have to be read
READ = 1e9  # bytes in a second that are read and cast, at least
LIGHT = 768 << 20  # bytes of the heaviest layer and of activations, of a model that is small
TOLD = 20.0  # seconds: shorter runs are not worth a word
EXPERTS = (("num_local_experts", "num_experts"), ("num_experts_per_tok",))

ALIKE = 1.05  # times as much memory, which is not told apart


@dataclass
class Pace:
    """`work` is what each phase takes, in multiplications; seconds come from those that are done."""

    work: Mapping[Phase, float]
    seconds: float  # foretold
    done: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def left(self) -> str:
        """`, about 3 min left`, where that is worth a word."""
        total = sum(self.work.values())
        if self.seconds < TOLD or not total:
            return ""
        spent = time.monotonic() - self.began
        rate = self.seconds / total if self.done < total / 50 else spent / self.done
        return f", about {duration(rate * (total - self.done))} left"

    def add(self, phase: Phase) -> None:
        self.done += self.work.get(phase, 0.0)


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def pace(original: Side, converted: Side, prompts: Mapping[str, Prompt], effort: Effort) -> Pace:
    """Of a lockstep run, measured now."""
    work: dict[Phase, float] = {}
    weights = _weights(converted)
    tokens = {name: max(FEW, sum(map(len, p.ids))) for name, p in prompts.items()}
    for phase, kind in original.kinds().items():
        passes = {n: 2.0 + 3.0 * effort.frees(n) for n in prompts if effort.has(phase, n)}
        per_token = weights.get(phase if isinstance(phase, int) else None, 0.0)
        work[phase] = 0.0 if kind == "embed" else sum(tokens[n] * p for n, p in passes.items()) * per_token
    total, weights_of = sum(work.values()), original.weights[0]
    if total < TOLD * 1e9 or weights_of.device != "cpu":  # less than a slow machine does in that time
        return Pace(work, 0.0)
    nbytes = sum(t.nbytes for side in (original, converted) for w in side.weights for t in w.tensors.values())
    return Pace(work, total / multiplications(weights_of.dtype) + nbytes / READ)


def multiplications(dtype: torch.dtype) -> float:
    """How many of a large matrix are done in a second."""
    x, w = torch.ones(256, 1024, dtype=dtype), torch.ones(2048, 1024, dtype=dtype)
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        linear(x, w)
        taken.append(time.perf_counter() - began)
    return 256 * w.numel() / min(taken)


def _weights(side: Side) -> dict[int | None, float]:
    """Weights that a token is multiplied by in each layer, and outside of them; of experts those that are
    chosen."""
    count, chosen = (next((side.raw[k] for k in keys if side.raw.get(k)), 1) for keys in EXPERTS)
    found: dict[int | None, float] = {}
    for name, info in side.weights[0].tensors.items():
        if len(info.shape) > 1:
            share = chosen / count if ".experts." in name else 1.0
            layer = layer_of(name)
            found[layer] = found.get(layer, 0.0) + info.numel * share
    return found


# --- memory -----------------------------------------------------------------------------------------------


def limit(
    original: Side, converted: Side, prompts: Mapping[str, Prompt], effort: Effort, memory: int | None
) -> str:
    """Have both sides hold no more weights together than `memory` bytes in all leave for them (None: what is
    usual); what is needed, in words. `usage` where that is too little for any run."""
    item = original.weights[0].dtype.itemsize
    passes = _passes(converted, prompts, effort)
    held = [*original.weights, *converted.weights]
    making, exchanged = max(w.making for w in held), max(w.exchanged for w in held)
    need = needs.of_parity(passes, _ranks(original), _ranks(converted), item, memory, making, exchanged)
    if memory is not None and memory < need.least:
        found = f"found {size_text(memory)}"
        text = f"expected at least {size_text(need.least)} for these prompts and tensors, {found}"
        fail("usage", text, where="memory")
    if memory is None and original.weights[0].device != "cpu":
        whole = sum(needs.heaviest(_tensors(side), item) for side in (original, converted))
        return f"about {size_text(needs.COMPUTING + passes.activations(item) + whole)} on the device"
    shared = Room(need.room)
    for side, spared in ((original, 0), (converted, need.spared)):
        for w in side.weights:
            w.within(need.room // len(side.weights), shared, spared)
            w.wider = need.wider
    if need.most <= need.about * ALIKE:
        return f"about {size_text(need.most)} of memory"
    return f"about {size_text(need.about)} of memory, {size_text(need.most)} where float64 has to judge"


def _ranks(side: Side) -> list[list[TensorInfo]]:
    return [[*w.tensors.values()] for w in side.weights]


def is_light(original: Side, converted: Side, prompts: Mapping[str, Prompt], effort: Effort) -> bool:
    """Whether layers and activations are so small, and no matrix is held by rows, that memory need not be
    given back between them; once `limit` has said how much may be held."""
    held, item = [*original.weights, *converted.weights], original.weights[0].dtype.itemsize
    size = max(needs.heaviest(_tensors(side), item) for side in (original, converted))
    size += _passes(converted, prompts, effort).activations(item)
    return size <= LIGHT and held[0].device == "cpu" and not any(w.streams for w in held)


def _passes(converted: Side, prompts: Mapping[str, Prompt], effort: Effort) -> needs.Passes:
    tokens = {name: sum(map(len, p.ids)) for name, p in prompts.items() if effort.has("embed", name)}
    ends = [n for n in tokens if n not in effort.reach]
    tensors = _tensors(converted)
    words = min(converted.vocabulary, needs.vocabulary(tensors))
    free = [*filter(effort.frees, tokens)]
    return needs.Passes(tokens, ends, free, needs.width(converted.raw, tensors), words)


def _tensors(side: Side) -> list[TensorInfo]:
    return [t for w in side.weights for t in w.tensors.values()]
