"""Encoders of words and entities as studio-ousia trains them: a torch file, bare or with the model under
`module`, metadata.json with its configuration, and the entities line by line. No tokenizer comes with them:
it is XLM-R's, given with --tokenizer or put beside.

The Hugging Face layout has three rows more: two tokens that mark entities start from the embeddings of `@`
and `#`, and a second masked entity from that of the first.

Source: studio-ousia/luke @25165454 (luke/model.py, luke/utils/model_utils.py,
convert_luke_to_huggingface_model.py); transformers 4.37.2, models/mluke/convert_mluke_original_*.py.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint, Document
from ckpt_tool.convert.copies import DROPPED
from ckpt_tool.convert.dialects.config_keys import read_keys
from ckpt_tool.convert.dialects.converted import kept_facts, read_config
from ckpt_tool.convert.dialects.entity_vocabulary import (
    LINES,
    MASK,
    OBJECT,
    Vocabulary,
    pieces,
    special_ids,
    written_back,
)
from ckpt_tool.convert.dialects.vocabulary import files_beside_or_asked
from ckpt_tool.convert.families import Family
from ckpt_tool.convert.layout import Rule
from ckpt_tool.convert.numbers import Class, Field, Known, Size, by_name, table_of, token_ids
from ckpt_tool.convert.options import Option
from ckpt_tool.convert.params import Facts
from ckpt_tool.convert.plan import Options, OutputDocument, OutputFile, Plan, Value
from ckpt_tool.convert.source import Source, whole_tensors
from ckpt_tool.convert.tokenizers import entity_spans
from ckpt_tool.convert.vocabularies import Vocabulary as Tokens
from ckpt_tool.convert.weave import Held, Table, Written, to_hf, to_original
from ckpt_tool.errors import Problem, fail, fail_all, printable
from ckpt_tool.records import dataclass

METADATA = "metadata.json"
WEIGHTS, DEEPSPEED = "pytorch_model.bin", "mp_rank_00_model_states.pt"
POSITION_IDS = "embeddings.position_ids"
IGNORED = {r"(luke\.)?embeddings\.position_ids": "0, 1, 2, ..."}
DECODERS = ("lm_head.decoder.weight", "lm_head.decoder.bias", "entity_predictions.decoder.weight")
COPIES = "copies"  # in the manifest: by axis, the rows that were copied
# Of the user, where no file says them: the rows that the added ones start from.
STARTS = ("at_sign_id", "number_sign_id", "entity_mask_id")
DROP_QUERIES = Option(
    "drop_queries", "Leave out the copied query projections of entity-aware attention.", "hf"
)
LINES_OF_ENGLISH = "entity_vocab.tsv"
DROP_COPIES = Option(
    "drop_copies",
    "Leave out rows and projections that were copies, whatever they hold now (lossy).",
    "original",
)
UNLIKE = "--drop-copies leaves out what the original has no place for, and records it"
OPTIONS = (DROP_QUERIES, DROP_COPIES)


@dataclass(frozen=True)
class Encoder:
    """A family that studio-ousia trained. `rows` are those of its tensors, for what `Form` says; `copies` the
    axis of the words and that of the entities, of which both layouts but for the copies have as many."""

    name: str
    title: str
    architecture: str
    config: Mapping[str, Class]
    fields: Mapping[str, Field]
    rows: Callable[[Form], Sequence[Rule]]
    axes: Mapping[str, Size]
    copies: tuple[str, str]
    told_by: str
    layer: str


@dataclass(frozen=True)
class Form:
    """`aware`: entity-aware attention has queries of its own; `copied`: it gets copies of the only ones.
    `projected`: entities are narrower than words. `decoders` are the output layers that the original has
    beside the tables which they share. `head`: the converted model holds its output layer too."""

    aware: bool
    copied: bool
    projected: bool
    decoders: tuple[str, ...]
    head: bool


def family(*, summary: str, **said: Any) -> Family:
    """The record of a family; `said` are the parts of `Encoder`."""
    e = Encoder(**said)
    return Family(
        name=e.name,
        summary=summary,
        architectures=(e.architecture,),
        recognise=partial(recognise, e),
        plan=partial(plan, e),
        plan_original=partial(plan_original, e),
        held=partial(held, e),
        options=OPTIONS,
        vocabulary=Tokens("entity-spans", ("MLukeTokenizer",)),
        classes=e.config,
        tensors=(e.told_by, "entity_embeddings.position_embeddings.weight", f"luke.{e.told_by}"),
        held_as={"lm_head.decoder.bias": "lm_head.bias"},  # of transformers 5, which saves it so too
        document=METADATA,
    )


def recognise(e: Encoder, checkpoint: Checkpoint) -> tuple[bool, str]:
    if e.told_by in checkpoint:
        return True, f"{e.told_by} is of studio-ousia's encoders alone"
    if any(map(str.endswith, checkpoint.names(), repeat(e.told_by))):
        return False, "the tensors have Hugging Face names already"
    return False, f"no {e.told_by}"


# --- the two directions ---------------------------------------------------------------------------------


def plan(e: Encoder, checkpoint: Checkpoint, options: Options) -> Plan:
    own, why = recognise(e, checkpoint)
    if not own:
        fail("unsupported", f"expected {e.title}, found {why}", file=checkpoint.path.name)
    source = whole_tensors(checkpoint, e.layer)
    document, settings, notes = _document(e, checkpoint, options)
    facts = Facts(document, METADATA, settings)
    facts.notes += notes
    known = Known(_with_starts(e), facts, source, options)
    config = known.values()
    tokens = _tokenizer(checkpoint, options)
    entities = checkpoint.documents.get(LINES)
    rows = source.first("entity_embeddings.entity_embeddings.weight")
    vocabulary = None if entities is None or rows is None else Vocabulary(entities, rows.shape[0])
    known.told = _starts(tokens, vocabulary)
    at = _copied(e, known)
    made, more = _documents(known, tokens, vocabulary)
    form = _form(source, options)
    fail_all(_outside(known, at, e))
    kept = {
        "file": next(iter(checkpoint.files)).rpartition("/")[2],
        "decoders": list(form.decoders),
        "position_ids": POSITION_IDS in source.tensors,
        "aware": form.aware,
        COPIES: at,
        **({"metadata": checkpoint.json(METADATA)} if METADATA in checkpoint.documents else {}),
    }
    beside = Written(e.name, config, made, IGNORED, [*facts.notes, *more], kept)
    return to_hf(_table(e, known, form, at, options), source, options, beside)


def plan_original(e: Encoder, checkpoint: Checkpoint, options: Options) -> Plan:
    """The files as studio-ousia's training saves them."""
    ((model_type, own),) = e.config.items()
    facts = read_config(checkpoint, options.settings, (e.architecture,), model_type=model_type, own=own)
    source = whole_tensors(checkpoint, rf"(?:luke\.)?{e.layer}")
    once = kept_facts(checkpoint)
    known = Known(_with_starts(e), facts, source, options, own, once, back=True)
    config = known.values()
    tokens = _tokenizer(checkpoint, options)
    entities = checkpoint.documents.get(OBJECT)
    known.told = _kept_starts(e, once) or _starts(tokens, None if entities is None else special_ids(entities))
    at = _copied(e, known)
    fail_all(_outside(known, at, e))
    form = _form_back(known, once)
    lossy = [f"{DROPPED}: {DROP_COPIES.help}"] if _drops(options) else []
    beside = Written(
        e.name,
        {n: v for n, v in config.items() if n not in ("architectures", "model_type")},
        _documents_back(known, tokens, entities, once),
        IGNORED if not _drops(options) else {**IGNORED, QUERIES: "a copy, asked for with --drop-copies"},
        facts.notes,
        {"facts": {n: known[n] for n in STARTS}},
        lossy=lossy,
    )
    made = to_original(
        _table(e, known, form, at, options),
        source,
        options,
        beside,
        files=[WEIGHTS],
        homes=lambda name: [(WEIGHTS, source.dtype, name)],
    )
    return replace(made, outputs=tuple(_as_saved(f, known, once) for f in made.outputs))


