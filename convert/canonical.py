"""A model that is in the Hugging Face layout already, made canonical: safetensors with the names that its
class writes, in the order of the family's rows, and everything else as it lies there.

Which tensors there must be, and of which shape, the family's rows say, read at their Hugging Face side; so
there is no other table of names. A class may have another head than the family's own: what a head is called
is below, its tensors are carried as they are, and those that the family's own class would have instead are
not asked for. Files and containers do not matter: a tensor is found by its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import compress, groupby, repeat
from operator import ne
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint, Renamed, TensorFile, TensorInfo
from ckpt_tool.convert.canonical_files import config_of, files_beside
from ckpt_tool.convert.expanding import Expansion
from ckpt_tool.convert.facts import class_of, classes
from ckpt_tool.convert.facts_classes import Class
from ckpt_tool.convert.facts_rotary import OBJECTS as ROPES
from ckpt_tool.convert.facts_rotary import ROTARY
from ckpt_tool.convert.families import FAMILIES, Family, family
from ckpt_tool.convert.kept import HUGGING_FACE, LAYOUT, read_manifest
from ckpt_tool.convert.layout import Part, Step
from ckpt_tool.convert.options import given
from ckpt_tool.convert.plan import Options, Plan, natural
from ckpt_tool.convert.quantised import ALONE
from ckpt_tool.convert.quantised_config import KEY
from ckpt_tool.convert.quantised_view import carried_of, with_packing
from ckpt_tool.convert.source import CODES
from ckpt_tool.convert.steps import Steps
from ckpt_tool.convert.weave import Held, Written, as_it_is, held_steps
from ckpt_tool.convert.widths import CASTABLE
from ckpt_tool.errors import CkptToolError, Problem, fail_all
from ckpt_tool.records import dataclass

# How the tensors of a head begin, by the end of the class's name; of several one kind is there. What a class
# has beside that of its family is in `Class.heads`.
HEADS: Mapping[str, tuple[str, ...]] = {
    "LMHeadModel": ("lm_head.",),
    "DoubleHeadsModel": ("multiple_choice_head.", "lm_head."),
    "ForCausalLM": ("lm_head.", "embed_out.", "cls.predictions.", "dense."),
    "ForMaskedLM": ("lm_head.", "cls.predictions.", "mlm_head.", "dense.", "entity_predictions."),
    "ForPreTraining": ("cls.",),
    "ForNextSentencePrediction": ("cls.seq_relationship.",),
    "ForSequenceClassification": ("score.", "classifier."),
    "ForTokenClassification": ("score.", "classifier."),
    "ForMultipleChoice": ("classifier.",),
    "ForQuestionAnswering": ("qa_outputs.",),
    "ForEntityClassification": ("classifier.",),
    "ForEntityPairClassification": ("classifier.",),
    "ForEntitySpanClassification": ("classifier.",),
    "ForConditionalGeneration": ("language_model.lm_head.", "vision_tower.", "multi_modal_projector."),
}
SEEING = "ForConditionalGeneration"  # the text model with what reads images beside it
ANY_HEAD = tuple(sorted({start for starts in HEADS.values() for start in starts}))
# Whose last matrix has a row for each label of config.json, and what that is called.
LABELLED = re.compile(
    r"For(Sequence|Token|Entity\w*)Classification$"
    r"|(Canine|GPTJ|Luke|MegatronBert|MobileBert)ForQuestionAnswering$"
)
ANSWERING = "ForQuestionAnswering"  # two rows, begin and end, in the classes above as many as labels
LAST = re.compile(r"(score|classifier|classifier\.out_proj|qa_outputs)\.weight")
# Whose last matrix reads more than one position, and which have no bias.
WIDTHS = ("hidden_size", "n_embd")
WIDER = {"ForEntityPairClassification": 2, "ForEntitySpanClassification": 3}
UNBIASED = (("ForSequenceClassification", "score"), ("ForEntityPairClassification", "classifier"))
# Whose logits are of the pooler's vector.
POOLED = re.compile(
    r"(Canine|Luke|MegatronBert|MobileBert)For(SequenceClassification|MultipleChoice|NextSentencePrediction|"
    r"PreTraining)"
)
POOLING = re.compile(r"(Canine|Luke|MegatronBert|MobileBert)Model")
POOLERS = re.compile(r"Canine|Luke|Mega(tronBert)?|MobileBert")  # whose classes may have a pooler
UNPOOLED = ("ForCausalLM", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering")
# What decoders call themselves below this head, whatever their other classes do.
IN_ANSWERING = "transformer."
# What says in config.json that projections have biases, and their names; a family may have no rows for them.
BIASED = {"attention_bias": r".*\.(self_attn|attention)\..*\.bias", "mlp_bias": r".*\.mlp\..*\.bias"}
# What says there that modules have none, which a family's rows have: the large models
# of Galactica are OPTs like that (huggingface/transformers#20390).
DENIED = {
    "enable_bias": r".*\.(self_attn\.\w+|fc[12])\.bias",
    "layer_norm_elementwise_affine": r".*layer_norm\.(weight|bias)",
}

OLD_NORM = re.compile(r"(?P<stem>.*LayerNorm)\.(?P<kind>gamma|beta)")
NEW_NORM = {"gamma": "weight", "beta": "bias"}
OLD_NORMS = tuple(f"LayerNorm.{kind}" for kind in NEW_NORM)
# Tables that old releases kept among the weights, unless rows ask for them.
TABLES: Mapping[str, str] = {
    r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)": "recomputed from rope_theta",
    r"(.*\.)?attn\.embed_positions": "recomputed: sines and cosines of positions",
    r"(.*\.)?(attn|attention)\.(bias|causal_mask)": "the causal mask",
    r"(.*\.)?(attn|attention)\.masked_bias": "what masked scores are set to",
    r"(.*\.)?embeddings\.position_ids": "0, 1, 2, ...",
}


@dataclass(frozen=True)
class Spelling:
    """How a class calls its tensors. `family` gives for each name that stands in the files that of the
    family's rows, `written` what the class writes for a name of the rows."""

    architecture: str
    prefix: str
    own: str  # the prefix that this class writes
    family: Mapping[str, str]
    kind: Class

    def written(self, name: str) -> str:
        return self.own + name.removeprefix(self.prefix) if name.startswith(self.prefix) else name


