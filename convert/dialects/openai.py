"""Models as OpenAI publishes them: a folder (of a Hugging Face repository: `original/`) with a config.json of
its own, which is none of transformers, and safetensors of any names that together hold every tensor once.
Matrices of experts are packed in MXFP4: bytes of two codes each, and a byte of exponent for a block of 32.

Source: openai/gpt-oss @7b58334, gpt_oss/torch/weights.py, model.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint
from ckpt_tool.convert.dialects.converted import (
    FREQUENCIES,
    GENERATION,
    kept_facts,
    read_config,
)
from ckpt_tool.convert.dialects.published import container_of, copied, counted, generation, tokenizer_files
from ckpt_tool.convert.facts import same
from ckpt_tool.convert.families import Family
from ckpt_tool.convert.layout import Rule
from ckpt_tool.convert.numbers import (
    DTYPE,
    IDS,
    Class,
    Entry,
    Field,
    Known,
    Size,
    by_name,
    document,
    only,
    table_of,
)
from ckpt_tool.convert.params import Facts, left_out, shown
from ckpt_tool.convert.plan import Options, OutputDocument, Plan, Value
from ckpt_tool.convert.source import whole_tensors
from ckpt_tool.convert.tokenizers.hf_files import template_notes
from ckpt_tool.convert.vocabularies import Vocabulary as Vocabulary
from ckpt_tool.convert.weave import Held, Table, Written, to_hf, to_original
from ckpt_tool.errors import Problem, fail, fail_all, near, printable
from ckpt_tool.records import dataclass

CONFIG = "config.json"
FILE = "model.safetensors"  # of the way back
PACKING, METHOD = "quantization_config", "mxfp4"
PACKED = ("blocks", "scales")  # how the names of both halves of a packed matrix end
BLOCK = 32  # numbers under one scale
NO_TOKENIZER = (
    "the original folder has no tokenizer: its Hugging Face repository has tokenizer.json; --tokenizer "
    "FOLDER takes it from there"
)


@dataclass(frozen=True)
class OpenAI:
    """A model that is published like this. `rows` are those of its tensors but for the matrices of experts,
    which have `packed_rows` or, where they are numbers, `numbers_rows`. `document` is what the original's
    config.json says, in order; `layer` finds a layer's number in the names of either side, `told_by` are
    tensors that no other family has. `checks` look at what an original needs and the class of transformers
    does not; `twice` are keys of config.json that say again what the class reads under another name."""

    name: str
    title: str
    config: Class
    fields: Mapping[str, Field]
    document: Sequence[Entry]
    rows: Sequence[Rule]
    packed_rows: Sequence[Rule]
    numbers_rows: Sequence[Rule]
    told_by: tuple[str, str]  # of the original, of the Hugging Face layout
    layer: str
    axes: Mapping[str, Size]
    checks: Callable[[Known], None]
    twice: Mapping[str, Callable[[Known], Value]]
    notes: Callable[[Known], list[str]]

    @property
    def architecture(self) -> str:
        return f"{self.config.name.removesuffix('Config')}ForCausalLM"


def family(
    *,
    summary: str,
    fields: Sequence[Field | Sequence[Field]],
    model_type: str,
    vocabulary: Vocabulary,
    **said: Any,
) -> Family:
    """The record of a family that is published like this; `said` are the parts of `OpenAI`."""
    architecture = f"{said['config'].name.removesuffix('Config')}ForCausalLM"
    own = by_name(
        only("architectures", [architecture], f"family {said['name']}"),
        only("model_type", model_type, f"family {said['name']}"),
        *fields,
        DTYPE,
    )
    d = OpenAI(fields=own, **said)
    return Family(
        name=d.name,
        summary=summary,
        architectures=(architecture,),
        recognise=partial(recognise, d),
        plan=partial(plan, d),
        plan_original=partial(plan_original, d),
        held=partial(held, d),
        vocabulary=vocabulary,
        classes={model_type: d.config},
        numbers=tuple(name for row in d.numbers_rows for name in row.target),
        tensors=(d.told_by[0],),
        document=CONFIG,
        packed=True,
    )


def recognise(d: OpenAI, checkpoint: Checkpoint) -> tuple[bool, str]:
    names = set(checkpoint.names())
    if d.told_by[0] not in names:
        found = (
            "the tensors have Hugging Face names already" if d.told_by[1] in names else f"no {d.told_by[0]}"
        )
        return False, found
    return True, f"{d.told_by[0]} is of {d.title} alone"


# --- original to Hugging Face -----------------------------------------------------------------------------


def plan(d: OpenAI, checkpoint: Checkpoint, options: Options) -> Plan:
    own, why = recognise(d, checkpoint)
    if not own:
        fail("unsupported", f"expected {d.title}, found {why}", file=checkpoint.path.name)
    facts = read_original(d, checkpoint, options)
    known = Known(d.fields, facts, whole_tensors(checkpoint, d.layer), options)
    numbers = unpacked(d, known.source.tensors)
    config = {k: v for k, v in config_of(d, known).items() if k != PACKING or not numbers}
    files = tokenizer_files(checkpoint, options)
    tokenizer = [*counted(known["vocab_size"], files), *template_notes(files)] if files else [NO_TOKENIZER]
    documents = copied(files)
    if GENERATION in checkpoint.documents:
        documents.insert(0, generation(checkpoint, config))
    kept = {
        "container": container_of(checkpoint),
        CONFIG: text_of(checkpoint, facts),
        "numbers": numbers_of(d, known),
    }
    written = Written(
        d.name, config, documents, FREQUENCIES, [*facts.notes, *d.notes(known), *tokenizer], kept
    )
    return to_hf(rows_of(d, known), known.source, options, written)


def read_original(d: OpenAI, checkpoint: Checkpoint, options: Options) -> Facts:
    """config.json of the original. The publisher's class takes these keys and no other: one more is refused
    unless the user sets it to null, since it may change the numbers."""
    if CONFIG not in checkpoint.documents:
        hint = "download the config.json of the same folder too, or give each value by --set"
        message = "expected config.json beside the weights, found none"
        fail("missing-file", message, file=checkpoint.path.name, hint=hint)
    found = checkpoint.json(CONFIG)
    if isinstance(found.get("model_type"), str) or isinstance(found.get("architectures"), list):
        message = "expected the original's config.json, found one of transformers"
        hint = "the weights are the original's: give the folder whose config.json has num_experts"
        fail("wrong-format", message, file=CONFIG, where="model_type", hint=hint)
    own = {key for f in d.fields.values() if isinstance(f.keys, tuple) for key in f.keys}
    out = {k for k in found.keys() - own if k in options.settings and options.settings[k] is None}
    settings = {k: v for k, v in options.settings.items() if k not in out}
    facts = Facts({k: v for k, v in found.items() if k not in out}, CONFIG, settings)
    facts.notes += [left_out(CONFIG, k, found[k]) for k in sorted(out)]
    for key in sorted(found.keys() - own - out):
        message = f"expected the {len(own)} keys that {d.title} has, found another: {shown(found[key])}"
        hint = f"--set {printable(key)}=null leaves it out, if it changes nothing"
        meant = near(key, sorted(own))
        facts.refuse("unsupported", message, printable(key), f"{meant} {hint}" if meant else hint)
    return facts


def config_of(d: OpenAI, known: Known) -> dict[str, Value]:
    """config.json as it is written; raises what was collected."""
    config = known.values()
    asked = [n for n in IDS if n in known.facts.settings]
    ids = {n: known.facts.token_ids(n, rule=None) for n in asked}
    known.facts.check_settings({*config, *d.fields, *ids})
    known.facts.check()
    d.checks(known)
    known.facts.check()
    return config | ids


def numbers_of(d: OpenAI, known: Known) -> dict[str, Any]:
    """What the original's document says, by its own names."""
    return {k: v.value for k, v in document(known, d.document).items()}


