"""Bars that others publish for a conversion, each computed of the logits that parity computes itself: every
token of every prompt, where most of them look at the last token of one.

    last cosine   cosine of the last token's logits at least 0.99
    KL 0.015      mean KL of a token at most 0.015 nats
    KL 6e-3       mean KL at most 6e-3, 95 % of tokens at most 2.5e-2, mean cosine at least 0.998
    allclose      every logit within 1e-2 + 1e-2 times its size
    NMSE 1e-2     squared error at most 1e-2 times the variance of the logits
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ckpt_tool.reference.phases import leaves
from ckpt_tool.verify import logits, parity
from ckpt_tool.verify.measure import divergence
from ckpt_tool.verify.sides import Side, Tensors

Pair = tuple[Tensor, Tensor]  # logits of a prompt (positions, V): those wanted, those found
BARS: dict[str, Callable[[Sequence[Pair]], bool]] = {}


def bar(name: str) -> Callable[[Callable[[Sequence[Pair]], bool]], Callable[[Sequence[Pair]], bool]]:
    def add(holds: Callable[[Sequence[Pair]], bool]) -> Callable[[Sequence[Pair]], bool]:
        BARS[name] = holds
        return holds

    return add


def _kl(pairs: Sequence[Pair]) -> Tensor:
    return torch.cat([divergence(p.log_softmax(-1), q.log_softmax(-1)) for p, q in pairs])


@bar("last cosine")
def _last(pairs: Sequence[Pair]) -> bool:
    return all(float(cosine_similarity(p[-1], q[-1], dim=0)) >= 0.99 for p, q in pairs)


@bar("KL 0.015")
def _mean_kl(pairs: Sequence[Pair]) -> bool:
    return float(_kl(pairs).mean()) <= 0.015


@bar("KL 6e-3")
def _strict_kl(pairs: Sequence[Pair]) -> bool:
    kl = _kl(pairs)
    cosine = torch.cat([cosine_similarity(p, q, dim=-1) for p, q in pairs])
    return float(kl.mean()) <= 6e-3 and float(kl.quantile(0.95)) <= 2.5e-2 and float(cosine.mean()) >= 0.998


@bar("allclose")
def _allclose(pairs: Sequence[Pair]) -> bool:
    return all(torch.allclose(q, p, rtol=1e-2, atol=1e-2) for p, q in pairs)


@bar("NMSE 1e-2")
def _nmse(pairs: Sequence[Pair]) -> bool:
    wanted, found = (torch.cat([pair[k] for pair in pairs]) for k in (0, 1))
    return float((wanted - found).square().mean()) <= 1e-2 * float(wanted.var())


def caught(passes: Sequence[logits.Pass]) -> dict[str, bool] | None:
    """Which bars do not hold; all where there are no logits to compare. None without a pass."""
    if not passes:
        return None
    pairs: list[Pair] = []
    for p in passes:
        if p.found is None or p.found.shape != p.sample.wanted.shape:
            return dict.fromkeys(BARS, True)
        pairs.append((p.sample.real(p.sample.wanted)[0].double(), p.sample.real(p.found)[0].double()))
    return {name: not holds(pairs) for name, holds in BARS.items()}


@contextmanager
def seen() -> Iterator[list[logits.Pass]]:
    """Inside, the passes of the head of words (the first head without one) as parity comes by them."""
    held: list[logits.Pass] = []
    right = logits.by_prompt

    def by_prompt(
        passes: list[logits.Pass], dtype: torch.dtype, kind: logits.Kind = "words"
    ) -> dict[str, logits.Logits]:
        if not held:
            held.extend(passes)
        return right(passes, dtype, kind)

    logits.by_prompt = by_prompt
    try:
        yield held
    finally:
        logits.by_prompt = right


# --- what is computed once for all mistakes of one original -----------------------------------------------


class Once:
    """The original's own passes, which no mistake in the conversion changes: `parity` asks for each phase of
    each prompt again for every conversion."""

    def __init__(self) -> None:
        self.known: dict[tuple[object, ...], parity.Tree] = {}
        self.keys: dict[int, tuple[object, ...]] = {}

    @contextmanager
    def of(self, original: object) -> Iterator[None]:
        right, controls = parity._own, parity.control

        def own(side: Side, phase: parity.Phase, x: parity.Tree, given: Tensors) -> parity.Tree:
            reversed_sums = torch._C._len_torch_function_stack() > 0
            came = self.keys.get(id(x)) or (_bytes(x), *((n, _bytes(t)) for n, t in sorted(given.items())))
            key = (original, str(side.config), phase, came, reversed_sums)
            if key not in self.known:
                self.known[key] = y = right(side, phase, x, given)
                self.keys[id(y)] = (hash(key), len(self.keys))  # kept in `known`, so the id stays its own
            return self.known[key]

        parity._own = own
        parity.control = lambda *a: []  # mistakes planted in memory say nothing of the one on disk
        try:
            yield
        finally:
            parity._own, parity.control = right, controls


def _bytes(x: parity.Tree) -> bytes:
    return b"".join(t.cpu().numpy().tobytes() + str(tuple(t.shape)).encode() for t in leaves(x))
