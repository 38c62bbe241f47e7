"""Which files of a folder are the checkpoint: decided from names, never by taking everything that fits `*`.

A folder may hold the original weights, the same model already converted, and adapters, side by side (the Hub
repositories of Mistral and Llama do), so only the names that publishers use are looked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

from ckpt_tool.checkpoint.safetensors import INDEX_NAME
from ckpt_tool.checkpoint.signs import unfinished
from ckpt_tool.checkpoint.tf_names import bundles, is_data, newest
from ckpt_tool.errors import Problem, fail, fail_all
from ckpt_tool.records import dataclass

Prefer = Literal["original", "hf"]
ORIGINAL_FOLDER = "original/"  # where Llama 3's Hub repositories keep the original download
TEMPLATE_FOLDER = "additional_chat_templates/"  # of all but the default one, in new transformers

TORCH_INDEX = "pytorch_model.bin.index.json"
INDEXES = (INDEX_NAME, TORCH_INDEX)
# Lists of sums, which name every file that there should be.
OF_TOKENIZER = "tokenizer_checklist.chk"  # which Llama 1 and 2 have one level above the weights
CHECKLISTS = (
    *("checklist.chk", OF_TOKENIZER, "MD5SUMS", "md5sum.txt", "md5sums.txt", "checksums.txt"),
    *("SHA256SUMS", "SHA256SUM", "SHA256SUMS.txt", "sha256sums.txt", "sha256sum.txt"),
)
# What a model in the Hugging Face layout has beside config.json and its weights.
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # of a model that reads images
BESIDE = (
    *PROCESSORS,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "sentencepiece.bpe.model",
    "entity_vocab.json",
)
MODEL_ARGUMENTS = "model_args.pkl"  # see arguments.py
_DOCUMENTS = frozenset(
    (
        "params.json",
        *CHECKLISTS,
        "tekken.json",
        "config.json",
        *BESIDE,
        "dict.txt",
        "metadata.json",
        "entity_vocab.jsonl",
        "entity_vocab.tsv",
        "ckpt-tool.json",
        "consolidated.safetensors.index.json",
        TORCH_INDEX,
        "latest_checkpointed_iteration.txt",
        MODEL_ARGUMENTS,
        "run_config.yaml",
        "model_config.yaml",
        "integrity.json",
        "hf_quant_config.json",
        INDEX_NAME,
    )
)
_TOKENIZER_MODEL = re.compile(r"tokenizer\.model(\.v\d{1,3})?(\.?m\d{1,3})?", re.ASCII)
# vocab.txt, and as Megatron's documentation calls them: bert-large-cased-vocab.txt, gpt2-merges.txt
_VOCABULARY = re.compile(r"([\w.-]{1,80}[-_.])?(?P<kind>vocab\.txt|vocab\.json|merges\.txt)", re.ASCII)
_TEMPLATE = re.compile(r"[\w.-]{1,80}\.jinja", re.ASCII)
# What Google's code reads, and as the repositories of that code call it: bert_config.json,
# uncased_L-24_H-128_B-512_A-4_F-4_OPT.json.
_SETTINGS = re.compile(
    r"(?:model|canine|(?:[a-z]{1,20}_?)?bert)_config\.json|(?:un|multi_)?cased_L-[\w.-]{1,80}\.json", re.ASCII
)
# What safetensors are called that are beside a model, and none.
_NO_MODEL = re.compile(r"(adapter|optim|sched|rng|random|scaler|train|ema\b|lora|diffusion|rank\d)", re.ASCII)
SAVED_MODEL = re.compile(r"(^|/)saved_model\.pb(txt)?$")
WHOLE = "model.safetensors"
TOKENIZERS = frozenset(("tekken.json", "tokenizer.json", "vocab.json", "vocab.txt"))


@dataclass(frozen=True)
class _Pattern:
    """One way of naming a set of weight files; the groups are its number and, if told, how many there are.
    Files of one set differ in these only, or make up what `label` calls them."""

    regex: re.Pattern[str]
    first: int  # the lowest shard number
    origin: Prefer
    index: str | None = None
    label: str | None = None


def _pattern(
    regex: str, first: int, origin: Prefer, index: str | None = None, label: str | None = None
) -> _Pattern:
    return _Pattern(re.compile(regex, re.ASCII), first, origin, index, label)


# metaseq calls a part after the run that saved it, and after its shard, of which a joined part has one:
# reshard-model_part-0.pt, checkpoint_last-model_part-0-shard0.pt, and of OPT-IML
# checkpoint_1_4000.pt-model_part-0.pt. Source: metaseq's scripts/reshard_fsdp.py, and its issue 567.
_METASEQ = r"(?:reshard|consolidated|checkpoint_\w{1,40})(?:\.pt)?"
_FLAT = re.compile(rf"(?P<run>{_METASEQ}(?:-model_part-\d{{1,4}})?)-shard(?P<shard>\d{{1,5}})\.pt", re.ASCII)
_PATTERNS = (
    _pattern(r"consolidated\.(?P<number>\d{1,4})\.pth", 0, "original"),
    _pattern(r"consolidated\.(?P<number>\d{1,4})\.pt", 0, "original"),
    _pattern(r"consolidated\.(pth|pt)", 0, "original"),
    _pattern(  # LLaMA2-Accessory: as many ranks, which repeat names
        r"consolidated\.(?P<number>\d{2,4})-of-(?P<count>\d{2,4})\.model\.pth",
        0,
        "original",
        label="consolidated.*.model.pth",
    ),
    _pattern(r"consolidated\.safetensors", 0, "original"),
    _pattern(r"consolidated\.(?P<number>\d{1,4})\.safetensors", 0, "original"),
    _pattern(
        r"consolidated-(?P<number>\d{1,5})-of-(?P<count>\d{1,5})\.safetensors",
        1,
        "original",
        "consolidated.safetensors.index.json",
    ),
    _pattern(r"model(_optim)?_rng\.pt", 0, "original"),
    _pattern(r"model_weights\.ckpt", 0, "original"),  # NeMo
    _pattern(rf"{_METASEQ}-model_part-(?P<number>\d{{1,4}})(?:-shard0)?\.pt", 0, "original"),
    _pattern(rf"reshard\.pt|restored\.pt|{_METASEQ}-shard0\.pt", 0, "original"),
    # a state dict for each part of a model
    _pattern(r"(encoder|mlm_head)_weights\.pt", 0, "original", label="encoder and mlm_head_weights.pt"),
    _pattern(r"model\.safetensors", 0, "hf"),
    _pattern(
        r"model--?(?P<number>\d{1,5})-of-(?P<count>\d{1,5})\.safetensors",
        1,
        "hf",
        INDEX_NAME,
    ),
    _pattern(r"pytorch_model\.bin", 0, "hf"),
    _pattern(
        r"pytorch_model-(?P<number>\d{1,5})-of-(?P<count>\d{1,5})\.bin",
        1,
        "hf",
        TORCH_INDEX,
    ),
    _pattern(r"model-(?P<number>\d{1,5})-of-(?P<count>\d{1,5})\.bin", 1, "hf", TORCH_INDEX),  # torchtune
)


@dataclass(frozen=True)
class WeightSet:
    """The weight files of one model in the order of their numbers, and the index that lists them, if any."""

    label: str
    files: tuple[str, ...]
    index: str | None
    origin: Prefer
    notes: tuple[str, ...] = ()

    @property
    def numbered(self) -> bool:
        """Whether its files are shards with numbers."""
        return "*" in self.label


def is_document(name: str) -> bool:
    """Whether `name` (without folders) is a small file that belongs to a checkpoint."""
    return (
        name in _DOCUMENTS
        or _TOKENIZER_MODEL.fullmatch(name) is not None
        or vocabulary_kind(name) is not None
        or is_settings(name)
    )


def is_settings(name: str) -> bool:
    """Whether a file is what Google's TensorFlow code is told of a model; see `_SETTINGS`."""
    return _SETTINGS.fullmatch(name) is not None


