"""A model as its author saved it from a notebook: a state dict for each of its parts in a torch file of its
own, and the arguments that it was built with in a pickle beside them, an argparse.Namespace among them.

Source: transformers 4.37.2, models/mega/convert_mega_original_pytorch_checkpoint_to_pytorch.py, which reads
such a folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.checkpoint.torch_zip_writer import Namespace, plain_pickle
from ckpt_tool.checkpoint.weight_sets import MODEL_ARGUMENTS
from ckpt_tool.convert.dialects.converted import generation_config, kept_facts, read_config
from ckpt_tool.convert.dialects.metaseq_settings import unread
from ckpt_tool.convert.dialects.published import copied, tokenizer_files
from ckpt_tool.convert.families import Family
from ckpt_tool.convert.layout import Rule
from ckpt_tool.convert.numbers import Class, Entry, Field, Foretold, Known, Size, document, table_of
from ckpt_tool.convert.params import Facts, left_out, shown
from ckpt_tool.convert.plan import Options, OutputDocument, Plan, Value
from ckpt_tool.convert.source import whole_tensors
from ckpt_tool.convert.tokenizers import TokenizerResult, tokenizer_documents
from ckpt_tool.convert.vocabularies import Vocabulary as Vocabulary
from ckpt_tool.convert.weave import Held, Written, to_hf, to_original
from ckpt_tool.errors import Problem, fail_all, printable
from ckpt_tool.records import dataclass


@dataclass(frozen=True)
class StateDicts:
    """A family that was saved so. `files` are those of its parts, the last of which has what the others have
    not; of each of the others a pattern of the table's names that are in it. `head` is the output matrix.
    `inner` is what the pickle calls the namespace, `outer` the arguments beside it, and `arguments` those
    that the publisher's code looks up. `ids` are fields that the tokenizer may know better."""

    name: str
    title: str
    config: Class
    model_type: str
    architectures: tuple[str, ...]
    fields: Mapping[str, Field]
    rows: Callable[[Known], Sequence[Rule]]
    axes: Mapping[str, Size]
    files: Mapping[str, str]
    head: str
    told_by: str
    layer: tuple[str, str]  # find a layer's number in a name of the original, and in a converted one
    inner: str
    outer: Collection[str]
    arguments: Collection[str]
    written: Sequence[Entry]
    ids: Collection[str]
    unread: str  # as `Family` has it
    notes: Callable[[Known], list[str]]
    foretold: Mapping[str, Callable[[Known], Sequence[Foretold]]]


def family(*, summary: str, vocabulary: Vocabulary, **said: Any) -> Family:
    """The record of a family; `said` are the parts of `StateDicts`."""
    p = StateDicts(**said)
    return Family(
        name=p.name,
        summary=summary,
        architectures=p.architectures,
        recognise=partial(recognise, p),
        plan=partial(plan, p),
        plan_original=partial(plan_original, p),
        held=partial(held, p),
        vocabulary=vocabulary,
        foretold=tuple(p.foretold),
        classes={p.model_type: p.config},
        tensors=(p.told_by,),
        document=MODEL_ARGUMENTS,
        unread=p.unread,
    )


def recognise(p: StateDicts, checkpoint: Checkpoint) -> tuple[bool, str]:
    if p.told_by not in checkpoint:
        return False, f"no {p.told_by}"
    return True, f"{p.told_by} is of {p.title} alone"


# --- what the author's files say ------------------------------------------------------------------------


