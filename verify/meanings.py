"""config.json against the plan: does it say the same, in whatever words?

Both are read by one reader (`convert.facts`), so values are compared by what they mean to the class that
reads them. Every key of the file is a value that is compared, has no effect, or is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_tool.checkpoint.base import DTYPES, FLOATS
from ckpt_tool.convert.facts import Meaning, Reading, class_of, classes, differences, read, same, shown
from ckpt_tool.convert.facts_classes import IDENTITY, IDLE, IDS, PACKED, TRAINING
from ckpt_tool.convert.widths import NAMES_OF_DTYPES
from ckpt_tool.verify.report import Finding, Status
from ckpt_tool.verify.subject import Subject, values_with_sources

LEVEL = "coverage"
CHECK = "config"
Known = Mapping[str, tuple[Any, str]]
LENGTH = "max_position_embeddings"
NO_NUMBER = (
    "it changes no number, no file of the original says it, and programs that take the longest text from "
    "here stop there"
)
# Of every class: keys that take no null (4.37.2, 4.57.6 and 5.23.0 tried), and flags with which results are
# tuples when they are otherwise.
NEVER_NULL = ("num_labels", "pruned_heads", "chunk_size_feed_forward")
NAMED = {"return_dict": True, "torchscript": False}
# Keys of every class that no forward pass reads and that act all the same where they say anything.
ACTING = {
    "chunk_size_feed_forward": "by which encoders take a text apart, and raise where it does not divide it",
    "prefix": "which pipelines of transformers put before every text",
    "task_specific_params": "which pipelines of releases 4 generate with",
}
IN_WORDS = ("problem_type", "num_steps")  # of training, which are words or which no class asks for
RAISES = "with which releases of transformers do not load or run it"
# Of keys that name a way to compute the ways that there are (4.37.2 to 5.23.0).
ATTENTION = (
    *("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4"),
    "flex_attention",
)
CHOICES = {
    "_attn_implementation": ATTENTION,
    "attn_implementation": ATTENTION,
    "cache_implementation": (
        *("dynamic", "static", "offloaded", "offloaded_static", "quantized", "hybrid", "hybrid_chunked"),
        *("sliding_window", "dynamic_full", "offloaded_hybrid", "offloaded_hybrid_chunked", "paged", "mamba"),
    ),
}
# Of single classes, which do not ask for them: the same releases load and run these with a null.
UNASKED = (
    *("activation_dropout", "experts_per_token", "initial_context_length"),
    *("scale_attn_weights", "use_feature_dropout"),
)
WITHOUT_EFFECT = frozenset({*IDENTITY, *IDLE, "dtype"})  # keys that no forward pass reads


def finding(status: Status, message: str, where: str | None = None, **more: Any) -> Finding:
    return Finding(LEVEL, CHECK, status, message, where, **more)


def config(subject: Subject) -> list[Finding]:
    """The findings about the output's config.json."""
    if subject.hf is None or subject.direction != "to-hf":
        return []
    known = values_with_sources(subject)
    planned = {k: v for k, (v, _) in known.items()}
    model_type = class_of(planned) or class_of(subject.config)
    if model_type is None:
        said = subject.config.get("model_type")
        text = f"expected a model_type whose values are known here, found {shown(said)}"
        return [finding("skipped", text, "config.json: model_type", data={"open": True})]
    found = read(subject.config, model_type)
    made = [*_in_itself(subject, found, known)]
    if not known:
        reason = "neither the source nor a manifest says where the values come from"
        return [*made, finding("skipped", reason, data={"open": True})]
    expected = read(planned, model_type)
    made += _compared(expected, found, known, classes()[model_type].name)
    made += _without_head(subject)
    made += [*_unknown(found, planned), *_packing(subject, planned)]
    made += _raising(subject.config, found, planned)
    if not any(f.status == "fail" for f in made):
        made.append(_passed(found, known))
    return made