def kind_of(checkpoint: Checkpoint) -> str | None:
    """The model_type of a Hugging Face folder whose tensors have the names of a class that is known here."""
    if "config.json" not in checkpoint.documents:
        return None
    try:
        config = checkpoint.json("config.json")
    except CkptToolError:
        return None  # whoever reads it says why
    kind = class_of(config)
    if kind is None or _found_prefix(classes()[kind], checkpoint.names()) is None:
        return None
    return kind


def named_so(checkpoint: Checkpoint) -> bool:
    """Whether the tensors have the names of some class, whatever says which."""
    return any(_found_prefix(c, checkpoint.names()) is not None for c in classes().values())


def whose(checkpoint: Checkpoint) -> str | None:
    """The family of such a folder."""
    kind = kind_of(checkpoint)
    return None if kind is None else next((n for n in FAMILIES if kind in family(n).classes), None)


def is_one(checkpoint: Checkpoint, chosen: Family) -> bool:
    """Whether `chosen` takes it as it is, in the Hugging Face layout, and not as an original of its own:
    originals of some families are published in that layout."""
    if kind_of(checkpoint) not in chosen.classes:
        return False
    if not chosen.recognise(checkpoint)[0]:
        return True
    config = checkpoint.json("config.json")
    said = config.get("architectures")
    if chosen.published:
        return isinstance(said, list) and not set(map(str, said)) & {*chosen.architectures}
    alone = f"{classes()[str(class_of(config))].name.removesuffix('Config')}Model"
    return said == [alone] and chosen.document not in checkpoint.documents  # whose names an original may have


