"""What is done to the scores of the next token before one is chosen: penalties and bans in every mode, then
the cuts of sampling.

Source: transformers 4.37.2 and 5.23.0, generation/logits_process.py; Keskar et al. 2019 (arXiv 1909.05858,
repetition), Holtzman et al. 2020 (1904.09751, top_p), Meister et al. 2022 (2202.00666, typical), Hewitt et
al. 2022 (2210.15191, epsilon and eta), Nguyen et al. 2024 (2407.01082, min_p).

R rows, L tokens so far, V words. Scores are (R, V), float32; nothing changes them in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ckpt_tool.records import dataclass
from ckpt_tool.verify.generate_options import Options

NEVER = -math.inf


@dataclass(frozen=True)
class Place:
    """Where a step is: ids (R, L), of which `prompt` are given and `total` will be; `pads` at the beginning
    of each row."""

    ids: Tensor
    prompt: int
    total: int
    pads: Tensor


def processed(scores: Tensor, at: Place, o: Options, taken: Tensor | None = None) -> Tensor:
    """In the order of the library. `taken` (R, V) is how often other groups of beams have taken a token."""
    length = at.ids.shape[1]
    scores = biased(scores, at.ids, o.sequence_bias)
    if taken is not None:
        scores = scores - o.diversity_penalty * taken
    if o.repetition_penalty != 1:
        scores = penalised(scores, at, o)
    if o.no_repeat_ngram_size:
        scores = without(scores, (repeated(row, o.no_repeat_ngram_size) for row in at.ids.tolist()))
    ends = {(i,) for i in o.named_eos}
    scores = biased(scores, at.ids, [(words, NEVER) for words in o.bad_words_ids if words not in ends])
    if length < o.shortest(at.prompt):
        scores = banned(scores, o.named_eos)
    if o.forced_bos_token_id is not None and length == 1:
        scores = only(scores, (o.forced_bos_token_id,))
    if o.forced_eos_token_id and length == at.total - 1 and not o.overrun(at.prompt):
        scores = only(scores, o.forced_eos_token_id)
    if o.remove_invalid_values:
        scores = torch.nan_to_num(scores, nan=0.0)
    if o.exponential_decay_length_penalty is not None:
        scores = lured(scores, length - at.prompt, o)
    scores = banned(scores, o.suppress_tokens)
    late = at.prompt == 1 and o.forced_bos_token_id is not None
    if length == at.prompt + late:
        scores = banned(scores, o.begin_suppress_tokens)
    if o.do_sample:
        scores = sampled(scores, o)
    return scores.log_softmax(-1) if o.renormalize_logits else scores


def penalised(scores: Tensor, at: Place, o: Options) -> Tensor:
    """Each id seen so far once. 4.37 counts the padding as seen, 5 does not."""
    ids = at.ids
    if o.rules != "4.37":  # the first real id stands in the places before it
        places = torch.arange(ids.shape[1], device=ids.device)
        ids = ids.gather(1, torch.maximum(places[None, :], at.pads[:, None]))
    found, r = scores.gather(1, ids), o.repetition_penalty
    return scores.scatter(1, ids, torch.where(found < 0, found * r, found / r))


def repeated(row: list[int], n: int) -> set[int]:
    """The ids with which the last n - 1 would be a sequence that was there before."""
    start = row[len(row) + 1 - n :] if n > 1 else []
    grams = (row[k : k + n] for k in range(len(row) + 1 - n))
    return {gram[-1] for gram in grams if gram[:-1] == start}


def without(scores: Tensor, ids: Iterable[set[int]]) -> Tensor:
    scores = scores.clone()
    for row, never in zip(scores, ids, strict=True):
        row[list(never)] = NEVER
    return scores


def banned(scores: Tensor, ids: tuple[int, ...]) -> Tensor:
    known = [i for i in ids if 0 <= i < scores.shape[1]]
    return scores.index_fill(1, torch.tensor(known, device=scores.device), NEVER) if known else scores


def only(scores: Tensor, ids: tuple[int, ...]) -> Tensor:
    made = torch.full_like(scores, NEVER)
    return made.index_fill(1, torch.tensor(ids, device=scores.device), 0.0)


def biased(scores: Tensor, ids: Tensor, words: Iterable[tuple[tuple[int, ...], float]]) -> Tensor:
    """A bias on the last id of each sequence, where those before it have just been there."""
    added = None
    for sequence, bias in words:
        if len(sequence) > max(ids.shape[1], 1) or sequence[-1] >= scores.shape[1]:
            continue
        before = torch.tensor(sequence[:-1], dtype=ids.dtype, device=ids.device)
        there = (ids[:, ids.shape[1] - len(before) :] == before).all(1)
        added = torch.zeros_like(scores) if added is None else added
        added[there, sequence[-1]] += bias
    return scores if added is None else scores + added


def lured(scores: Tensor, new: int, o: Options) -> Tensor:
    """What ends a row becomes likelier with every step after the first ones."""
    assert o.exponential_decay_length_penalty is not None
    start, factor = o.exponential_decay_length_penalty
    if new <= start:
        return scores
    ends = torch.tensor([i for i in o.named_eos if 0 <= i < scores.shape[1]], dtype=torch.long).to(
        scores.device
    )
    found = scores[:, ends]
    more = found.abs() * (factor ** (new - start) - 1)
    if o.rules != "4.37":
        more = more.masked_fill(~torch.isfinite(found), 0.0)
    return scores.index_copy(1, ends, found + more)


# --- the cuts of sampling ---------------------------------------------------------------------------------


def sampled(scores: Tensor, o: Options) -> Tensor:
    """Beams keep one word more than there are ids that end a row, so that one can go on."""
    keep = min(max(2, len(o.named_eos) + 1) if o.beams else 1, scores.shape[1])
    if o.temperature != 1:
        scores = scores / o.temperature
    if o.top_k:
        least = scores.topk(min(max(o.top_k, keep), scores.shape[1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, NEVER)
    if o.top_p < 1:
        scores = nucleus(scores, o.top_p, keep)
    if o.min_p is not None:
        likely = scores.softmax(-1)
        low = likely < o.min_p * likely.amax(-1, keepdim=True)
        scores = scores.masked_fill(low.scatter(1, likely.topk(keep).indices, False), NEVER)
    if o.typical_p < 1:
        scores = typical(scores, o.typical_p, keep)
    if 0 < o.epsilon_cutoff < 1:
        scores = above(scores, torch.tensor(o.epsilon_cutoff), keep)
    if 0 < o.eta_cutoff < 1:
        logs = scores.log_softmax(-1).clamp(min=torch.finfo(scores.dtype).min)
        entropy = -(logs * logs.exp()).sum(-1, keepdim=True)
        eta = torch.tensor(o.eta_cutoff, device=scores.device)
        scores = above(scores, torch.minimum(eta, eta.sqrt() * torch.exp(-entropy)), keep)
    return scores


def nucleus(scores: Tensor, p: float, keep: int) -> Tensor:
    """The fewest words with a mass of p together, counted from the least likely."""
    values, order = scores.sort(descending=False)
    drop = values.softmax(-1).cumsum(-1) <= 1 - p
    drop[:, -keep:] = False
    return scores.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), NEVER)


def typical(scores: Tensor, p: float, keep: int) -> Tensor:
    """The words whose surprise is nearest to what is expected, with a mass of p together."""
    logs = scores.log_softmax(-1)
    entropy = -(logs * logs.exp()).nansum(-1, keepdim=True)
    away, order = torch.sort((-logs - entropy).abs(), descending=False)
    mass = scores.gather(1, order).softmax(-1).cumsum(-1)
    last = (mass < p).sum(1).clamp(max=scores.shape[1] - 1)
    drop = away > away.gather(1, last[:, None])
    drop[:, :keep] = False
    return scores.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), NEVER)


def above(scores: Tensor, least: Tensor, keep: int) -> Tensor:
    low = scores.softmax(-1) < least
    return scores.masked_fill(low & (scores < scores.topk(keep).values[:, -1:]), NEVER)
