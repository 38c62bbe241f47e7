"""From a family's rows to a checked plan, in either direction: the only place where rows are filled in.

Both directions walk the same way. The rows are filled in with the layers and ranks of the checkpoint; the
config's numbers are held against the shapes in its headers; padding and pooled heads are worked in; and the
plan is put together, with every problem of the stage raised at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.copies import apart, with_copies
from ckpt_tool.convert.crosscheck import disagreements
from ckpt_tool.convert.expanding import Column, Columns, Expansion, expand
from ckpt_tool.convert.facts_classes import Class
from ckpt_tool.convert.facts_problems import misread
from ckpt_tool.convert.heads import pooled
from ckpt_tool.convert.layout import (
    Home,
    Part,
    Rule,
    Step,
    with_padding,
    without_padding,
)
from ckpt_tool.convert.params import SET, Facts
from ckpt_tool.convert.plan import (
    Foretold,
    Options,
    OutputDocument,
    Plan,
    Turns,
    Value,
    assemble,
    config_document,
)
from ckpt_tool.convert.quantised import (
    ALONE,
    FP8_ROWS,
    FP8_TENSOR,
    QSCALE,
    TRANSFORMERS,
    Inventory,
    QuantFormat,
)
from ckpt_tool.convert.quantised_asked import WAY_OUT, carried_words, check_asked, lossy_words
from ckpt_tool.convert.quantised_config import KEY, OF_MODELOPT, for_transformers
from ckpt_tool.convert.quantised_steps import of_all_parts, physical
from ckpt_tool.convert.quantised_view import carried_of, names_of_codes, packing_beside, quantised_of
from ckpt_tool.convert.source import CODES, Source
from ckpt_tool.convert.steps import Steps
from ckpt_tool.convert.widths import CASTABLE
from ckpt_tool.errors import Problem, fail_all
from ckpt_tool.records import dataclass

TIES = "--set tie_word_embeddings=true if the output layer is the embedding"
BYTES = ("U8",)  # of packed codes
WORDS = "v"  # the axis of every table that a vocabulary's padding lengthens


@dataclass(frozen=True)
class Table:
    """A family's rows and what fills them in. `axes` has the size of every axis, `fields` the config value
    behind some of them, `numbers` these values with their sources. `words` counts the rows of a vocabulary
    that are no padding, None where there is none; `indices` other indices than the layer's. `repeats` are
    tensors of the converted model, each with that whose values it must have. `turns` is what its
    rotary frequencies are made of. `head` is what the checkpoint
    calls its output layer where the user may say whether it is the embedding. `copies` are the rows of an
    axis that converted tensors repeat after the last; the way back compares them unless `compared` is false,
    and `unlike` says what to do where they differ. `packed` is how names end of tensors that hold bytes of
    codes, and not numbers."""

    rows: Sequence[Rule]
    axes: Mapping[str, int]
    fields: Mapping[str, str]
    numbers: Mapping[str, Value]
    layers: Value
    words: int | None = None
    indices: Mapping[str, int] = field(default_factory=dict)
    repeats: Mapping[str, str] = field(default_factory=dict)
    turns: Turns | None = None
    head: str = ""
    copies: Mapping[str, Sequence[int]] = field(default_factory=dict)
    compared: bool = True
    unlike: str = ""
    packed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """What goes beside the tensors of a plan. `ignored` are patterns of tensors to leave out, with reasons;
    `original` is what the manifest keeps for another conversion, `unread` a pattern of the names of tensors
    that no pass reads."""

    family: str
    config: Mapping[str, Value]
    documents: Sequence[OutputDocument]
    ignored: Mapping[str, str]
    notes: Sequence[str] = ()
    original: Mapping[str, Any] = field(default_factory=dict)
    foretold: Sequence[Foretold] = ()
    unread: str = ""
    spelled: Callable[[Mapping[str, Value]], OutputDocument] = config_document  # config.json
    lossy: Sequence[str] = ()
    # how an original calls the tensors of fp8 weights with one scale each, where its loaders know those
    quantised: QuantFormat | None = None
    keeps_codes: bool = False  # an original in the Hugging Face layout has codes and scales as that has them


@dataclass(frozen=True)
class Held:
    """A model that is in the Hugging Face layout already, as its family reads it: the rows, its tensors by
    the names of the rows, what config.json says, and patterns of tensors that may be left out, with
    reasons."""

    table: Table
    source: Source
    facts: Facts
    ignored: Mapping[str, str] = field(default_factory=dict)


def to_hf(table: Table, source: Source, options: Options, written: Written) -> Plan:
    """The plan of a conversion to the Hugging Face layout. config.json is written from the config and need
    not be among the documents."""
    dtype = source.dtype
    if (own := _class_of(written)) is not None:
        fail_all(misread_config(written.config, own))
    filled = _filled_in(
        table,
        source,
        "sources",
        original=source.homes,
        converted=lambda _: ("", dtype),
        originals=source.column,
        converteds=lambda names: ([("", dtype)] * len(names), names),
        again=(lambda part: source.copies.get((part.file, part.name), ())) if source.copies else None,
        options=options,
    )
    if (words := table.words) is not None:
        filled.steps = filled.steps.changed(
            lambda s: without_padding(s, WORDS, words), where=lambda s: WORDS in s.sizes
        )
    config, lossy = written.config, lossy_words(source.checkpoint, options)
    check_asked(source.checkpoint, options)
    if options.gqa is not None:
        fewer = pooled(filled.steps, options.gqa, table.numbers, ranks=source.ranks)
        filled.steps = fewer.steps
        config = {**config, "num_key_value_heads": fewer.heads}
        lossy = [*lossy, fewer.lossy]
    _take_apart(filled, source.checkpoint, "sources")
    config = {**config, **_packing(config, filled.steps, source.checkpoint, own)}
    return _assembled(
        family=written.family,
        direction="to-hf",
        checkpoint=source.checkpoint,
        expansion=filled,
        ignored=written.ignored,
        config=config,
        documents=[written.spelled(config), *written.documents],
        options=options,
        notes=[*written.notes, *carried_words(source.checkpoint)],
        lossy=lossy,
        original=written.original,
        foretold=written.foretold,
        turns=table.turns,
        unread=written.unread,
    )


def held_steps(held: Held, options: Options) -> Expansion:
    """The rows filled in for a model that is in the Hugging Face layout: the targets of the steps are its
    tensors as the table has them, whatever an original would hold. A `missing-tensor` problem for each that
    is not there; raises numbers of config.json that the shapes contradict, but for what no original could
    say, which is none of this layout's matter."""
    fail_all(dict.fromkeys(p for p in held.facts.problems if p.kind != "unsupported"))
    table, source = held.table, held.source
    return _filled_in(
        table,
        source,
        "targets",
        original=lambda _: [("", source.dtype)],
        converted=lambda name: next(iter(source.homes(name)), None),
        originals=lambda names: ([("", source.dtype)] * len(names), names),
        converteds=source.column,
        again=None,
        options=options,
    )