def plan(checkpoint: Checkpoint, chosen: Family, options: Options) -> Plan:
    """What converting a folder of `chosen` to the Hugging Face layout does: an original's plan, or that of
    `canonical` where it has that layout already."""
    _check_class(checkpoint, chosen)
    if isinstance(
        said := options.settings.get("architectures"), str
    ):  # --set has one name, config.json a list
        options = replace(options, settings={**options.settings, "architectures": [said]})
    if is_one(checkpoint, chosen):
        return canonical(checkpoint, chosen, options)
    return chosen.plan(checkpoint, options)


def _check_class(checkpoint: Checkpoint, chosen: Family) -> None:
    """Fail with `bad-config` where config.json names no class and the tensors are of a head that is not
    the family's own: classes that share a head's names compute other numbers."""
    kind = kind_of(checkpoint)
    if kind is None or kind not in chosen.classes or checkpoint.json("config.json").get("architectures"):
        return
    names, own = checkpoint.names(), {s for a in chosen.architectures for s in _starts(a)}
    if any(n.startswith(tuple(own)) for n in names):
        return
    stem = chosen.classes[kind].name.removesuffix("Config")
    ends = chosen.classes[kind].heads
    begun = {end: tuple(f"{m}." for m in modules) or HEADS[end] for end, modules in ends.items()}
    fitting = [f"{stem}{end}" for end, starts in begun.items() if any(n.startswith(starts) for n in names)]
    if fitting:
        told = f"found none, and tensors of the head of {' or '.join(fitting)}"
        hint = f"--set architectures={fitting[0]} says that it is of that class"
        fail_all([Problem("bad-config", f"expected one class, {told}", "config.json", "architectures", hint)])


def canonical(checkpoint: Checkpoint, chosen: Family, options: Options) -> Plan:
    """See the module docstring; `checkpoint` has Hugging Face names. Kinds: those of any plan; `usage` for
    options that shape what an original becomes."""
    _refuse_options(options)
    _, settings = with_packing(checkpoint, {}, options.settings)
    options = replace(options, settings=settings)
    spelling = _spelling(checkpoint, chosen)
    seen = _renamed(checkpoint, spelling.family)
    own = replace(options, drop=tuple(spelling.family.get(name, name) for name in options.drop))
    held = chosen.held(seen, own, spelling.architecture)
    _check_settings(held, checkpoint.json("config.json"), spelling.kind)
    filled = held_steps(held, own)
    expected = {n: p for n, p in _expected(filled).items() if _has(n, spelling)}
    there = {name: held for held, name in spelling.family.items()}
    fail_all(_biases(expected, held, chosen, spelling.kind))
    filled.problems[:] = [p for p in filled.problems if not _of_another_head(p, seen, spelling)]
    denied = _denied(held, spelling.kind)
    fail_all(_there_all_the_same(expected, denied, chosen))
    filled.problems[:] = [p for p in filled.problems if not (p.kind == "missing-tensor" and denied(p.where))]
    copies = dict(_copies(filled, seen, held, spelling))
    repeats = held.table.repeats.items()
    tied = {n: to for n, to in repeats if n not in expected and held.source.keeps(n, own)}
    left = [t for t in seen if t.name not in expected and t.name not in tied and t.name not in own.drop]
    heads = sorted((t for t in left if _is_of_head(t.name, spelling)), key=lambda t: natural(t.name))
    filled.problems += _head_problems(spelling, held, [*expected, *(t.name for t in heads)], heads)
    filled.steps = _moved(expected, there, spelling)
    filled.steps.extend(_kept(_whole(t), there, spelling) for t in heads)
    filled.steps.extend(_copy(_whole(t), name, there, spelling) for name, t in copies.items())
    compared = [_compared(seen, name, to, held, there, spelling) for name, to in tied.items()]
    written = _written(checkpoint, chosen, options, held, spelling)
    reasons = _reasons(held, (t.name for t in left), there)
    notes = [*written.notes, *(f"{n} is written again, as a copy of {t.name}" for n, t in copies.items())]
    if POOLING.fullmatch(spelling.architecture) and not any(".pooler." in n for n in expected):
        notes.append(f"no pooler: {spelling.architecture} makes up a pooler_output of its own on loading")
    written = replace(written, ignored=reasons, notes=notes)
    return as_it_is(checkpoint, filled, compared, options, written, held.table.turns)