def arguments_of(p: StateDicts, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The arguments in one mapping; None without the pickle."""
    if MODEL_ARGUMENTS not in checkpoint.documents:
        return None
    from ckpt_tool.checkpoint.arguments import read_arguments

    told = read_arguments(checkpoint.documents[MODEL_ARGUMENTS])
    inner = told.pop(p.inner, {})
    return {**(inner if isinstance(inner, Mapping) else {}), **told}


def read(p: StateDicts, checkpoint: Checkpoint, options: Options) -> Facts:
    """The arguments, but for those that the user sets to null; what nobody reads and may change the numbers
    is refused by name."""
    told = arguments_of(p, checkpoint)
    found = dict(unread(told or {}, {*p.arguments, *p.outer}))
    out = {k for k in found if k in options.settings and options.settings[k] is None}
    left = None if told is None else {k: v for k, v in told.items() if k not in out}
    settings = {k: v for k, v in options.settings.items() if k not in out}
    facts = Facts(left, MODEL_ARGUMENTS, settings)
    facts.notes += [left_out(MODEL_ARGUMENTS, k, found[k]) for k in sorted(out)]
    for key in sorted(found.keys() - out):
        message = f"expected arguments that {p.title} reads or that change nothing, found {shown(found[key])}"
        hint = f"--set {printable(key)}=null leaves it out, if it changes nothing"
        facts.refuse("unsupported", message, printable(key), hint)
    return facts


def parts_problems(p: StateDicts, checkpoint: Checkpoint) -> list[Problem]:
    missing = [name for name in p.files if name not in checkpoint.files]
    there = ", ".join(checkpoint.files)
    hint = "put it there, or give the folder that holds all of them"
    message = f"expected a state dict for each part of the model, found {there} alone"
    return [Problem("missing-file", message, name, hint=hint) for name in missing]


def tokenizer_of(p: StateDicts, known: Known) -> TokenizerResult:
    """The files of the download as they are, and what is missing beside vocab.json and merges.txt."""
    files = tokenizer_files(known.source.checkpoint, known.options)
    made = TokenizerResult({}, [], 0)
    if any(name.endswith(("vocab.json", "merges.txt")) for name in files):
        facts = {"vocab_size": known["vocab_size"]}
        made = tokenizer_documents(files, family=p.name, config=facts)
    notes = made.notes if files else ["the download has no tokenizer file; none was written"]
    own = {d.name: d.content for d in copied(files)}
    return replace(made, documents={**made.documents, **own}, notes=notes)


# --- the two directions ---------------------------------------------------------------------------------


def plan(p: StateDicts, checkpoint: Checkpoint, options: Options) -> Plan:
    fail_all(parts_problems(p, checkpoint))
    source = whole_tensors(checkpoint, p.layer[0])
    facts = read(p, checkpoint, options)
    known = Known(p.fields, facts, source, options)
    config = known.values([n for n in p.fields if n not in p.ids])
    facts.check_settings(p.fields)
    facts.check()
    tokenizer = tokenizer_of(p, known)
    known.told = tokenizer.facts
    config |= known.values(p.ids)
    facts.check()
    where = "copied from beside the weights, or made of vocab.json and merges.txt"
    documents = [OutputDocument(n, d, where) for n, d in tokenizer.documents.items()]
    beside = Written(
        p.name,
        {n: v for n, v in config.items() if not p.fields[n].hidden},
        [generation_config(config), *documents],
        {},
        [*facts.notes, *p.notes(known), *tokenizer.notes],
        {},
        [f for rule in p.foretold.values() for f in rule(known)],
        p.unread,
    )
    table = replace(table_of(known, p.rows(known), p.axes), head=p.head)
    return to_hf(table, source, options, beside)


def plan_original(p: StateDicts, checkpoint: Checkpoint, options: Options) -> Plan:
    """The files of the parts, the pickle, and the tokenizer files as they are."""
    facts = read_config(checkpoint, options.settings, p.architectures, model_type=p.model_type, own=p.config)
    source = whole_tensors(checkpoint, p.layer[1])
    known = Known(p.fields, facts, source, options, p.config, kept_facts(checkpoint), back=True)
    config = known.values()
    facts.check_settings(config)
    facts.check()
    told = {k: v.value for k, v in document(known, p.written).items()}
    outer = {k: told.pop(k) for k in p.outer if k in told}
    pickled = plain_pickle({p.inner: Namespace(told), **outer})
    tokenizer = copied(tokenizer_files(checkpoint, options))
    documents = [OutputDocument(MODEL_ARGUMENTS, pickled, "config.json"), *tokenizer]
    beside = Written(p.name, config, documents, {}, facts.notes, unread=p.unread)

    def homes(name: str) -> list[tuple[str, str]]:
        *others, last = p.files
        home = next((f for f in others if re.fullmatch(p.files[f], name)), last)
        return [(home, source.dtype)]

    table = table_of(known, p.rows(known), p.axes)
    return to_original(table, source, options, beside, files=list(p.files), homes=homes)


def held(p: StateDicts, checkpoint: Checkpoint, options: Options, architecture: str) -> Held:
    """See `Family.held`."""
    facts = read_config(checkpoint, options.settings, (architecture,), model_type=p.model_type, own=p.config)
    source = whole_tensors(checkpoint, p.layer[1])
    known = Known(p.fields, facts, source, options, p.config, {}, back=True)
    return Held(table_of(known, p.rows(known), p.axes), source, facts)


def beside(known: Known, name: str, default: Any, key: str) -> Value:
    """A value that changes nothing, as the arguments have it."""
    if name in known.facts.settings:
        return known.facts.like(name, default, "")
    found = (known.facts.document or {}).get(key)
    plain = isinstance(found, bool) if isinstance(default, bool) else isinstance(found, int | float)
    finite = isinstance(found, int | float) and math.isfinite(found)  # JSON has no other numbers
    if plain and finite and isinstance(found, bool) == isinstance(default, bool):
        return Value(found, f"{known.facts.file}: {key}")
    return Value(default, f"rule: {name} changes nothing that is computed")
