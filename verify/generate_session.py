"""A reading that goes on from prompts, one token of every row at a time: what generation asks of a model.

Prompts of one length run together, each without its padding, which is the same as with it where positions
are counted from the first real token on. What a reading keeps of the tokens before stays beside them (the
input `past` of a pass), or the whole of every row runs again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

import ckpt_tool.reference.phases as protocol
from ckpt_tool.errors import fail
from ckpt_tool.records import dataclass
from ckpt_tool.verify.sides import Side

PROMPTS = "prompts"


@dataclass(frozen=True)
class Prompts:
    """Rows of ids as wide as the longest, and how many of each are padding at its beginning."""

    rows: tuple[tuple[int, ...], ...]
    pads: tuple[int, ...]

    @property
    def alone(self) -> list[list[int]]:
        return [list(row[n:]) for row, n in zip(self.rows, self.pads, strict=True)]


def prompts_of(
    rows: Sequence[Sequence[int]],
    mask: Sequence[Sequence[int]] | None,
    *,
    pad: int | None,
    eos: Sequence[int],
    bos: int | None = None,
) -> Prompts:
    """`rows` with their `mask`, or without one: then the id for padding is padding, wherever it is found,
    unless it ends a row as well. Shorter rows are padded on the left. Kind `usage` for padding anywhere
    else."""
    if not rows and bos is None:
        fail("usage", "expected a prompt, or a bos_token_id to begin with, found neither", file=PROMPTS)
    given = [list(row) for row in rows] or [[bos or 0]]
    if not all(given):
        fail("usage", "expected a token in every prompt, found an empty one", file=PROMPTS)
    width = max(map(len, given))
    if mask is not None:
        if [len(m) for m in mask] != [len(r) for r in given]:
            fail("usage", "expected a mask of the shape of the prompts, found another", file=PROMPTS)
        if any(kept not in (0, 1) for row in mask for kept in row):
            fail("usage", "expected a mask of 0 and 1, found something else", file=PROMPTS)
        padding = [[not kept for kept in row] for row in mask]
    else:
        inferred = pad is not None and pad not in eos
        padding = [[inferred and i == pad for i in row] for row in given]
    made, pads = [], []
    for number, (row, hidden) in enumerate(zip(given, padding, strict=True)):
        n = hidden.index(False) if False in hidden else len(row)
        if any(hidden[n:]) or n == len(row):
            text = "expected padding on the left of a prompt alone, found it elsewhere"
            hint = "leave it out: prompts of several lengths are padded here"
            if mask is None:
                text += f": {pad} is the id for padding"
                hint = "--prompts with an attention_mask says which of them are prompt"
            fail("usage", text, file=PROMPTS, where=f"row {number}", hint=hint)
        short = width - len(row)
        if short and pad is None:
            hint = "--option pad_token_id=0 gives one"
            fail(
                "usage",
                "expected a pad_token_id for prompts of several lengths, found none",
                file=PROMPTS,
                hint=hint,
            )
        made.append((*[pad or 0] * short, *row))
        pads.append(short + n)
    return Prompts(tuple(made), tuple(pads))


@dataclass
class Group:
    """Rows of one length: which of the batch they are, their ids so far, and what is kept of them."""

    rows: Tensor
    ids: Tensor
    past: dict[Any, Any] | None


@dataclass
class Session:
    """`rows` of the batch for each prompt, beside each other; `vocabulary` is how many ids there are, `table`
    how many positions, none where nothing limits them."""

    side: Side
    given: Prompts
    vocabulary: int
    rows: int = 1
    cache: bool = True
    table: int | None = None
    device: str = "cpu"
    groups: list[Group] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        wrong = [i for row in self.given.alone for i in row if not 0 <= i < self.vocabulary]
        wrong += [i for row in self.given.rows for i in row if i >= self.vocabulary]  # padding too
        if wrong:
            known = f"expected ids from 0 and below {self.vocabulary}, the size of the vocabulary"
            fail("usage", f"{known}, found {wrong[0]}", file=PROMPTS)
        self._room(max(map(len, self.given.alone)))

    @property
    def prompts(self) -> int:
        return len(self.given.rows)

    @property
    def padded(self) -> list[list[int]]:
        return [list(row) for row in self.given.rows]

    @property
    def width(self) -> int:
        return len(self.given.rows[0])

    @property
    def ids(self) -> Tensor:
        """(R, L)"""
        return torch.tensor(self.padded, device=self.device).repeat_interleave(self.rows, dim=0)

    @property
    def pads(self) -> Tensor:
        """How many of each row are padding (R,)."""
        return torch.tensor(self.given.pads, device=self.device).repeat_interleave(self.rows)

    def first(self) -> Tensor:
        """Logits (R, V) of the token after each prompt, whose rows are computed once."""
        lengths = sorted({len(row) for row in self.given.alone})
        found = torch.empty(0, device=self.device)
        self.groups = []
        for length in lengths:
            own = [p for p, row in enumerate(self.given.alone) if len(row) == length]
            ids = torch.tensor([self.given.alone[p] for p in own], device=self.device)
            group = Group(torch.tensor(own), ids, {} if self.cached else None)
            logits = self._pass(group, ids)
            rows = torch.tensor([p * self.rows + b for p in own for b in range(self.rows)])
            again = torch.arange(len(own)).repeat_interleave(self.rows)
            self.groups.append(Group(rows, ids[again], _of_rows(group.past, again)))
            found = logits.new_empty(self.prompts * self.rows, logits.shape[1]) if not len(found) else found
            found[rows] = logits[again]
        return found

    def more(self, tokens: Tensor, parents: Tensor | None = None) -> Tensor:
        """Logits (R, V) after one more token of each row; a row goes on from another one of its prompt where
        `parents` (R,) say so."""
        found = torch.empty(0, device=self.device)
        for group in self.groups:
            if parents is not None:
                place = {int(row): k for k, row in enumerate(group.rows.tolist())}
                order = torch.tensor([place[r] for r in parents[group.rows].tolist()])
                group.ids, group.past = group.ids[order], _of_rows(group.past, order)
            new = tokens[group.rows.to(tokens.device)][:, None]
            group.ids = torch.cat([group.ids, new], dim=1)
            self._room(group.ids.shape[1])
            logits = self._pass(group, group.ids if group.past is None else new)
            found = logits.new_empty(len(tokens), logits.shape[1]) if not len(found) else found
            found[group.rows] = logits
        return found

    @property
    def cached(self) -> bool:
        return self.cache and "past" in self.side.takes({"past": {}})

    def bytes_of(self, tokens: int) -> int:
        """What is kept of so many tokens of all rows, from one token in the first layer."""
        if not self.cached:
            return 0
        past: dict[Any, Any] = {}
        with torch.inference_mode():
            phases = list(self.side.reading({"past": past}).values())
            x = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            for phase in phases[:2]:
                x = phase.run(x)
        layers = sum(phase.kind == "layer" for phase in phases)
        one = sum(t.numel() * t.element_size() for t in protocol.leaves(list(past.values())))
        return one * layers * tokens * self.prompts * self.rows

    def _pass(self, group: Group, ids: Tensor) -> Tensor:
        """Logits (r, V) of the last token."""
        given = {} if group.past is None else {"past": group.past}
        phases = self.side.reading(given).values()
        x = protocol.trunk(list(phases), ids)
        head = next(p for p in phases if p.name == "head")
        logits: Tensor = head.run(x[:, -1:])
        return logits[:, 0]

    def _room(self, tokens: int) -> None:
        if self.table is not None and tokens > self.table:
            text = f"expected at most {self.table} tokens, for which there are positions, found {tokens}"
            fail("usage", text, file=PROMPTS, hint="--option max_new_tokens=N ends it before")
        if self.side.fits(tokens) < tokens:
            text = f"expected a length that the model takes, found {tokens} tokens: it reads whole chunks"
            fail("unsupported", text, file=PROMPTS)


def _of_rows(past: dict[Any, Any] | None, rows: Tensor) -> dict[Any, Any] | None:
    if past is None:
        return None
    return {name: protocol.mapped(lambda t: t[rows.to(t.device)], kept) for name, kept in past.items()}