def belongs(name: str) -> bool:
    """Whether a file, by its name from the folder of a model, is a document of it or of an original in it."""
    inside = name.removeprefix(ORIGINAL_FOLDER)
    return is_template(name) or ("/" not in inside and is_document(inside))


def is_template(name: str) -> bool:
    """Whether `name`, from the folder of its model, is that of a file that holds one chat template."""
    inside = name.removeprefix(TEMPLATE_FOLDER)
    return name == "chat_template.jinja" or (inside != name and _TEMPLATE.fullmatch(inside) is not None)


def is_tokenizer(name: str) -> bool:
    """Whether a document alone is enough to make a tokenizer of."""
    return name in TOKENIZERS or _TOKENIZER_MODEL.fullmatch(name) is not None


def vocabulary_kind(name: str) -> str | None:
    """vocab.txt, vocab.json or merges.txt, whatever publishers put before it; None for other names."""
    found = _VOCABULARY.fullmatch(name)
    return None if found is None else found["kind"]


def exports(paths: Collection[str]) -> set[str]:
    """The folders in which SavedModels of TensorFlow keep their variables, of the folders of `paths`: what
    was exported of a checkpoint, which may lie beside it (as the releases of MobileBERT have both)."""
    above = [p.rpartition("/")[0] for p in paths if SAVED_MODEL.search(p)]
    return {f"{folder}/variables".lstrip("/") for folder in above}