def _refuse_options(options: Options) -> None:
    """What asks for another model, or for a choice between ways of making one of an original."""
    fail_all(
        Problem("usage", "expected an original, found a model in the Hugging Face layout", where=f"--{flag}")
        for flag in sorted(k.replace("_", "-") for k in given(options))
    )
    if "architecture" in options.family_options:
        fail_all([Problem("usage", "expected --to hf for what has that layout already", where="--to")])


def _biases(expected: Iterable[str], held: Held, chosen: Family, own: Class) -> Iterator[Problem]:
    """Tensors that config.json says there are and no row of the family has: without them, as --drop would
    have it, it would be another model."""
    said = {**(held.facts.document or {}), **held.facts.settings}
    for key in sorted(BIASED.keys() & own.numbers.keys()):
        if said.get(key) is True and not any(re.fullmatch(BIASED[key], name) for name in expected):
            message = f"expected false, as {chosen.name} is read without biases there, found true"
            hint = "transformers itself writes such a model as safetensors: from_pretrained, save_pretrained"
            yield Problem("unsupported", message, "config.json", key, hint)


def _denied(held: Held, own: Class) -> Callable[[str | None], str | None]:
    """By a tensor's name the key of config.json by which its class makes no such tensor; None by none."""
    said = {**(held.facts.document or {}), **held.facts.settings}
    keys = [k for k in DENIED if k in own.numbers and said.get(k) is False]
    return lambda name: next((k for k in keys if re.fullmatch(DENIED[k], name or "")), None)


def _there_all_the_same(
    names: Iterable[str], denied: Callable[[str | None], str | None], chosen: Family
) -> Iterator[Problem]:
    """Tensors that config.json says there are not: loaders would leave them out."""
    found: dict[str, str] = {}
    for name in names:
        if (key := denied(name)) is not None:
            found.setdefault(key, name)
    for key, name in found.items():
        message = (
            f"expected true, as {chosen.name} has {name} here, found false, with which loaders leave it out"
        )
        hint = f"--set {key}=true if the file is wrong"
        yield Problem("config-mismatch", message, "config.json", key, hint)


def _check_settings(held: Held, document: Mapping[str, Any], own: Class) -> None:
    """Raise settings that the class does not read and config.json has not."""
    aliases = {other for others in own.aliases.values() for other in others}
    known = {*own.numbers, *own.identity, *own.idle, *aliases, *document, *ROPES, *ROTARY}
    known |= {KEY} if carried_of(held.source.checkpoint) is not None else set()
    held.facts.check_settings(known)


# --- names ----------------------------------------------------------------------------------------------


def _found_prefix(own: Class, names: Iterable[str]) -> str | None:
    """What stands before the embedding, "" for a model without its head; None without an embedding."""
    found = set(names)
    return next((p for p in (own.prefix, "", IN_ANSWERING) if p + own.words in found), None)


def _spelling(checkpoint: Checkpoint, chosen: Family) -> Spelling:
    config = checkpoint.json("config.json")
    kind = class_of(config)
    assert kind is not None  # see `is_one`
    own, names = chosen.classes[kind], checkpoint.names()
    found = _found_prefix(own, names)
    found = own.prefix if found is None else found
    base = f"{own.name.removesuffix('Config')}Model"
    architecture = _architecture(config, chosen, own, found, names)
    renamed = dict(zip(names, names, strict=True))
    if found != own.prefix or not found:
        renamed = {n: own.prefix + n.removeprefix(found) if _is_within(n, found) else n for n in names}
    for name in compress(names, map(str.endswith, names, repeat(OLD_NORMS))):
        if (old := OLD_NORM.fullmatch(renamed[name])) is not None:
            renamed[name] = f"{old['stem']}.{NEW_NORM[old['kind']]}"
    headed = (own.answering if architecture.endswith(ANSWERING) else "") or own.prefix
    written = "" if architecture == base else headed
    return Spelling(architecture, own.prefix, written, renamed, own)