def as_it_is(
    checkpoint: Checkpoint,
    filled: Expansion,
    compared: Iterable[Step],
    options: Options,
    written: Written,
    turns: Turns | None,
) -> Plan:
    """The plan of a model that keeps its layout: `filled` moves its tensors as they are. The config.json is
    among the documents."""
    check_asked(checkpoint, options)
    inventory = carried_of(checkpoint)
    if inventory is not None and KEY not in written.config:
        _must_be_said(inventory, written=False)
    _take_apart(filled, checkpoint, "sources")
    same = Expansion(Steps(compared))
    _take_apart(same, checkpoint, "sources")
    filled.problems += same.problems
    return _assembled(
        family=written.family,
        direction="to-hf",
        checkpoint=checkpoint,
        expansion=filled,
        compared=same.steps,
        ignored=written.ignored,
        config=written.config,
        documents=written.documents,
        options=options,
        notes=[*written.notes, *carried_words(checkpoint)],
        lossy=lossy_words(checkpoint, options),
        original=written.original,
        turns=turns,
        unread=written.unread,
    )


def _assembled(*, checkpoint: Checkpoint, **said: Any) -> Plan:
    """`assemble` of what stands in the files, with what is quantised in them."""
    made = assemble(checkpoint=physical(checkpoint), **said)
    return replace(made, quantised=quantised_of(checkpoint))