def _in_itself(subject: Subject, found: Reading, known: Known) -> Iterator[Finding]:
    """What a file can get wrong without being compared: two values for one thing, code and packing, a dtype
    that the tensors do not have."""
    for c in found.contradictions:
        data = {"name": c.name, "values": {k: v for k, v, _ in (c.first, c.second)}}
        yield finding("fail", c.text, f"config.json: {c.name}", data=data)
    for w in found.wrong:
        yield finding("fail", w.text, f"config.json: {w.where}", data={"found": subject.config.get(w.where)})
    yield from _labels(subject.config)
    carried = subject.packed is not None and subject.packed.carried
    for key, reason in found.refused.items():
        if carried and key in PACKED:
            continue  # compared below
        text = f"expected a config for plain weights, found {key}, which {reason}"
        yield finding("fail", text, f"config.json: {key}")
    counts: Counter[str] = Counter()
    for t in subject.output:
        if t.dtype in FLOATS:
            counts[DTYPES[t.dtype].torch] += t.numel
    said = found.identity["torch_dtype"]
    if counts and said.value is not None and said.value not in counts:
        (most, _), *_ = counts.most_common(1)
        text = f"expected {most} (dtype of the tensors), found {said.text}"
        data = {"expected": most, "found": said.said}
        own = known.get(said.where)
        # what a source in this layout says as well, and its loaders make of the same tensors
        kept = own == (said.said, f"config.json: {said.where}") and said.value in NAMES_OF_DTYPES
        yield finding("note" if kept else "fail", text, f"config.json: {said.where}", data=data)


