"""What the converted model answers to the input of a documented value: rows of tokens through the head that
the value is of, with what else the entry gives, and the loss of that head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ckpt_tool import reference
from ckpt_tool.records import dataclass
from ckpt_tool.reference import losses
from ckpt_tool.reference.hf_blocks import of_last_token
from ckpt_tool.verify.entity_inputs import NAMES, NoEntities, entity_inputs, titles
from ckpt_tool.verify.expectations import Expectation
from ckpt_tool.verify.library import one_line
from ckpt_tool.verify.needs import free_memory, heaviest
from ckpt_tool.verify.prompts import MASKED_TEXT, MASKS, padding_of, positions
from ckpt_tool.verify.sides import BROKEN, Side
from ckpt_tool.verify.subject import Subject

WORK_LIMIT = {"cpu": 3e13, "cuda": 3e16}  # floating-point operations for one entry: some minutes

# What the heads with more than `logits` give, by the names of transformers and of the entries.
RESULTS = {
    "base_model": ("last_hidden_state", "pooler_output", "entity_last_hidden_state"),
    "masked_lm": ("logits", "entity_logits"),
    "pretraining": ("prediction_logits", "seq_relationship_logits"),
    "question_answering": ("start_logits", "end_logits"),
}
TEXT_INPUTS = {"text", "text_pair", "texts", "add_special_tokens", "padding", "padding_side", "max_length",
               "pad_token_id", "input_ids", "attention_mask", "token_type_ids", "bos", "eos"}  # fmt: skip


# Those that another head of the reading answers: the entity side of a masked language model.
ANSWERED_BY = {"entity_prediction": "masked_lm"}
DEFAULTS = {"base_model": "last_hidden_state", "entity_prediction": "entity_logits"}
# Further inputs that a head takes, and not what comes before it, by their names as its parameters.
OF_HEADS = {"entity_start": "start", "entity_end": "end"}


class Skip(Exception):
    """Why an entry cannot be run here."""


class Contradiction(Exception):
    """What makes it plain, without running anything, that the checkpoint is not the documented one."""


@contextmanager
def passing() -> Iterator[None]:
    """What a pass over an input raises that the model was not made for, or that lacks a tensor."""
    try:
        yield
    except KeyError as missing:
        raise Skip(f"the pass cannot run: the output has no {missing.args[0]}") from missing
    except IndexError:
        text = "expected a row for each token, type, position and entity of the input, found a shorter table"
        raise Contradiction(text) from None
    except BROKEN as error:
        raise Skip(f"the pass cannot run: {one_line(error)}") from error


@dataclass(frozen=True)
class Batch:
    """Token ids (B, T) and further inputs by name, as reference/__init__.py has them."""

    ids: Tensor
    given: Mapping[str, Tensor]


@dataclass(frozen=True)
class Runner:
    """The converted side, ready to answer entries; `tokenizer` encodes text, None where there is none."""

    subject: Subject
    side: Side
    dtype: str
    device: str
    tokenizer: Any
    runs: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)  # of generation

    def rows(self, entry: Expectation) -> list[list[int]]:
        """The entry's token ids, or those of its text."""
        entities = NAMES if "entity_ids" in self.side.inputs else set()
        unknown = set(entry.input) - TEXT_INPUTS - entities
        if unknown:
            raise Skip(f"this reading does not take {', '.join(sorted(unknown))}")
        rows = entry.input_ids
        if rows is None:
            rows = [list(self._encoded(entry).ids)]
        vocabulary, largest_id = self.side.vocabulary, max(map(max, rows))
        if largest_id >= vocabulary:
            raise Contradiction(
                f"expected a vocabulary that has token {largest_id}, found {vocabulary} words"
            )
        longest, table = max(map(len, rows)), positions(self.subject.config, self.subject.hf)
        if table is not None and longest > table:
            raise Contradiction(f"expected positions for {longest} tokens, found {table}")
        return rows

    def unpadded(self, entry: Expectation) -> list[list[int]]:
        """Prompts to be continued, each alone and without its padding, which is the same when positions are
        counted from the first token on."""
        rows, mask = self.rows(entry), entry.input.get("attention_mask")
        if mask is None:
            return rows
        return [[i for i, kept in zip(r, m, strict=True) if kept] for r, m in zip(rows, mask, strict=True)]

    def batch(self, entry: Expectation) -> Batch:
        """The entry's rows as one batch."""
        rows = self.rows(entry)
        self.affordable(sum(map(len, rows)))
        if len({len(r) for r in rows}) > 1:
            raise Skip("rows of different lengths")
        types = entry.input.get("token_type_ids")
        if types is None and entry.input_ids is None and "text_pair" in entry.input:
            types = [list(self._encoded(entry).type_ids)]
        mask = entry.input.get("attention_mask")
        given = {}
        if types is not None and any(map(any, types)):
            given["token_types"] = torch.tensor(types, device=self.device)
        if mask is not None and not all(map(all, mask)):
            given["mask"] = torch.tensor(mask, device=self.device)
        assert self.subject.hf is not None
        try:
            given |= entity_inputs(entry.input, self.subject.hf, self.device)
        except NoEntities as reason:
            raise Skip(str(reason)) from None
        return Batch(torch.tensor(rows, device=self.device), given)

    def _encoded(self, entry: Expectation) -> Any:
        text, pair = entry.input.get("text"), entry.input.get("text_pair")
        if not isinstance(text, str):
            raise Skip("the entry gives no token ids and no single text")
        if self.tokenizer is None:
            raise Skip("the entry gives text only, and the output has no tokenizer.json that can be read")
        special = entry.input.get("add_special_tokens", True)
        return self.tokenizer.encode(text, pair, add_special_tokens=special)

    def forward(self, ids: Tensor) -> Tensor:
        with passing():
            return self.side.forward(ids)

    def outputs(self, head: str, batch: Batch) -> dict[str, Tensor]:
        """What a head gives, by the names of `RESULTS`, else as `logits`; Skip where the output has no such
        head."""
        side, module = self.side, self.side.module
        head = ANSWERED_BY.get(head, head)
        known = getattr(module, "HEADS", {})
        choices = head == "multiple_choice"  # the rows are the choices of one question
        ids = batch.ids[None] if choices else batch.ids
        given = {k: x[None] if choices else x for k, x in batch.given.items()}
        of_head = {OF_HEADS[name]: given.pop(name) for name in OF_HEADS if name in given}
        if left := given.keys() - side.takes(given):
            words = {"mask": "the batch is padded, and this reading takes no mask",
                     "token_types": "this reading takes no token types"}  # fmt: skip
            raise Skip("; ".join(words.get(n, f"this reading takes no {n}") for n in sorted(left)))
        with torch.inference_mode(), passing():
            if head not in known:
                if head != "causal_lm":
                    raise Skip(f"no reading of {module.__name__.rpartition('.')[2]} for the head {head}")
                return {"logits": module.forward(ids, side.ranks, side.config, **given)}
            if foreign := of_head.keys() - signature(known[head]).parameters:
                raise Skip(f"the head {head} takes no {', '.join(sorted(foreign))}")
            encoded = module.encode(ids, side.ranks, side.config, **given)
            try:
                found = known[head](encoded, side.ranks, side.config, **of_head)
            except KeyError as missing:
                raise Skip(f"the output does not hold the head {head}: no tensor {missing}") from None
            if head == "sequence_classification" and found.ndim == 3:
                found = of_last_token(found, ids, self._padding(len(ids)))
        parts = found if isinstance(found, tuple) else (found,)
        return dict(zip(RESULTS.get(head, ("logits",)), parts, strict=False))

    def _padding(self, rows: int) -> int | None:
        """The id of padding, before which the last token stands that classifies a row. Skip where the library
        refuses several rows."""
        pad = padding_of(self.subject.config)
        if pad is None and rows > 1:
            raise Skip(f"expected a pad_token_id to find the last token of {rows} rows by, found none")
        return pad

    def result(self, entry: Expectation, batch: Batch, default: str = "logits") -> Tensor:
        """The one that the entry is about."""
        head = "causal_lm" if entry.head == "generation" else entry.head
        found, name = self.outputs(head, batch), entry.expected.tensor or DEFAULTS.get(head, default)
        if name not in found:
            raise Skip(f"the head {head} gives {', '.join(found)} here, not {name}")
        return found[name]

    def affordable(self, tokens: int) -> None:
        """Skip what would take too long or too much memory, with the numbers."""
        assert self.subject.hf is not None
        parameters = sum(t.numel for t in self.subject.hf)
        work = 2.0 * parameters * tokens
        kind = "cuda" if self.device.startswith("cuda") else "cpu"
        if work > WORK_LIMIT[kind]:
            raise Skip(
                f"too big: about {work / 1e12:,.0f} TFLOP on {kind} for {tokens} tokens through "
                f"{parameters / 1e9:.1f} G weights, the limit is {WORK_LIMIT[kind] / 1e12:,.0f}"
            )
        need = heaviest(self.subject.hf, torch.empty(0, dtype=getattr(torch, self.dtype)).element_size())
        if kind == "cpu" and need > (free := free_memory()):
            raise Skip(
                f"too big: one layer takes {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
            )

    def loss(self, entry: Expectation) -> float:
        """The loss of the entry's head for its labels."""
        batch = self.batch(entry)
        made = self.outputs(entry.head, batch)
        labels, head = entry.labels, entry.head
        if head == "causal_lm":
            if labels is not None and labels != batch.ids.tolist():
                raise Skip("the labels are not the input ids")
            return reference.loss(made["logits"], batch.ids)
        if head == "question_answering":
            first, last = self._labels(entry, "start_positions"), self._labels(entry, "end_positions")
            return losses.span(made["start_logits"], made["end_logits"], first, last).item()
        if head == "pretraining":
            words, order = self._labels(entry, "labels"), self._labels(entry, "next_sentence_label")
            lm, next_sentence = (made[name] for name in RESULTS[head])
            return losses.pretraining(lm, next_sentence, words, order).item()
        logits = made.get("logits")
        if logits is None:
            raise Skip(f"no loss is defined for the head {head}")
        if head == "token_classification" and isinstance(labels, Mapping) and "labels" not in labels:
            if "argmax" not in str(labels.get("rule")):
                raise Skip(f"labels by a rule that is not known here: {labels.get('rule')}")
            return losses.labelled(logits, logits.argmax(-1)).item()
        if head == "masked_lm" and isinstance(labels, Mapping) and "entity_labels" in labels:
            return self._words_and_entities(entry, made).item()
        name = "next_sentence_label" if head == "next_sentence_prediction" else "labels"
        wanted = self._labels(entry, name)
        if head.startswith("entity_"):
            single = wanted.ndim == logits.ndim - 1
            return losses.classification(logits, wanted, losses.PROBLEMS[1 if single else 2]).item()
        if head == "sequence_classification":
            return losses.classification(logits, wanted, self.subject.config.get("problem_type")).item()
        return losses.labelled(logits, wanted).item()

    def _words_and_entities(self, entry: Expectation, made: Mapping[str, Tensor]) -> Tensor:
        if "entity_logits" not in made:
            raise Skip("the entry has labels of entities, and its input has none")
        total = losses.labelled(made["entity_logits"], self._labels(entry, "entity_labels"))
        if "labels" in entry.labels:
            total = total + losses.labelled(made["logits"], self._labels(entry, "labels"))
        return total

    def titles(self, entity: int) -> list[str]:
        """Those of one entity of the output; Skip without its vocabulary."""
        assert self.subject.hf is not None
        try:
            return [title for title, i in titles(self.subject.hf) if i == entity]
        except NoEntities as reason:
            raise Skip(str(reason)) from None

    def _labels(self, entry: Expectation, name: str) -> Tensor:
        found = entry.labels.get(name) if isinstance(entry.labels, Mapping) else entry.labels
        if found is None or name not in (
            "labels",
            *(entry.labels if isinstance(entry.labels, Mapping) else ()),
        ):
            raise Skip(f"the entry gives no {name}")
        return torch.tensor(found, device=self.device)

    def label(self, index: int) -> str:
        """The class of that number, as config.json calls it."""
        named = self.subject.config.get("id2label") or {}
        return str(named.get(str(index), named.get(index, f"LABEL_{index}")))

    def masked_word(self) -> str | None:
        """What a masked language model says in the place of the masked word of a well-known example, in
        words; None where there is no such head or token."""
        if self.tokenizer is None or "masked_lm" not in getattr(self.side.module, "HEADS", {}):
            return None
        mask = next((m for m in MASKS if self.tokenizer.token_to_id(m) is not None), None)
        if mask is None:
            return None
        text = MASKED_TEXT.format(mask)
        ids = self.tokenizer.encode(text).ids
        where = self.tokenizer.token_to_id(mask)
        vocabulary = self.side.vocabulary
        if where not in ids or max(ids) >= vocabulary:
            return None
        try:
            self.affordable(len(ids))
            logits = self.outputs("masked_lm", Batch(torch.tensor([ids], device=self.device), {}))["logits"]
        except (Skip, Contradiction):
            return None
        best = logits[0, ids.index(where)].double().softmax(-1).topk(min(5, vocabulary))
        words = [
            f"{self.tokenizer.id_to_token(i) or i} {p:.1%}"
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return f"{text} -> {', '.join(words)}"