def _class_of(written: Written) -> Class | None:
    """The class that reads the config: one of the family's own, so that no other family is imported."""
    from ckpt_tool.convert.families import family  # which imports this module's parts

    said = written.config.get("model_type")
    return None if said is None else family(written.family).classes.get(said.value)


def misread_config(config: Mapping[str, Value], own: Class) -> list[Problem]:
    """What the class `own` would not read in a config.json as it is to be written."""
    given = {k for k, v in config.items() if v.source.startswith(SET)}
    return list(misread({k: v.value for k, v in config.items()}, own, given))


def to_original(
    table: Table,
    source: Source,
    options: Options,
    written: Written,
    *,
    files: Sequence[str],
    homes: Callable[[str], Sequence[Home]],
    again: Callable[[Part], Sequence[Home]] | None = None,
) -> Plan:
    """The plan of the way back. `source` is the converted model, `files` are the weight files to write in
    order, and `homes(name)` says which of them hold the tensor of that name in the table, for each rank;
    `again(part)` where else the same part of it is written."""

    check_asked(source.checkpoint, options)
    filled = _filled_in(
        table,
        source,
        "targets",
        original=homes,
        converted=source.home,
        originals=lambda names: _in_one_file(map(homes, names), names),
        converteds=source.column,
        again=again,
        options=options,
    )
    if (words := table.words) is not None:
        filled.steps = filled.steps.changed(
            lambda s: with_padding(s.inverse(), WORDS, words).inverse(), where=lambda s: WORDS in s.sizes
        )
    parts = filled.steps.changed(
        lambda s: apart(s, compared=table.compared), where=lambda s: any(p.taken for p in s.sources)
    )
    filled.steps = parts.alike(lambda s: replace(s, hint=table.unlike) if s.copied else s)
    repeated = list(_repeated(filled.steps, table, source))
    fail_all(_no_place(source.checkpoint, files, written))
    form = None if written.keeps_codes else written.quantised
    _take_apart(filled, source.checkpoint, "targets", form)
    return _assembled(
        family=written.family,
        direction="to-original",
        checkpoint=source.checkpoint,
        expansion=filled,
        compared=repeated,
        ignored=written.ignored,
        config=written.config,
        documents=written.documents,
        options=options,
        outputs=files,
        notes=[*written.notes, *carried_words(source.checkpoint)],
        lossy=[*written.lossy, *lossy_words(source.checkpoint, options)],
        original=written.original,
        foretold=written.foretold,
        turns=table.turns,
        unread=written.unread,
    )


def _in_one_file(homes: Iterable[Sequence[Home]], names: Sequence[str]) -> Column | None:
    """The places of tensors that are in one file each; None where they are in several."""
    found = list(homes)
    if any(len(own) != 1 for own in found):
        return None
    called = [own[0][2] if len(own[0]) > 2 else name for own, name in zip(found, names, strict=True)]
    return [(file, dtype) for ((file, dtype, *_),) in found], called


