"""Generation as the library does it, on either reading: greedy, sampling and beam search under the rules of
one of its releases, with the values of every choice that was made. The rules are of the search and not of a
reading, so both sides are searched by the same ones; transformers itself is their judge.

Source: transformers 4.37.2 (generation/utils.py, beam_search.py), 5.23.0 and 5.24.0 (generation/utils.py);
Wu et al. 2016 (arXiv 1609.08144, section 7) and Vijayakumar et al. 2018 (arXiv 1610.02424, groups) for
the search.

P prompts, B beams of each, R rows of the batch, L tokens so far, V words, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field

import torch
from torch import Tensor

from ckpt_tool.errors import fail
from ckpt_tool.records import dataclass
from ckpt_tool.verify.generate_options import Options, refuse
from ckpt_tool.verify.generate_scores import Place, processed
from ckpt_tool.verify.generate_session import Session

LOW = -1e9  # in the place of a running sum that may not win


@dataclass(frozen=True)
class Chosen:
    """One token of a hypothesis: its row of the batch before, its processed score there and that normalised,
    and the choice before it."""

    token: int
    row: int
    score: float
    normal: float
    before: Chosen | None = None

    def path(self) -> list[Chosen]:
        found: list[Chosen] = []
        step: Chosen | None = self
        while step is not None:
            found.append(step)
            step = step.before
        return found[::-1]


@dataclass(frozen=True)
class Generated:
    """Rows of ids, padding and prompt included; a number for each new token, 0 after the end of a hypothesis,
    raw and normalised. Beam search alone has sums by length and rows of parents, -1 after the end. `passes`
    are what each step read, (R, L), and its logits, (R, V), kept where that was asked for."""

    sequences: list[list[int]]
    transition_scores: list[list[float]]
    normalized: list[list[float]]
    steps: int
    sequences_scores: list[float] | None = None
    beam_indices: list[list[int]] | None = None
    passes: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    def lengths(self) -> list[int]:
        """Of the new part of each hypothesis, counted from the beams that it came by."""
        if self.beam_indices is None:
            return [len(row) for row in self.transition_scores]
        return [sum(i >= 0 for i in row) for row in self.beam_indices]

    def reconstructed(self, length_penalty: float) -> list[float]:
        """The sums by length, out of the transition scores: what the documentation has with the number of
        negative scores in the place of the length, which is less where a score is exactly 0."""
        pairs = zip(self.transition_scores, self.lengths(), strict=True)
        return [sum(row) / max(n, 1) ** length_penalty for row, n in pairs]


def generate(
    session: Session, o: Options, *, positions: int | None = None, seed: int | None = None, keep: bool = False
) -> Generated:
    """What the prompts of the session go on with. `positions` is max_position_embeddings of config.json;
    `seed` starts the draws over, which are those of torch's CPU generator with that seed."""
    total = o.total(session.width, positions)
    _fitting(o, session.vocabulary)
    if seed is not None and not -(1 << 63) <= seed < 1 << 64:
        fail("usage", f"expected a seed of 64 bits, found {seed}", where="--seed")
    if o.do_sample and seed is None:
        fail("usage", "expected a seed for sampling, found none", where="--seed", hint="--seed 0 gives one")
    draws = torch.Generator().manual_seed(seed) if seed is not None else None
    search = (_beams_4 if o.rules == "4.37" else _beams_5) if o.beams else _rows
    with torch.inference_mode():
        return search(session, o, total, draws, keep)


def _fitting(o: Options, vocabulary: int) -> None:
    need = candidates(o)
    group = o.num_beams // max(o.num_beam_groups, 1)
    if o.beams and need > group * vocabulary:
        text = f"expected at most {vocabulary} candidates of each beam, found {need // group}"
        refuse(f"{text} asked for by {group} beams", "num_beams", hint="fewer ids in eos_token_id, or greedy")
    top = max(o.forced_eos_token_id, default=0)
    if top >= vocabulary:
        text = f"expected an id below {vocabulary}, the size of the vocabulary, found {top}"
        refuse(text, "forced_eos_token_id")


def candidates(o: Options) -> int:
    """K of the best sums that are looked at, of each group; 4.37 draws twice the beams, whatever ends."""
    group = o.num_beams // max(o.num_beam_groups, 1)
    if o.do_sample and o.rules == "4.37":
        return 2 * group
    return max(2, 1 + len(o.eos)) * group


def _numbers(logits: Tensor, o: Options, step: int) -> Tensor:
    """Logits in float32. Kind `non-finite` for NaN, which has no order, unless it is to be removed."""
    if not o.remove_invalid_values and bool(torch.isnan(logits).any()):
        row = int(torch.isnan(logits).any(-1).nonzero()[0])
        hint = "--option remove_invalid_values=true goes on with 0 in its place"
        message = f"expected numbers as logits, found NaN in row {row} of new token {step + 1}"
        fail("non-finite", message, file="the model", hint=hint)
    return logits.float()