def _is_within(name: str, found: str) -> bool:
    return name.startswith(found) if found else not name.startswith(ANY_HEAD)


def _architecture(
    config: Mapping[str, Any], chosen: Family, kind: Class, found: str, names: Iterable[str]
) -> str:
    """What config.json says; where it says none, the model alone, unless there are tensors of a head."""
    said, stem = config.get("architectures"), kind.name.removesuffix("Config")
    base = f"{stem}Model"
    own = [name for name in chosen.architectures if name.startswith(stem)]
    if isinstance(said, list) and len(said) == 1 and isinstance(said[0], str):
        others = [] if any(n.endswith(SEEING) for n in own) else [f"{stem}{end}" for end in kind.heads]
        if said[0] in (base, *own, *others):
            return said[0]
        some = [*dict.fromkeys([base] * bool(others) + own + others)][:6]
        message = f"expected a class of {chosen.name} such as {', '.join(some)}, found {said[0]!r}"
        fail_all([Problem("unsupported", message, "config.json", "architectures")])
    if said is not None and said != []:
        message = f"expected one class, found {json.dumps(said)[:100]}"
        fail_all([Problem("bad-config", message, "config.json", "architectures")])
    with_head = any(n.startswith(ANY_HEAD) for n in names) or bool(found)
    return next(iter([*own, *chosen.architectures])) if with_head else base


def as_class_writes(checkpoint: Checkpoint, chosen: Family) -> Checkpoint:
    """The tensors under the names that their class writes."""
    spelling = _spelling(checkpoint, chosen)
    return _renamed(checkpoint, {own: spelling.written(name) for own, name in spelling.family.items()})


def as_rows_say(checkpoint: Checkpoint, chosen: Family) -> Checkpoint:
    """The tensors under the names of the family's rows."""
    return _renamed(checkpoint, _spelling(checkpoint, chosen).family)


def of_rows(checkpoint: Checkpoint, chosen: Family) -> Checkpoint:
    """A folder of `chosen` whose tensors have other names than its class writes (those of old releases, or of
    a model without the head's), under those of the family's rows, with a reading; any other as it is."""
    if kind_of(checkpoint) not in chosen.classes:
        return checkpoint
    spelling = _spelling(checkpoint, chosen)
    names: Iterable[str] = spelling.family.values()
    written = names if spelling.own == spelling.prefix else map(spelling.written, names)
    other = [*compress(spelling.family.items(), map(ne, written, spelling.family))]
    if not other:
        return checkpoint
    (own, name), count = other[0], len(other)
    what = f"{count} names of an old release, or of a model without its head, were read as the newest are"
    seen = _renamed(checkpoint, spelling.family)
    return replace(seen, readings=(*seen.readings, f"{what}: {own} -> {name}"))


def _renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """The tensors under other names. Kind `duplicate-tensor` for two that have one."""
    files: dict[str, TensorFile] = {}
    problems = []
    for label, file in checkpoint.files.items():
        if [*map(names.__getitem__, file.tensors)] == [*file.tensors]:
            files[label] = file
            continue
        own: dict[str, str] = {}
        for name in file.tensors:
            new = names[name]
            if new in own:
                message = f"expected one tensor, found {own[new]} and {name}, which are names of one"
                problems.append(Problem("duplicate-tensor", message, label, name))
            own[new] = name
        files[label] = Renamed(file, own)
    fail_all(problems)
    return replace(checkpoint, files=files)


# --- tensors --------------------------------------------------------------------------------------------