def _labels(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Names of classes that `label2id` gives another number than `id2label`; it may have none of them."""
    names, numbers = config.get("id2label"), config.get("label2id")
    if not isinstance(names, Mapping) or not isinstance(numbers, Mapping):
        return
    numbered = {str(k): v for k, v in names.items()}
    for name, number in numbers.items():
        own = [k for k, v in numbered.items() if v == name]
        if own and str(number) not in own:
            text = f"expected {shown(name)} to be {own[0]}, as id2label says, found {shown(number)}"
            yield finding("fail", text, "config.json: label2id", data={"expected": own[0], "found": number})
            return


def _compared(expected: Reading, found: Reading, known: Known, name: str) -> Iterator[Finding]:
    for key, want, have in differences(expected, found):
        if key == "torch_dtype" and have is not None and have.value is None:
            continue  # nothing said: a loader takes what the tensors have
        if want is not None and want.default and want.value == have:
            continue
        source = _source(key, want, known, name)
        asked, seen = _pair(want, have)
        text = f"expected {asked}{source}, found {seen}"
        if key in ("model_type", "architectures") and have is not None and have.default:
            text = f"expected {asked}{source}, found nothing"
        where = f"config.json: {key if have is None or have.default else have.where}"
        data = {
            "expected": None if want is None else want.said,
            "found": None if have is None else have.said,
            "source": source.strip(" ()"),
            "name": key,
        }
        status: Status = "note" if _only_padding(key, want, found) else "fail"
        if source.startswith(" (rule") and _usual_length(key, want, have, found):
            status, text = "note", f"{text}: {NO_NUMBER}"
        yield finding(status, text, where, data=data)


def _without_head(subject: Subject) -> Iterator[Finding]:
    """The class of an output that was read as the class of the plan reads it."""
    if subject.without_head is None:
        return
    want = subject.config["architectures"]
    text = (
        f"expected {shown(want)}, found {shown(subject.without_head)}, the model without its head: "
        f"{want[0]} reads its tensors, and a program that goes by the name makes no head"
    )
    data = {"expected": want, "found": subject.without_head, "name": "architectures"}
    yield finding("fail", text, "config.json: architectures", data=data)


def _pair(want: Meaning | None, have: Meaning | None) -> tuple[str, str]:
    """What was expected and what was found, of objects the values that differ."""
    if want is None or have is None:
        return ("nothing" if want is None else shown(want.said)), ("nothing" if have is None else have.text)
    if not (isinstance(want.value, Mapping) and isinstance(have.value, Mapping)):
        return shown(want.said), have.text
    keys = [k for k in {**want.value, **have.value} if not same(want.value.get(k), have.value.get(k))]
    asked, seen = (shown({k: v.get(k, "absent") for k in keys}) for v in (want.value, have.value))
    return asked, seen


def _only_padding(key: str, want: Meaning | None, found: Reading) -> bool:
    """An id for padding where the original names none, within the vocabulary: no token of the model gets
    another meaning. Llama's early configs had 0 or -1."""
    if key != "pad_token_id" or want is None or want.value is not None:
        return False
    if "ForSequenceClassification" in str(found.identity["architectures"].value):
        return False  # which takes the last token that is none of it
    pad, words = found.identity[key].value, found.numbers["vocab_size"].value
    return type(pad) is int and isinstance(words, int) and -1 <= pad < words


def _usual_length(key: str, want: Meaning | None, have: Meaning | None, found: Reading) -> bool:
    """Whether a context is shorter than the one foretold, and the default of the class: the scripts of
    transformers write it of whatever original (Llama 2 gets 2,048 unless `--llama_version 2` is given)."""
    if key != LENGTH or want is None or have is None:
        return False
    usual: int = classes()[found.model_type].identity[LENGTH]
    return type(have.value) is int and have.value == usual < int(want.value)


def _source(key: str, want: Meaning | None, known: Known, name: str) -> str:
    """Where the plan has a value from, in brackets."""
    if want is None:
        return ""
    for spelling in (want.where, key, want.where.partition(".")[0]):
        if spelling in known:
            return f" ({known[spelling][1]})"
    return f" (the default of {name})"


def _unknown(found: Reading, planned: Mapping[str, Any]) -> Iterator[Finding]:
    for key, value in found.unknown.items():
        if key in planned and planned[key] == value:
            continue  # carried over from the source as it is
        if key in planned:
            text = f"expected {shown(planned[key])}, found {shown(value)}"
        else:
            text = f"expected a source for this value, found none ({shown(value)})"
        yield finding("fail", text, f"config.json: {key}", data={"found": value})
    carried = read(planned, found.model_type).unknown
    for key in planned:
        if key in carried and key not in found.unknown:
            text = f"expected {shown(planned[key])} (carried over from the source), found nothing"
            yield finding("fail", text, f"config.json: {key}", data={"expected": planned[key]})


def _raising(config: Mapping[str, Any], found: Reading, planned: Mapping[str, Any]) -> Iterator[Finding]:
    """Keys that change no number, with which a release does not load the model, or what it computes comes
    without names: nulls for numbers and flags of its class or of every class, tuples for results."""
    unasked = {*UNASKED, *classes()[found.model_type].null_too}
    for key in (k for k in config if k in found.idle or k in NEVER_NULL):
        value, want = config[key], planned.get(key)
        if key in planned and same(value, want):
            continue  # the source has it so
        if value is None and key not in unasked and (key in NEVER_NULL or isinstance(want, int | float)):
            asked = "a value or no such key" if want is None else shown(want)
            text = f"expected {asked}, found null, with which releases of transformers do not load or run it"
        elif key in NAMED and bool(value) is not NAMED[key]:
            said = f"{shown(NAMED[key])} or no such key, found {shown(value)}"
            text = f"expected {said}, with which results are tuples, or releases of transformers raise"
        elif (words := acts(key, value, want)) is not None:
            text = words
        else:
            continue
        yield finding("fail", text, f"config.json: {key}", data={"expected": want, "found": value})


def acts(key: str, value: Any, want: Any) -> str | None:
    """What a key says that no forward pass reads, and that acts on a loader or on what is made of results."""
    asked = "no such key" if want is None else shown(want)
    if key in ACTING and value:
        return f"expected {asked}, found {shown(value)}, {ACTING[key]}"
    if key in CHOICES and value is not None and value not in CHOICES[key]:
        other = "" if key == "cache_implementation" else "a kernel that is fetched from elsewhere, or "
        return (
            f"expected {', '.join(CHOICES[key])} or no such key, found {shown(value)}: {other}none that loads"
        )
    counts = IDLE.get(key) == TRAINING and key not in IN_WORDS
    if (counts or key == "use_cache") and isinstance(value, str | list | dict):
        return f"expected a number, true or false, found {shown(value)}, {RAISES}"
    if key in PACKED and value == {}:
        return f"expected {asked}, found an empty object, {RAISES}"
    return None


def _spoken(packing: Any) -> Any:
    """What a quantization_config says: transformers 5 writes nulls and `dequantize` of its own accord."""
    if not isinstance(packing, Mapping):
        return packing
    return {k: v for k, v in packing.items() if v is not None and not (k == "dequantize" and v is False)}


def _packing(subject: Subject, planned: Mapping[str, Any]) -> Iterator[Finding]:
    """What says how quantised weights that were carried are to be read."""
    if subject.packed is None or not subject.packed.carried:
        return
    for key in PACKED:
        want, have = planned.get(key), subject.config.get(key)
        if not same(_spoken(want), _spoken(have)):
            text = f"expected {shown(want)}, how the codes are to be read, found {shown(have)}"
            data = {"expected": want, "found": have, "name": key}
            yield finding("fail", text, f"config.json: {key}", data=data)


def _passed(found: Reading, known: Known) -> Finding:
    said = {n: m for n, m in found.numbers.items() if not m.default or n in known}
    text = f"{len(said)} values that change the numbers have a source and the value it gives"
    data: dict[str, Any] = {"sources": {n: known[n][1] for n in said if n in known}}
    elsewhere = {n: m.where for n, m in found.values.items() if m.where != n and not m.default}
    if elsewhere:
        data["said by"] = elsewhere
    ids = [i for i in IDS if not found.identity[i].default]
    data["identity"] = ["model_type", "architectures", *ids]
    return finding("pass", text, data=data)