def _drawn(scores: Tensor, n: int, draws: torch.Generator | None, step: int) -> Tensor:
    """n different ids of each row, by their probabilities; of fewer that have any, others too, as torch has
    it."""
    likely = scores.softmax(-1).cpu()
    if not bool(torch.isfinite(likely).all()):
        row = int((~torch.isfinite(likely)).any(-1).nonzero()[0])
        message = f"expected a token to draw in row {row} of new token {step + 1}, found all of them banned"
        refuse(message, "do_sample", hint="fewer bans, such as suppress_tokens and bad_words_ids")
    return torch.multinomial(likely, n, generator=draws).to(scores.device)


# --- greedy and sampling ----------------------------------------------------------------------------------


def _rows(session: Session, o: Options, total: int, draws: torch.Generator | None, keep: bool) -> Generated:
    """Each row by itself; one that has ended gets the id for padding until all have."""
    ids, logits = session.ids, session.first()
    kept: list[tuple[Tensor, Tensor]] = []
    going = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    ends = torch.tensor(o.eos, dtype=torch.long, device=ids.device)
    raw: list[Tensor] = []
    normal: list[Tensor] = []
    for step in range(total - session.width):
        at = Place(ids, session.width, total, session.pads)
        scores = processed(_numbers(logits, o, step), at, o)
        kept += [(ids, logits)] if keep else []
        token = _drawn(scores, 1, draws, step)[:, 0] if o.do_sample else scores.argmax(-1)
        if len(ends):
            if o.pad is None:
                refuse("expected an id to fill rows that have ended with, found none", "pad_token_id")
            token = torch.where(going, token, o.pad)
        raw.append(scores.gather(1, token[:, None])[:, 0])
        normal.append(scores.log_softmax(-1).gather(1, token[:, None])[:, 0])
        ids = torch.cat([ids, token[:, None]], dim=1)
        going = going & ~torch.isin(token, ends)
        if not bool(going.any()) or ids.shape[1] == total:
            break
        logits = session.more(token)
    both = [torch.stack(x, dim=1).tolist() for x in (raw, normal)]
    return Generated(ids.tolist(), both[0], both[1], len(raw), passes=kept)


# --- beam search ------------------------------------------------------------------------------------------


@dataclass
class Ended:
    """A finished hypothesis: its sum by length, and its tokens."""

    value: float
    last: Chosen | None