def _expected(filled: Expansion) -> dict[str, Part]:
    """Those that the rows ask for by name, once each, with all of their elements: `dims` as the rows have
    them, and the size of each axis as a range. Parts that differ in their names only are one, without any."""
    made: dict[str, Part] = {}
    before = [len(step.sources) for step in filled.steps.templates]
    parts = [[_of_all(part, step.sizes) for part in step.targets] for step in filled.steps.templates]
    for kind, columns in filled.steps.runs():
        for names in zip(*columns[before[kind] :], strict=True):
            for name, part in zip(names, parts[kind], strict=True):
                made.setdefault(name, part)
    return made


def _of_all(part: Part, sizes: Mapping[str, int]) -> Part:
    ranges = tuple((a, lo, hi) for a, (lo, hi) in part.whole(sizes).items())
    return replace(part, name="", ranges=ranges, taken=())


def _has(name: str, spelling: Spelling) -> bool:
    """Whether the class has a tensor of the family's rows: not one of another head."""
    return name.startswith((spelling.prefix, *_starts(spelling.architecture)))


def _whole(tensor: TensorInfo) -> Part:
    """A tensor that no row has, as it is."""
    axes = [f"x{k}" for k in range(len(tensor.shape))]
    ranges = tuple((a, 0, n) for a, n in zip(axes, tensor.shape, strict=True))
    return Part(tensor.file, tensor.name, tensor.dtype, tuple((a,) for a in axes), ranges)


def _kept(part: Part, there: Mapping[str, str], spelling: Spelling) -> Step:
    """A tensor from where it is to what the class calls it."""
    return _renaming(part, there[part.name], spelling.written(part.name))


def _renaming(part: Part, old: str, new: str) -> Step:
    sizes = tuple((a, hi - lo) for a, lo, hi in part.ranges)
    source = Part(part.file, old, part.dtype, part.dims)
    return Step(sizes, (source,), (replace(source, name=new),), "rename")


def _moved(expected: Mapping[str, Part], there: Mapping[str, str], spelling: Spelling) -> Steps:
    """The same of all that the rows ask for."""
    made = Steps()
    kinds: dict[int, int] = {}  # by the identity of the part, which `expected` holds
    for key, alike in groupby(expected, key=lambda name: id(expected[name])):
        names = list(alike)
        if key not in kinds:
            kinds[key] = made.kind(_renaming(expected[names[0]], "", ""))
        made.add_alike(kinds[key], [there[n] for n in names], [spelling.written(n) for n in names])
    return made


def _copies(
    filled: Expansion, seen: Checkpoint, held: Held, spelling: Spelling
) -> Iterator[tuple[str, TensorInfo]]:
    """Output layers that the rows ask for, that a release which ties them left out, and that another makes up
    where they are missing; each with the tensor whose values it has. Their problems are taken off."""
    if not _ties(held):
        return
    own = spelling.kind
    for problem in [p for p in filled.problems if p.kind == "missing-tensor" and p.where in own.tied]:
        name = str(problem.where)
        if found := seen.find(own.tied[name] or own.prefix + own.words):
            filled.problems.remove(problem)
            yield name, found[0]


def _copy(part: Part, name: str, there: Mapping[str, str], spelling: Spelling) -> Step:
    """A tensor written once more, under another name."""
    step = _kept(part, there, spelling)
    targets = tuple(replace(t, name=spelling.written(name)) for t in step.targets)
    return replace(step, targets=targets, note="a copy", copied=True)


def _compared(
    seen: Checkpoint, name: str, to: str, held: Held, there: Mapping[str, str], spelling: Spelling
) -> Step:
    """A copy of another tensor, to which the config ties it: compared and left out."""
    (tensor, *_), home = seen.find(name), held.source.tensors.get(to, ())
    part = _whole(tensor)
    step = _kept(part, there, spelling)
    file, other = (home[0].file, spelling.written(to)) if home else (tensor.file, to)
    hint = f"--drop {there[name]} uses {there.get(to, to)}"
    if held.table.head:
        hint = f"--set tie_word_embeddings=false keeps both; {hint}"
    targets = tuple(replace(t, name=other, file=file) for t in step.targets)
    return replace(step, targets=targets, compare="tied", note="tied", hint=hint)