def _filled_in(
    table: Table,
    source: Source,
    side: str,
    *,
    original: Callable[[str], Sequence[Home]],
    converted: Callable[[str], Home | None],
    originals: Columns,
    converteds: Columns,
    again: Callable[[Part], Sequence[Home]] | None,
    options: Options,
) -> Expansion:
    """The rows with every index filled in. `side` is that of the steps which the checkpoint holds. Numbers
    that no tensor confirms are raised at once: what else would be said follows from them."""
    filled = expand(
        table.rows,
        axes=table.axes,
        indices={"i": table.layers.value, **table.indices},
        original=original,
        converted=converted,
        originals=originals,
        converteds=converteds,
    )
    if again is not None:
        filled.steps.extend([copy for step in filled.steps for copy in _copies(step, again)])
    for axis, rows in table.copies.items():
        filled.steps = _with_copies(filled.steps, axis, table.axes[axis], rows)
    _with_hints(filled, table)
    more = source.kept_layers(options) > table.layers.value  # what is left out is no layer too many
    layers = layer_problems(table.layers, source.layers) if more or source.layers < table.layers.value else []
    odd = disagreements(filled.steps, source.checkpoint, table.fields, side=side)
    if odd:
        fail_all([*layers, *(d.problem(table.numbers) for d in odd)])
    filled.problems[:0] = [*layers, *_dtype_problems(filled.steps, side, table.packed, source.checkpoint)]
    return filled


def _with_copies(steps: Steps, axis: str, held: int, rows: Sequence[int]) -> Steps:
    return steps.changed(lambda s: with_copies(s, axis, held, rows), where=lambda s: axis in s.sizes)


def _copies(step: Step, again: Callable[[Part], Sequence[Home]]) -> Iterator[Step]:
    """The same step for each further place of its parts, compared; one that has fewer stays where it is."""
    others = [again(part) for part in step.sources]
    for k in range(max(map(len, others), default=0)):
        parts = [
            _elsewhere(part, *places[k]) if k < len(places) else part
            for part, places in zip(step.sources, others, strict=True)
        ]
        yield replace(step, sources=tuple(parts), compare=step.compare or "replicated")


def _elsewhere(part: Part, file: str, dtype: str, *name: str) -> Part:
    return replace(part, file=file, dtype=dtype, name=name[0] if name else part.name)


def _repeated(steps: Steps, table: Table, source: Source) -> Iterator[Step]:
    """Steps that compare each of `Table.repeats` with what the tensor that it repeats becomes."""
    for name, other in table.repeats.items():
        others = {t.name for t in source.tensors.get(other, ())}
        (there,) = source.tensors[name]
        made = [s for s in steps if all(p.name in others for p in s.targets)]
        for step in [s for s in made if s.copied] + made[:1]:  # none: said to be missing
            parts = [replace(p, file=there.file, name=there.name, dtype=there.dtype) for p in step.targets]
            hint = _way_out(table, there.name)
            yield replace(step.inverse(), sources=tuple(parts), compare="tied", hint=hint)


def _way_out(table: Table, name: str) -> str:
    """What the user may do where a tensor that should repeat another does not."""
    drop = f"--drop {name} uses the embedding"
    return f"--set tie_word_embeddings=false keeps both; {drop}" if table.head else drop


def _with_hints(filled: Expansion, table: Table) -> None:
    filled.steps = filled.steps.changed(
        lambda s: replace(s, hint=_way_out(table, s.sources[0].name)), where=lambda s: s.compare == "tied"
    )
    filled.problems[:] = [
        replace(p, hint=TIES) if table.head and p.where == table.head and p.hint is None else p
        for p in filled.problems
    ]


def layer_problems(layers: Value, found: int) -> list[Problem]:
    if layers.value == found:
        return []
    fewer = layers.value < found
    left = f"{layers.value}..{found - 1}" if found - layers.value > 1 else str(layers.value)
    which = f"{found}: layer {left} left over" if fewer else f"{found}"
    these = "all of them are the model's" if fewer else "those are all; else get the rest of the model"
    return [
        Problem(
            "uncovered-tensors" if fewer else "missing-tensor",
            f"expected {layers.value} layers ({layers.source}), found tensors of {which}",
            where="num_hidden_layers",
            hint=f"--set num_hidden_layers={found} if {these}" if found else None,
        )
    ]