def held(e: Encoder, checkpoint: Checkpoint, options: Options, architecture: str) -> Held:
    """See `Family.held`. Added rows are the model's own here, whichever they were copies of."""
    ((model_type, own),) = e.config.items()
    facts = read_config(checkpoint, options.settings, (architecture,), model_type=model_type, own=own)
    source = whole_tensors(checkpoint, rf"(?:luke\.)?{e.layer}")
    known = Known(_with_starts(e), facts, source, options, own, {}, back=True)
    made = table_of(known, e.rows(replace(_form_back(known, {}), head=True)), e.axes)
    words, entities = e.copies
    return Held(replace(made, copies={words: (0, 0), entities: (0,)}), source, facts, IGNORED)


QUERIES = r"(luke\.)?encoder\.layer\.\d+\.attention\.self\.(w2e|e2w|e2e)_query\.(weight|bias)"


def _drops(options: Options) -> bool:
    return bool(options.family_options.get(DROP_COPIES.name))


def _table(e: Encoder, known: Known, form: Form, at: Mapping[str, Sequence[int]], options: Options) -> Table:
    if known.back and _drops(options):
        form = replace(form, copied=False)
    made = table_of(known, e.rows(form), e.axes)
    return replace(made, copies=at, compared=not _drops(options), unlike=UNLIKE)