@dataclass(frozen=True)
class Step:
    """Scores (R, V), logarithms at first and then processed, row by row; and the same normalised."""

    scores: Tensor
    normal: Tensor

    def choose(self, row: int, token: int, before: Chosen | None) -> Chosen:
        return Chosen(token, row, float(self.scores[row, token]), float(self.normal[row, token]), before)

    def score(
        self, rows: Tensor, session: Session, ids: Tensor, total: int, o: Options, taken: Tensor | None = None
    ) -> None:
        """What comes of some rows; `taken` (P, V) by earlier groups."""
        at = Place(ids[rows], session.width, total, session.pads[rows])
        if taken is not None:
            taken = taken.repeat_interleave(len(rows) // len(taken), dim=0).to(self.scores)
        self.scores[rows] = processed(self.scores[rows], at, o, taken)
        self.normal[rows] = self.scores[rows].log_softmax(-1)


def _unscored(logits: Tensor) -> Step:
    logs = logits.log_softmax(-1)
    return Step(logs, torch.empty_like(logs))


def best_of(sums: Tensor, o: Options, draws: torch.Generator | None, step: int) -> tuple[Tensor, Tensor]:
    """The K candidates of each prompt, sums and places in (B * V): the best, or drawn by their sums. 5 leaves
    those in the order of the draw, up to 5.23."""
    if not o.do_sample:
        best = sums.topk(candidates(o), dim=1)
        return best.values, best.indices
    places = _drawn(sums, candidates(o), draws, step)
    values = sums.gather(1, places)
    if o.rules == "5":
        return values, places
    values, order = values.sort(descending=True, dim=1)
    return values, places.gather(1, order)


def _beams_5(
    session: Session, o: Options, total: int, draws: torch.Generator | None, keep: bool
) -> Generated:
    P, B, V, W = session.prompts, o.num_beams, session.vocabulary, session.width
    ids, logits = session.ids, session.first()
    kept: list[tuple[Tensor, Tensor]] = []
    running = torch.full((P, B), LOW)
    running[:, 0] = 0
    beams: list[list[Chosen | None]] = [[None] * B for _ in range(P)]
    values, finished = torch.full((P, B), LOW), torch.zeros((P, B), dtype=torch.bool)
    ended: list[list[Chosen | None]] = [[None] * B for _ in range(P)]
    open_ = torch.ones(P, dtype=torch.bool)
    for t in range(1, total - W + 1):
        step = _unscored(_numbers(logits, o, t - 1))
        step.score(torch.arange(P * B, device=ids.device), session, ids, total, o)
        kept += [(ids, logits)] if keep else []
        sums = step.scores.cpu().view(P, B, V) + running[:, :, None]
        best, places = best_of(sums.view(P, -1), o, draws, t - 1)
        rows, tokens = places // V + torch.arange(P)[:, None] * B, places % V
        hit = torch.isin(tokens, torch.tensor(o.eos, dtype=torch.long)) | (W + t >= total)
        new = [
            [step.choose(r, i, beams[p][r % B]) for r, i in zip(rs, ts, strict=True)]
            for p, (rs, ts) in enumerate(zip(rows.tolist(), tokens.tolist(), strict=True))
        ]
        going = best + hit.float() * LOW
        chosen = going.topk(B, dim=1).indices
        running = going.gather(1, chosen)
        beams = [[new[p][k] for k in chosen[p].tolist()] for p in range(P)]
        may = hit & (torch.arange(best.shape[1]) < B)
        by_length = best / (t**o.length_penalty)
        closed = (finished.all(1) & (o.early_stopping is True)) | ~open_
        by_length = by_length + closed.float()[:, None] * LOW + (~may) * LOW
        values, order = torch.cat([values, by_length], dim=1).topk(B, dim=1)
        finished = torch.cat([finished, may], dim=1).gather(1, order)
        ended = [[(ended[p] + new[p])[k] for k in order[p].tolist()] for p in range(P)]
        open_ &= _open_5(running, values, finished, t, total - W, o)
        full = bool(finished.all()) and o.early_stopping is True
        if not bool(open_.any()) or full or bool(hit.all()):
            break
        parents = rows.gather(1, chosen).flatten()
        token = tokens.gather(1, chosen).flatten().to(ids.device)
        ids = torch.cat([ids[parents.to(ids.device)], token[:, None]], dim=1)
        logits = session.more(token, parents)
    n = o.num_return_sequences
    found = [[Ended(float(v), c) for v, c in zip(values[p], ended[p], strict=True)][:n] for p in range(P)]
    # an id 0 counts as none here
    return _hypotheses(session, found, (o.pad or o.eos[0]) if o.eos else -1, t, kept)


def _open_5(running: Tensor, values: Tensor, finished: Tensor, t: int, most: int, o: Options) -> Tensor:
    """Where the best running sum may still beat the worst finished one."""
    length = most if o.early_stopping == "never" and o.length_penalty > 0 else t
    hope = running[:, :1] / (length**o.length_penalty)
    worst = torch.where(finished, values.min(dim=1, keepdim=True).values, LOW)
    found: Tensor = (hope > worst).any(-1)
    return found


@dataclass
class Heap:
    """4.37's list of finished hypotheses of one prompt, or one group of its beams."""

    size: int
    kept: list[Ended] = field(default_factory=list)
    worst: float = -LOW
    done: bool = False

    def add(self, total: float, length: int, last: Chosen | None, o: Options) -> None:
        value = total / length**o.length_penalty
        if len(self.kept) >= self.size and not value > self.worst:  # NaN is never better
            return
        self.kept.append(Ended(value, last))
        if len(self.kept) <= self.size:
            self.worst = min(value, self.worst)
            return
        order = sorted((e.value, k) for k, e in enumerate(self.kept))
        del self.kept[order[0][1]]
        self.worst = order[1][0]

    def full(self, best: float, t: int, most: int, o: Options) -> bool:
        """Whether no candidate can get in any more; `best` is the best sum of this step, ended ones too."""
        if len(self.kept) < self.size:
            return False
        if o.early_stopping is True:
            return True
        length = most if o.early_stopping == "never" and o.length_penalty > 0 else t
        return bool(self.worst >= best / length**o.length_penalty)


@dataclass
class Search4:
    """What 4.37's search holds: running sums and tokens by row, a heap for each prompt and group."""

    o: Options
    heaps: list[list[Heap]]
    sums: list[float]
    last: list[Chosen | None]
    most: int  # new tokens

    def advance(self, step: Step, p: int, g: int, best: Tensor, places: Tensor, t: int) -> None:
        """The candidates of one group of one prompt, in their order: those that end go to the heap, if they
        are among the best, the others run on."""
        o, V = self.o, step.scores.shape[1]
        size = o.num_beams // o.num_beam_groups
        first, heap = p * o.num_beams + g * size, self.heaps[p][g]
        if heap.done:
            self.sums[first : first + size] = [0.0] * size
            filler = [Chosen(o.pad or 0, first + k, 0.0, 0.0, self.last[first + k]) for k in range(size)]
            self.last[first : first + size] = filler
            return
        going: list[tuple[float, Chosen]] = []
        for rank, (value, place) in enumerate(zip(best.tolist(), places.tolist(), strict=True)):
            row, token = first + place // V, place % V
            if token not in o.eos:
                going.append((value, step.choose(row, token, self.last[row])))
            elif rank < size:  # the first id that ends is written, whichever it was
                heap.add(value, t, step.choose(row, o.eos[0], self.last[row]), o)
            if len(going) == size:
                break
        if len(going) < size:
            text = f"expected {size} candidates that go on, found {len(going)}"
            refuse(f"{text} of {len(best)}", "num_beams", hint="fewer beams, or an id that ends a row less")
        self.sums[first : first + size] = [value for value, _ in going]
        self.last[first : first + size] = [chosen for _, chosen in going]
        heap.done = heap.full(float(best.max()), t, self.most, o)


def _beams_4(
    session: Session, o: Options, total: int, draws: torch.Generator | None, keep: bool
) -> Generated:
    P, B, G, W = session.prompts, o.num_beams, max(o.num_beam_groups, 1), session.width
    size, ids, logits = B // G, session.ids, session.first()
    kept: list[tuple[Tensor, Tensor]] = []
    start = [0.0 if o.do_sample or b % size == 0 else LOW for b in range(B)] * P
    heaps = [[Heap(size) for _ in range(G)] for _ in range(P)]
    found = Search4(o, heaps, start, [None] * (P * B), total - W)
    for t in range(1, total - W + 1):
        step, taken = _unscored(_numbers(logits, o, t - 1)), torch.zeros(P, session.vocabulary)
        for g in range(G):
            rows = torch.arange(P * B).view(P, B)[:, g * size : (g + 1) * size].to(ids.device)
            step.score(rows.flatten(), session, ids, total, o, taken if g else None)
            sums = (
                step.scores[rows].cpu() + torch.tensor(found.sums).view(P, B)[:, g * size :][:, :size, None]
            )
            best, places = best_of(sums.view(P, -1), o, draws, t - 1)
            for p in range(P):
                found.advance(step, p, g, best[p], places[p], t)
                for chosen in found.last[p * B + g * size :][:size]:
                    taken[p, chosen.token if chosen is not None else 0] += 1
        kept += [(ids, logits)] if keep else []
        went = [c for c in found.last if c is not None]
        parents, token = torch.tensor([c.row for c in went]), torch.tensor([c.token for c in went])
        ids = torch.cat([ids[parents.to(ids.device)], token.to(ids.device)[:, None]], dim=1)
        if all(h.done for hs in heaps for h in hs) or ids.shape[1] >= total:
            break
        logits = session.more(token.to(ids.device), parents)
    for p, group in enumerate(heaps):
        for g, heap in enumerate(group):
            for row in range(p * B + g * size, p * B + (g + 1) * size) if not heap.done else ():
                heap.add(found.sums[row], t, found.last[row], o)
    best_first = [sorted((e for h in hs for e in h.kept), key=lambda e: e.value)[::-1] for hs in heaps]
    rows_ = [group[: o.num_return_sequences] for group in best_first]
    return _hypotheses(session, rows_, o.pad if o.pad is not None else -1, t, kept)


def _hypotheses(
    session: Session, found: list[list[Ended]], fill: int, steps: int, kept: list[tuple[Tensor, Tensor]]
) -> Generated:
    """The hypotheses of all prompts as wide as the longest."""
    rows = list(_paths(session, found))
    width = max(len(path) for _, _, path in rows)

    def filled(path: list[Chosen], name: str, empty: float) -> list[float]:
        return [getattr(c, name) for c in path] + [empty] * (width - len(path))

    return Generated(
        [prompt + [int(i) for i in filled(path, "token", fill)] for prompt, _, path in rows],
        [filled(path, "score", 0.0) for _, _, path in rows],
        [filled(path, "normal", 0.0) for _, _, path in rows],
        steps,
        [value for _, value, _ in rows],
        [[int(i) for i in filled(path, "row", -1)] for _, _, path in rows],
        kept,
    )


def _paths(session: Session, found: list[list[Ended]]) -> Iterator[tuple[list[int], float, list[Chosen]]]:
    for prompt, hypotheses in zip(session.padded, found, strict=True):
        for ended in hypotheses:
            yield prompt, ended.value, [] if ended.last is None else ended.last.path()