def _take_apart(
    filled: Expansion, checkpoint: Checkpoint, side: str, form: QuantFormat | None = None
) -> None:
    """Quantised weights as the tensors that they are made of; raises what stands in the way."""
    filled.steps, problems = of_all_parts(filled.steps, checkpoint, side, form)
    if problems:  # at once: of tensors that are left as they are, more would be said than is true
        fail_all([*filled.problems, *problems])


def _packing(
    config: Mapping[str, Value], steps: Steps, checkpoint: Checkpoint, own: Class | None
) -> dict[str, Value]:
    """What config.json says of carried weights, where the original's own documents say it otherwise."""
    inventory = carried_of(checkpoint)
    if inventory is None or KEY in config:
        return {}
    if beside := packing_beside(checkpoint):
        return {KEY: Value(beside[KEY], OF_MODELOPT)}
    _must_be_said(inventory)
    names = [p.name for s in steps for p in s.targets]
    return {KEY: for_transformers(inventory, names if own is None else [own.in_memory(n) for n in names])}


def _must_be_said(inventory: Inventory, *, written: bool = True) -> None:
    """Codes under names whose loaders look for nothing of the kind unless config.json says so; `written` says
    that it is made here (`for_transformers`), and not what it was."""
    first = next(iter(inventory.weights.values()))
    known = written and first.form in (QSCALE, TRANSFORMERS)
    if inventory.scheme.said or first.form.own_rows or known:
        return
    message = (
        f"expected {KEY} beside codes and scales ({first.words}), by which loaders know them, found none"
    )
    hint = f"--set {KEY}='{{...}}', as the release says it"
    fail_all([Problem("missing-fact", message, "config.json", KEY, hint)])


def _no_place(checkpoint: Checkpoint, files: Sequence[str], written: Written) -> Iterator[Problem]:
    """Originals in which no loader looks for codes and scales, of this format or at all."""
    inventory = carried_of(checkpoint)
    weights = [] if inventory is None else [w for w in inventory.weights.values() if not w.form.own_rows]
    known = written.quantised is not None and all(w.kind in (FP8_TENSOR, FP8_ROWS) for w in weights)
    fits = (written.keeps_codes or known) and all(f.endswith(".safetensors") for f in files)
    if inventory is not None and weights and not fits:
        found = f"found codes and scales ({', '.join(inventory.words)})"
        eight = written.quantised is not None and files[0].endswith(".safetensors")
        some = "or fp8 with a scale for each tensor or each row, " if eight else ""
        message = f"expected numbers, {some}which the loaders of {files[0]} know, {found}"
        other = "--container safetensors keeps them; " if written.keeps_codes or known else ""
        yield Problem("unsupported", message, checkpoint.path.name, hint=other + WAY_OUT)


def _dtype_problems(
    steps: Steps, side: str, packed: tuple[str, ...], checkpoint: Checkpoint
) -> list[Problem]:
    """Tensors of the checkpoint that hold no floating numbers, or that are packed to 8 bits where neither the
    table says so nor scales stand beside them; a scalar may count something."""
    names = names_of_codes(checkpoint)

    def wanted(part: Part) -> Sequence[str]:
        return BYTES if packed and part.name.endswith(packed) else CASTABLE

    def odd(step: Step) -> list[Part]:
        parts = step.sources if side == "sources" else step.targets
        return [p for p in parts if p.dtype not in wanted(p) and p.dims]

    def unlike(step: Step) -> bool:  # of a template, which has no names
        parts = step.sources if side == "sources" else step.targets
        return any(p.dtype not in CASTABLE or packed for p in parts)

    parts = dict.fromkeys(p for s in steps.where(unlike) for p in odd(s))
    return [
        Problem(
            "unsupported-dtype",
            f"expected {', '.join(wanted(p))}, found {p.dtype}",
            p.file,
            p.name,
            ALONE if p.dtype in CODES else None,
        )
        for p in parts
        if p.name not in names
    ]