# --- facts ----------------------------------------------------------------------------------------------


def _document(
    e: Encoder, checkpoint: Checkpoint, options: Options
) -> tuple[dict[str, Any] | None, dict[str, Any], list[str]]:
    """The configuration in metadata.json, which is a config.json of its time; the user's settings; notes."""
    settings = dict(options.settings)
    if METADATA not in checkpoint.documents:
        return None, settings, [f"{METADATA} is missing; numbers are those of shapes and settings"]
    told = checkpoint.json(METADATA).get("model_config")
    if not isinstance(told, dict):
        fail("bad-config", "expected an object model_config, found none", file=METADATA)
    (own,) = e.config.values()
    return read_keys(told, settings, own, file=METADATA)


def _start(name: str) -> Field:
    """A row that an added one starts from: what the tokenizer or the entities say, or the user."""

    def told(known: Known) -> Value | None:
        return known.told.get(name)

    return replace(token_ids(name, rule=told, silent=told), hidden=True, told=False)


def _with_starts(e: Encoder) -> dict[str, Field]:
    return by_name(e.fields.values(), map(_start, STARTS))


def _copied(e: Encoder, known: Known) -> dict[str, list[int]]:
    """By axis, the rows to copy: of two words, and of an entity. Raises what was collected, with what says
    the rows that nothing says."""
    facts, said = known.facts, [known.value(n) for n in STARTS]
    for name, value in zip(STARTS, said, strict=True):
        if isinstance(value.value, list):
            known.refuse("usage", f"expected one id, found {value.value}", name)
    files = _files_that_say(known.source.checkpoint)
    facts.problems[:] = [
        replace(p, hint=f"{files[p.where]}; so does {p.hint}")
        if p.kind == "missing-fact" and p.where in files
        else p
        for p in facts.problems
    ]
    facts.check_settings({*known.fields})
    facts.check()
    words, entities = e.copies
    return {words: [v.value for v in said[:2]], entities: [said[2].value]}


def _files_that_say(checkpoint: Checkpoint) -> dict[str, str]:
    """By row to start from, the file that says it."""
    tokens = f"{entity_spans.MODEL}, beside the weights or with --tokenizer, says it"
    if LINES_OF_ENGLISH in checkpoint.documents and LINES not in checkpoint.documents:
        whose = f"{LINES_OF_ENGLISH} is LUKE's, the English model"
        tokens = f"{whose}: RoBERTa's vocab.json, which is not read, says it"
        return dict(
            zip(
                STARTS, (tokens, tokens, f"{whose}: its line of {MASK}, counted from 0, says it"), strict=True
            )
        )
    return dict(zip(STARTS, (tokens, tokens, f"{LINES} says it"), strict=True))