def is_weights(name: str) -> bool:
    """Whether `name` (without folders) is named like a weight file."""
    return is_data(name) or any(p.regex.fullmatch(name) for p in _PATTERNS)


def find_sets(names: Collection[str]) -> list[WeightSet]:
    """Every set of weight files among `names` (of one folder), not yet checked for gaps."""
    sets = []
    for pattern in _PATTERNS:
        matches = [m for name in names if (m := pattern.regex.fullmatch(name))]
        matches.sort(key=lambda m: (int(m.groupdict().get("number") or 0), m[0]))
        alike: dict[str, list[str]] = {}
        for m in matches:
            alike.setdefault(pattern.label or _label(m), []).append(m[0])
        index = pattern.index if pattern.index in names else None
        sets += [WeightSet(label, tuple(files), index, pattern.origin) for label, files in alike.items()]
    return sets


def _label(match: re.Match[str]) -> str:
    """The name with `*` for its numbers: `consolidated.*.pth`."""
    text = match[0]
    spans = [match.span(group) for group in ("number", "count") if group in match.re.groupindex]
    for start, end in reversed(spans):
        text = f"{text[:start]}*{text[end:]}"
    return text


def refuse_flat(chosen: str, names: Collection[str]) -> None:
    """Fail with `unsupported` where the file `chosen` is a shard of flat parameters as metaseq's training
    saves them (those of OPT-175B): its number, or others of the same part among `names`, tell."""
    own = _FLAT.fullmatch(chosen)
    others = [m for n in names if own and (m := _FLAT.fullmatch(n)) and m["run"] == own["run"]]
    if own is not None and (int(own["shard"]) or any(int(m["shard"]) for m in others)):
        fail(
            "unsupported",
            f"expected joined parts, found FSDP shards of metaseq ({max(len(others), 1)} of {own['run']})",
            file=chosen,
            hint="metaseq's scripts/reshard_fsdp.py with --unflatten-weights True joins those of each part",
        )