def text_of(checkpoint: Checkpoint, facts: Facts) -> str | None:
    """The original's config.json, for the way back; None where the user says otherwise than it."""
    return None if facts.settings else checkpoint.documents[CONFIG].read().decode()


def unpacked(d: OpenAI, names: Collection[str]) -> str:
    """A matrix of experts that is numbers, in either layout; empty where there is none."""
    found = (name.format(i=0) for row in d.numbers_rows for name in (*row.source, *row.target))
    return next((name for name in found if name in names), "")


def rows_of(d: OpenAI, known: Known) -> Table:
    for name in ("hidden_size", "intermediate_size"):
        if known[name] % BLOCK:
            message = (
                f"expected {name} to divide by {BLOCK}, the numbers of a block of MXFP4, found {known[name]}"
            )
            known.refuse("config-mismatch", message, name)
    known.facts.check()
    matrices = d.numbers_rows if unpacked(d, known.source.tensors) else d.packed_rows
    end = 1 + max(k for k, row in enumerate(d.rows) if "{i}" in row.source[0])  # of a layer's rows
    rows = (*d.rows[:end], *matrices, *d.rows[end:])
    return replace(table_of(known, rows, d.axes), packed=PACKED)


# --- the Hugging Face layout ------------------------------------------------------------------------------


def converted(d: OpenAI, checkpoint: Checkpoint, options: Options, architecture: str) -> Known:
    facts = read_config(checkpoint, options.settings, (architecture,), own=d.config)
    known = Known(
        d.fields,
        facts,
        whole_tensors(checkpoint, d.layer),
        options,
        d.config,
        kept_facts(checkpoint),
        back=True,
    )
    fail_all([*said_twice(d, known), *packed_otherwise(known, bool(unpacked(d, known.source.tensors)))])
    return known