def _starts(tokens: Mapping[str, bytes], entities: Vocabulary | Mapping[str, int] | None) -> dict[str, Value]:
    found: dict[str, Value] = {}
    if entity_spans.MODEL in tokens:
        pieces = entity_spans.read(tokens[entity_spans.MODEL], entity_spans.MODEL)
        ids = entity_spans.started_from(pieces, entity_spans.MODEL)
        signs = entity_spans.MARKERS.values()
        for name, id, sign in zip(STARTS, ids, signs, strict=False):
            found[name] = Value(id, f"{entity_spans.MODEL}: {sign}")
    ids_of = entities.ids if isinstance(entities, Vocabulary) else entities or {}
    if MASK in ids_of:
        found[STARTS[2]] = Value(ids_of[MASK], f"the entity {MASK}")
    return found


def _kept_starts(e: Encoder, once: Mapping[str, Any]) -> dict[str, Value]:
    """Those in the manifest of an output of ours; `bad-config` for what it cannot say."""
    held = once.get(COPIES)
    if held is None:
        return {}
    words, entities = e.copies
    rows = [*held.get(words, ()), *held.get(entities, ())] if isinstance(held, dict) else []
    if len(rows) != len(STARTS) or not all(type(r) is int and r >= 0 for r in rows):
        message = f"expected the rows of two words and of an entity, found {json.dumps(held)[:100]}"
        fail("bad-config", message, file="ckpt-tool.json", where=f"original.{COPIES}")
    return {n: Value(r, "ckpt-tool.json: copies") for n, r in zip(STARTS, rows, strict=True)}


def _outside(known: Known, at: Mapping[str, Sequence[int]], e: Encoder) -> list[Problem]:
    """Rows to copy that the tables do not have."""
    fields = dict(zip(e.copies, ("vocab_size", "entity_vocab_size"), strict=True))
    return [
        Problem("config-mismatch", f"expected a row below {most}, found {row}", where=fields[axis])
        for axis, rows in at.items()
        for row in rows
        if row >= (most := known[fields[axis]] - len(rows))
    ]


def drops_queries(options: Options) -> bool:
    return bool(options.family_options.get(DROP_QUERIES.name))


def _form(source: Source, options: Options) -> Form:
    aware = "encoder.layer.0.attention.self.w2e_query.weight" in source.tensors
    return Form(
        aware=aware,
        copied=not aware and not drops_queries(options),
        projected="entity_embeddings.entity_embedding_dense.weight" in source.tensors,
        decoders=tuple(n for n in DECODERS if source.keeps(n, options)),
        head=True,
    )


def _form_back(known: Known, once: Mapping[str, Any]) -> Form:
    """Without a manifest queries that config.json has attention for are the model's own."""
    names = known.source.tensors
    queries = "luke.encoder.layer.0.attention.self.w2e_query.weight" in names
    aware = queries and bool(once.get("aware", known["use_entity_aware_attention"]))
    held = once.get("decoders", list(DECODERS))
    return Form(
        aware=aware,
        copied=queries and not aware,
        projected="luke.entity_embeddings.entity_embedding_dense.weight" in names,
        decoders=tuple(n for n in DECODERS if isinstance(held, list) and n in held),
        head=False,
    )


# --- files ----------------------------------------------------------------------------------------------


def _tokenizer(checkpoint: Checkpoint, options: Options) -> dict[str, bytes]:
    def of_file(path: Path) -> dict[str, Path]:
        return {entity_spans.MODEL: path}

    return files_beside_or_asked(checkpoint, options, lambda name: name == entity_spans.MODEL, of_file)