# --- heads ----------------------------------------------------------------------------------------------


def _end(architecture: str) -> str:
    """What a class's name ends in, of `HEADS`; empty for a model without a head."""
    return next((end for end in HEADS if architecture.endswith(end)), "")


def _starts(architecture: str) -> tuple[str, ...]:
    return HEADS.get(_end(architecture), ("//",))  # no name begins so


def _is_of_head(name: str, spelling: Spelling) -> bool:
    """Whether it is a tensor of the class's head that no row names, or of the pooler before it."""
    if name.startswith(spelling.prefix):
        pooled = POOLERS.match(spelling.architecture) and _end(spelling.architecture) not in UNPOOLED
        return ".pooler." in name and bool(pooled)
    module, _, part = name.rpartition(".")
    return module in _modules(spelling) and part in ("weight", "bias")


def _modules(spelling: Spelling) -> tuple[str, ...]:
    """What the head consists of, beside what rows name."""
    return spelling.kind.heads.get(_end(spelling.architecture), ())


def _module(name: str) -> str:
    """The head that a tensor belongs to."""
    words = name.split(".")
    return ".".join(words[: 2 if words[0] == "cls" else 1])


def _of_another_head(problem: Problem, seen: Checkpoint, spelling: Spelling) -> bool:
    """Whether a tensor is missing that this class has not: of a head of the family's own class of which
    nothing is there, or of a pooler."""
    name = problem.where or ""
    if problem.kind != "missing-tensor":
        return False
    if name.startswith(spelling.prefix):
        return ".pooler." in name and _end(spelling.architecture) in UNPOOLED
    own = name.startswith(_starts(spelling.architecture))
    return not own or not any(_module(t.name) == _module(name) for t in seen)


def _head_problems(
    spelling: Spelling, held: Held, names: Collection[str], heads: Iterable[TensorInfo]
) -> Iterator[Problem]:
    """A head of which nothing is there, unless it is the embedding again; labels that it has no rows for."""
    starts, own = tuple(f"{m}." for m in _modules(spelling)) or _starts(spelling.architecture), held.source
    labelled = LABELLED.search(spelling.architecture)
    classes_alone = labelled or _end(spelling.architecture) in (ANSWERING, "ForMultipleChoice")
    there = [n for n in names if (LAST.fullmatch(n) if classes_alone else n.startswith(starts))]
    if _end(spelling.architecture) and not there:
        tied = spelling.architecture.endswith(
            ("LMHeadModel", "DoubleHeadsModel", "ForCausalLM", "ForMaskedLM")
        )
        if not (tied and held.facts.document is not None and _ties(held)):
            known = " or ".join(f"{s}weight" for s in starts)
            message = f"expected the head of {spelling.architecture} ({known}), found none"
            yield Problem("missing-tensor", message, own.checkpoint.path.name, starts[0] + "weight")
    # MobileBERT's without has none
    pools = (held.facts.document or {}).get("classifier_activation") is not False
    if pools and POOLED.fullmatch(spelling.architecture) and not any(".pooler." in n for n in names):
        message = f"expected the pooler that the head of {spelling.architecture} reads, found none"
        yield Problem("missing-tensor", message, own.checkpoint.path.name, f"{spelling.prefix}pooler")
    for t in heads:
        if t.dtype not in CASTABLE and t.shape:
            message = f"expected {', '.join(CASTABLE)}, found {t.dtype}"
            yield Problem("unsupported-dtype", message, t.file, t.name, ALONE if t.dtype in CODES else None)
        if LAST.fullmatch(t.name):
            yield from _last_problems(t, spelling, held, names)