def loose_set(names: Collection[str]) -> WeightSet | None:
    """All safetensors beside a config.json whose names say nothing, as OpenAI's loader takes them; None where
    there are none, or not those of a model."""
    found = [n for n in names if n.endswith(".safetensors") and "/" not in n and not _NO_MODEL.match(n)]
    if not found or "config.json" not in names:
        return None
    found.sort(key=lambda n: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", n)])
    return WeightSet(found[0] if len(found) == 1 else "safetensors files", tuple(found), None, "original")


def choose(
    names: Collection[str],
    *,
    file: str,
    prefer: Prefer | None = None,
    expected: Iterable[str] = (),
    inner: bool = False,
    listed: Callable[[str], Collection[str]] = lambda index: (),
) -> WeightSet | None:
    """The one set to open among `names`, complete; None when there is none (of the kind `prefer`).

    `inner` are those of a folder `original`, which holds originals whatever they are called. `expected` are
    weight files that a checklist says there should be, `listed` gives those that an index lists. Kinds:
    `ambiguous-input` when more than one set could be meant, `missing-shard` when the set has gaps.
    """
    sets = [replace(s, origin="original") if inner else s for s in find_sets(names)]
    original = [s for s in sets if s.origin == "original"]
    converted = [s for s in sets if s.origin == "hf"]
    notes: list[str] = []
    if prefer is None and original and converted and "params.json" not in names:
        _ambiguous([*original, *converted], file)
    candidates = original or converted if prefer is None else original if prefer == "original" else converted
    if original and converted and candidates:
        left = converted if candidates is original else original
        chosen = "the original" if candidates is original else "the Hugging Face"
        notes.append(f"{chosen} weights were taken; {', '.join(s.label for s in left)} were left aside")
    safe = [s for s in candidates if s.label.endswith(".safetensors")]
    if candidates is converted and len(safe) == 1 and len(candidates) > 1:
        notes.append("the safetensors weights were taken; pytorch_model*.bin were left aside")
        candidates = safe
    if len(candidates) > 1:
        _ambiguous(candidates, file)
    if not candidates:
        return None
    chosen_set = candidates[0]
    refuse_flat(chosen_set.files[0], names)
    check_finished(chosen_set, names, file=file)
    notes += adapter_notes(names)
    if chosen_set.index is not None and any(_gaps(chosen_set, file, expected)):
        chosen_set = by_index(chosen_set, listed(chosen_set.index))
        notes += chosen_set.notes
    check_complete(chosen_set, file=file, expected=expected)
    return replace(chosen_set, notes=tuple(notes))


def by_index(found: WeightSet, listed: Collection[str]) -> WeightSet:
    """`found` without the files that its index does not list, where all that it lists are there: a second set
    of shards, of another save, has names of the same pattern."""
    own, strays = ([f for f in found.files if (f in listed) == wanted] for wanted in (True, False))
    if not strays or not own or len(own) != len(listed):
        return found
    more = f" and {len(strays) - 1} more" if len(strays) > 1 else ""
    note = f"{strays[0]}{more} left aside: {found.index} does not list {'them' if more else 'it'}"
    return replace(found, files=tuple(own), notes=(*found.notes, note))


def adapter_notes(names: Collection[str]) -> list[str]:
    """What is said of an adapter beside a model."""
    said = "the adapter beside the weights (adapter_config.json) was left aside, not merged"
    return [said] if "adapter_config.json" in names else []


def locate(
    names: Collection[str],
    *,
    file: str,
    prefer: Prefer | None = None,
    checklist: Callable[[str], Iterable[str]] = lambda within: (),
    state: Callable[[str], str] = lambda within: "",
    listed: Callable[[str], Collection[str]] = lambda index: (),
) -> tuple[str, WeightSet] | None:
    """(where the weights are: "" or "original/", the set to open), from the names in a folder.

    `prefer` is a wish: where only the other kind is there, that is taken. `checklist` gives the weight files
    that the publisher's checklist in one of the two places lists, `state` the text of TensorFlow's state file
    there, `listed` the files that an index lists. A bundle of TensorFlow is taken where nothing else is
    meant.
    """
    here = [n for n in names if "/" not in n]
    inner = [n.removeprefix(ORIGINAL_FOLDER) for n in names if n.startswith(ORIGINAL_FOLDER)]
    places = (("", here), (ORIGINAL_FOLDER, inner))
    for wish in dict.fromkeys((prefer, None)):
        for within, inside in places:
            label = f"{file}/{within}".rstrip("/")
            chosen = choose(
                inside,
                file=label,
                prefer=wish,
                expected=checklist(within),
                inner=bool(within),
                listed=partial(_within, within, listed),
            )
            if chosen is None:
                continue
            if not within and chosen.origin == "hf" and find_sets(inner):
                note = f"the folder {ORIGINAL_FOLDER} holds weights too; they were left aside"
                chosen = replace(chosen, notes=(*chosen.notes, note))
            if within and (beside := find_sets(here)):
                left = ", ".join(s.label for s in beside)
                note = f"{left} beside {ORIGINAL_FOLDER} left aside: to read those, give one of the files"
                chosen = replace(chosen, notes=(*chosen.notes, note))
            aside = [f"the TensorFlow checkpoint {p} was left aside" for p in bundles(inside)]
            if chosen.files == (WHOLE,) and (loose := loose_set(inside)) is not None:
                aside += [f"{f} was left aside" for f in loose.files if f != WHOLE]
            return within, replace(chosen, notes=(*chosen.notes, *aside))
        for within, inside in places if wish != "hf" else ():
            label = f"{file}/{within}".rstrip("/")
            bundle = _bundle(inside, file=label, state=partial(state, within))
            if bundle is not None:
                return within, bundle
        for within, inside in places if wish != "hf" else ():
            label, known = f"{file}/{within}".rstrip("/"), find_sets(inside)
            if any(s.index is not None for s in known) or (loose := loose_set(inside)) is None:
                continue
            if WHOLE in loose.files and (len(known) > 1 or len(loose.files) > 1):
                continue  # the name that all loaders know says what is the model, and what lies beside it
            for one in known:
                check_complete(one, file=label)
            check_finished(loose, inside, file=label)
            return within, replace(loose, notes=tuple(adapter_notes(inside)))
    return None


def _within(within: str, listed: Callable[[str], Collection[str]], index: str) -> Collection[str]:
    """The files that `index` in a part of a folder lists."""
    return listed(within + index)


def _bundle(names: Collection[str], *, file: str, state: Callable[[], str]) -> WeightSet | None:
    """The bundle of TensorFlow among `names`; of several, the one that the state file names. Kinds:
    `ambiguous-input`, `truncated`."""
    found = bundles(names)
    if not found:
        return None
    prefix, *others = found
    notes: tuple[str, ...] = ()
    if others:
        chosen = newest(state())
        if chosen not in found:
            fail(
                "ambiguous-input",
                f"expected one TensorFlow checkpoint, found {len(found)}: {', '.join([*found][:8])}",
                file=file,
                hint="give the one that is meant by its index: --in FOLDER/PREFIX.index",
            )
        prefix = chosen
        notes = (
            f"of {len(found)} TensorFlow checkpoints {prefix} was taken, which the file `checkpoint` names",
        )
    return bundle_set(prefix, names, file=file, notes=notes)


def bundle_set(prefix: str, names: Collection[str], *, file: str, notes: tuple[str, ...] = ()) -> WeightSet:
    """The bundle `prefix` among `names`, its download finished."""
    found = WeightSet(f"{prefix}.index", bundles(names)[prefix], None, "original", notes)
    check_finished(found, names, file=file)
    return found


def set_of(name: str, names: Collection[str]) -> WeightSet | None:
    """The set of several files among `names`, or of numbered ones, that the file `name` is one of: where
    these say how many there are, those that say the same."""
    several = (s for s in find_sets(names) if s.numbered or len(s.files) > 1)
    found = next((s for s in several if name in s.files), None)
    if found is None or (count := _count(name)) is None:
        return found
    return replace(found, files=tuple(f for f in found.files if _count(f) == count))


def is_one_of_several(found: WeightSet, names: Collection[str]) -> bool:
    """Whether `names` have another set of shards of the pattern of `found`, of another number of them."""
    return any(s.label == found.label and len(s.files) > len(found.files) for s in find_sets(names))


def _count(name: str) -> int | None:
    """How many files there are of the set that `name` is one of, as it says."""
    found = next((m for p in _PATTERNS if (m := p.regex.fullmatch(name))), None)
    count = None if found is None else found.groupdict().get("count")
    return None if count is None else int(count)


def _ambiguous(sets: list[WeightSet], file: str) -> None:
    found = " and ".join(s.label for s in sets)
    fail(
        "ambiguous-input",
        f"expected one set of weights, found {found} side by side",
        file=file,
        hint="give the path of one of the weight files to say which set is meant",
    )


def check_finished(found: WeightSet, names: Collection[str], *, file: str) -> None:
    """Fail with `truncated` where a file beside the weights says that a download of one of them was not
    finished. aria2 makes a file in its full size at once, and keeps its own beside until all is there; other
    programs give the file another name."""
    for name in names:
        whole = unfinished(name)
        if whole is None or (whole in names and not name.endswith(".aria2")):
            continue
        if whole in found.files or any(s.label == found.label for s in find_sets([whole])):
            message = f"expected all of {whole}, found {name}, of a download that was not finished"
            fail("truncated", message, file=file, hint=f"finish the download, or remove {name} if it is")


FETCH_IT = "download what is missing too"
_APART = "move those that are not meant to a folder of their own"


def check_complete(found: WeightSet, *, file: str, expected: Iterable[str] = ()) -> None:
    """Fail with `missing-shard` (which numbers) or `ambiguous-input` unless each shard is there once."""
    fail_all(_gaps(found, file, expected))


def _gaps(found: WeightSet, file: str, expected: Iterable[str] = ()) -> Iterator[Problem]:
    if not found.numbered:
        return
    pattern = next(p for p in _PATTERNS if p.regex.fullmatch(found.files[0]))
    matches = [m for name in found.files if (m := pattern.regex.fullmatch(name))]
    listed = [m for name in expected if (m := pattern.regex.fullmatch(name))]
    numbers = [int(m["number"]) for m in matches]
    counts = {int(m["count"]) for m in matches if "count" in pattern.regex.groupindex}
    twice = sorted({n for n in numbers if numbers.count(n) > 1})
    if twice and len(counts) < 2:
        both = ", ".join(m[0] for m in matches if int(m["number"]) in twice)
        yield Problem("ambiguous-input", f"expected each shard once, found {both}", file, hint=_APART)
    if len(counts) > 1:
        shown = ", ".join(str(c) for c in sorted(counts))
        message = f"expected shards of one set, found sets of {shown} side by side"
        hint = f"give one file of the set that is meant: --in FOLDER/{found.files[0]}"
        yield Problem("ambiguous-input", message, file, hint=hint)
    else:
        last = max([*numbers, *(int(m["number"]) for m in listed)])
        present, first = set(numbers), pattern.first
        count = counts.pop() if counts else last - first + 1
        if 0 in present and first:  # counted from 0, where `count` is how many, or as of gpt-oss the last
            first, count = 0, count + (count in present)
        wanted = range(first, first + count)
        missing = [n for n in wanted if n not in present]
        stray = sorted(present - set(wanted))
        if missing:
            sample = matches[0]
            names = ", ".join(_renumber(sample, n) for n in missing[:8])
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            message = f"expected {count} shards, found {len(present & set(wanted))}: {names}{more} not there"
            yield Problem("missing-shard", message, file, hint=FETCH_IT)
        if stray:
            message = f"expected shards up to {wanted[-1]}, found number {stray[-1]}"
            yield Problem("ambiguous-input", message, file, hint=_APART)


def _renumber(sample: re.Match[str], number: int) -> str:
    start, end = sample.span("number")
    return f"{sample[0][:start]}{number:0{end - start}d}{sample[0][end:]}"