def said_twice(d: OpenAI, known: Known) -> Iterator[Problem]:
    """Keys that repeat what the class reads under another name: other programs may read these."""
    for key, means in d.twice.items():
        said = (known.facts.document or {}).get(key)
        if said is None or key in known.facts.settings:
            continue
        meant = means(known)
        if not same(said, meant.value):
            message = (
                f"expected one value, found {key} {shown(said)} and {shown(meant.value)} ({meant.source})"
            )
            yield Problem(
                "bad-config", message, CONFIG, key, f"--set {key}=VALUE says which, as does the other"
            )


# Experts as linear layers of their own (Unsloth), and as kernels take them (vLLM).
_ELSEWHERE = re.compile(
    r"\.experts\.((gate_up|down)_projs\.\d+\.|w(13|2)_(weight|bias)|(gate|up|down)_proj\.(weight|bias))"
    r"|\.router\.linear\.",
    re.ASCII,
)
_APART = (
    "give the folder that was loaded there; gate_up_proj and down_proj stack the transposes of gate_up_projs "
    "and down_projs, or of gate_proj and up_proj in turns, and router is what router.linear is"
)


def packed_otherwise(known: Known, numbers: bool) -> Iterator[Problem]:
    """A config.json by which loaders would read the tensors as something else."""
    said = (known.facts.document or {}).get(PACKING)
    said = known.facts.settings.get(PACKING, said)
    method = said.get("quant_method") if isinstance(said, Mapping) else said
    if said and method != METHOD:
        message = f"expected experts packed as {METHOD}, found {shown(method)}"
        yield Problem("unsupported", message, CONFIG, PACKING, "give the folder with the experts in MXFP4")
    elif found := next((n for n in known.source.tensors if _ELSEWHERE.search(n)), None):
        message = (
            "expected the experts of a layer in one tensor, found them as Unsloth, vLLM or MLX holds them"
        )
        if ".router." in found:
            message = "expected the router under its own name, found it as Unsloth holds it"
        yield Problem("unsupported", message, known.source.tensors[found][0].file, found, _APART)
    elif not said and not numbers:
        message = f"expected {PACKING} beside experts in MXFP4, by which loaders unpack them, found none"
        hint = f'--set {PACKING}=\'{{"quant_method": "{METHOD}"}}\' says how they are packed'
        yield Problem("config-mismatch", message, CONFIG, PACKING, hint)


def held(d: OpenAI, checkpoint: Checkpoint, options: Options, architecture: str) -> Held:
    """See `Family.held`: packed as the original is, or as numbers, as transformers saves them."""
    known = converted(d, checkpoint, options, architecture)
    return Held(rows_of(d, known), known.source, known.facts, FREQUENCIES)


def plan_original(d: OpenAI, checkpoint: Checkpoint, options: Options) -> Plan:
    """The original's names in one file, and its config.json: as it was, where the numbers are the same."""
    known = converted(d, checkpoint, options, d.architecture)
    if name := unpacked(d, known.source.tensors):
        message = (
            "expected experts in MXFP4, as the original has them, found numbers: packing them would round"
        )
        hint = "convert the folder in MXFP4, which goes back bit for bit"
        fail("unsupported", message, file=known.source.tensors[name][0].file, where=name, hint=hint)
    values = known.values(n for n in d.fields if n in d.config.numbers)
    known.facts.check_settings({*values, *d.config.identity, *d.twice})
    known.facts.check()
    d.checks(known)
    known.facts.check()
    params = document(known, d.document)
    files = tokenizer_files(checkpoint, options)
    notes = [*known.facts.notes, *template_notes(files)]
    beside = [original_config(d, known, params, notes), *copied(files)]
    if files and GENERATION in checkpoint.documents:
        beside.append(generation(checkpoint, values))
    homes = [(FILE, known.source.dtype)]
    written = Written(d.name, params, beside, FREQUENCIES, notes)
    return to_original(rows_of(d, known), known.source, options, written, files=[FILE], homes=lambda _: homes)


def original_config(d: OpenAI, known: Known, params: Mapping[str, Value], notes: list[str]) -> OutputDocument:
    """The original's own text where the manifest has it and its numbers still hold, else made of `params`."""
    text, then = known.once.get(CONFIG), known.once.get("numbers")
    if isinstance(text, str) and isinstance(then, dict):
        changed = [k for k, v in params.items() if not same(then.get(k), v.value)]
        if not changed:
            return OutputDocument(CONFIG, text.encode(), "ckpt-tool.json: the original's text")
        words = ", ".join(changed)
        notes.append(f"{CONFIG} is written anew: it has another {words} than the original")
    content = json.dumps({k: v.value for k, v in params.items()}, indent=2) + "\n"
    return OutputDocument(CONFIG, content.encode(), "config.json of transformers")