def _documents(
    known: Known, tokens: Mapping[str, bytes], vocabulary: Vocabulary | None
) -> tuple[list[OutputDocument], list[str]]:
    """The tokenizer's files, with notes."""
    made, notes = [], []
    table = known.source.size("embeddings.word_embeddings.weight", 0)
    words = known["vocab_size"] - len(entity_spans.MARKERS) if table is None else table.value
    if entity_spans.MODEL in tokens:
        data = tokens[entity_spans.MODEL]
        ids = entity_spans.size_of(entity_spans.read(data, entity_spans.MODEL))
        if ids != words:
            message = f"expected a model of {words} ids, one for each row of the embedding, found {ids}"
            hint = "--tokenizer PATH gives the one of these weights"
            fail("bad-tokenizer", message, file=entity_spans.MODEL, hint=hint)
        length = known["max_position_embeddings"] - 2
        said = "the tokenizer given or beside the weights"
        made = [OutputDocument(n, b, said) for n, b in entity_spans.documents(data, words, length).items()]
        notes += [*_of_another(known), entity_spans.OTHERWISE]
    else:
        notes.append(f"no {entity_spans.MODEL} was given or is beside the weights; no tokenizer was written")
    if vocabulary is not None:
        made.append(OutputDocument(OBJECT, vocabulary.content, LINES))
    elif LINES_OF_ENGLISH in known.source.checkpoint.documents:
        notes.append(
            f"{LINES_OF_ENGLISH} is that of the English models (a title, a tab, a count), which is not read; "
            f"no {OBJECT} was written: that of a published model is in its Hugging Face folder"
        )
    else:
        notes.append(f"no {LINES} is beside the weights; no {OBJECT} was written")
    return made, notes


def _of_another(known: Known) -> Iterator[str]:
    """A note where metadata.json names a model whose words are not XLM-R's."""
    around = known.source.checkpoint.json(METADATA) if METADATA in known.source.checkpoint.documents else {}
    began = around.get("model_config", {}).get("bert_model_name")
    if isinstance(began, str) and "xlm-r" not in began.lower():
        yield (
            f"{METADATA}: bert_model_name is {printable(began, 60)}, whose words are not XLM-R's; "
            f"{entity_spans.MODEL} is taken as theirs because it has an id for each row of the embedding"
        )


def _documents_back(
    known: Known, tokens: Mapping[str, bytes], entities: Document | None, once: Mapping[str, Any]
) -> list[OutputDocument]:
    """metadata.json with what the original had around the configuration, the entities, and the tokenizer,
    which an original has elsewhere."""
    kept = once.get("metadata")
    around = dict(kept) if isinstance(kept, dict) else {}
    inner = around.get("model_config")
    said = {
        n: known[n]
        for n, f in known.fields.items()
        if not f.hidden and n not in ("architectures", "torch_dtype")
    }
    said["vocab_size"] -= len(entity_spans.MARKERS)
    said["entity_vocab_size"] -= 1
    model = {**said, **(inner if isinstance(inner, dict) else {})}
    model |= {
        n: v for n, v in said.items() if n in model and n not in ("model_type", "use_entity_aware_attention")
    }
    text = json.dumps({**around, "model_config": model}, indent=2) + "\n"
    made = [OutputDocument(METADATA, text.encode(), "the values of config.json")]
    if entities is not None:
        made.append(OutputDocument(LINES, written_back(pieces(entities)), OBJECT))
    return made + [OutputDocument(n, data, "the tokenizer in the folder") for n, data in tokens.items()]


def _as_saved(file: OutputFile, known: Known, once: Mapping[str, Any]) -> OutputFile:
    """`file` with what stands around its tensors, where DeepSpeed saved them, and position_ids."""
    length = known["max_position_embeddings"]
    numbers = struct.pack(f"<{length}q", *range(length))
    constants = ((POSITION_IDS, "I64", (1, length), numbers),) if once.get("position_ids", True) else ()
    return replace(file, dicts=("module",) if once.get("file") == DEEPSPEED else (), constants=constants)