def _last_problems(
    t: TensorInfo, spelling: Spelling, held: Held, names: Collection[str]
) -> Iterator[Problem]:
    """What is otherwise of the last matrix than the class makes it: its rows, its columns, its bias."""
    end, labels = _end(spelling.architecture), _labels(held.facts.document or {})
    rows, columns = (*t.shape, "no", "no")[:2]
    if end == ANSWERING and rows != 2:
        message = f"expected 2 rows (where an answer begins and ends), found {rows} rows"
        yield Problem("config-mismatch", message, t.file, t.name)
    elif LABELLED.search(spelling.architecture) and rows != labels:
        message = f"expected {labels} labels (config.json: id2label), found {rows} rows"
        yield Problem("config-mismatch", message, t.file, t.name)
    said = {**(held.facts.document or {}), **held.facts.settings}
    found = (d.get(k) for d in (said, spelling.kind.numbers) for k in ("word_embed_proj_dim", *WIDTHS))
    width = next((n for n in found if type(n) is int), None)
    if "out_proj" not in t.name and width is not None and columns != width * WIDER.get(end, 1):
        message = f"expected {width * WIDER.get(end, 1)} columns, found {columns}"
        yield Problem("config-mismatch", message, t.file, t.name)
    stem = t.name.removesuffix(".weight")
    if (end, stem) not in UNBIASED and f"{stem}.bias" not in names:
        message = f"expected this tensor, which {spelling.architecture} has, found none"
        yield Problem("missing-tensor", message, t.file, f"{stem}.bias")
    if (end, stem) in UNBIASED and f"{stem}.bias" in names:
        message = f"expected no bias, which {spelling.architecture} does not read, found one"
        yield Problem("unsupported", message, t.file, f"{stem}.bias", "--drop leaves it out, and records it")


def _ties(held: Held) -> bool:
    """Whether the output layer is the embedding."""
    said = held.facts.settings.get(
        "tie_word_embeddings", (held.facts.document or {}).get("tie_word_embeddings")
    )
    if said is None:
        kind = class_of(held.facts.document or {})
        said = kind is not None and classes()[kind].numbers.get("tie_word_embeddings")
    return bool(said)


def _labels(config: Mapping[str, Any]) -> int:
    names = config.get("id2label")
    if isinstance(names, dict):
        return len(names)
    said = config.get("num_labels")
    return said if type(said) is int else 2


# --- files ----------------------------------------------------------------------------------------------


def _written(
    checkpoint: Checkpoint, chosen: Family, options: Options, held: Held, spelling: Spelling
) -> Written:
    config, documents, notes = config_of(checkpoint, options, held, spelling.kind)
    notes += held.facts.notes + _renamings(spelling)
    manifest = read_manifest(checkpoint)
    original = {} if manifest is None or manifest.direction != "to-hf" else dict(manifest.original)
    return Written(
        chosen.name,
        config,
        [*documents, *files_beside(checkpoint)],
        {},
        notes,
        {**original, LAYOUT: HUGGING_FACE},
        unread=chosen.unread,
    )


def _reasons(held: Held, names: Iterable[str], there: Mapping[str, str]) -> dict[str, str]:
    """Why tensors that are nobody's may be left out, by patterns of what they are called in the files."""
    ignored = {**held.ignored, **TABLES}
    found = {n: next((why for p, why in ignored.items() if re.fullmatch(p, n)), None) for n in names}
    return {re.escape(there[n]): why for n, why in found.items() if why is not None}


def _renamings(spelling: Spelling) -> list[str]:
    """Names of old releases, or of a model without its head, that are written as the class has them."""
    norms = [n for n in spelling.family if OLD_NORM.fullmatch(n)]
    notes = []
    if norms:
        notes.append(
            f"{len(norms)} norms are called gamma and beta, which are weight and bias now: {norms[0]}"
        )
    moved = [
        (own, new)
        for own, name in spelling.family.items()
        if (new := spelling.written(name)) != own and own not in norms
    ]
    if moved:
        own, new = moved[0]
        notes.append(
            f"{len(moved)} tensors get the names that {spelling.architecture} writes: {own} -> {new}"
        )
    return notes
