"""What Megatron-LM checkpoints of every age call their tensors, and which of their files hold which.

The tables of the families use one set of names for all ages, with layers numbered through the whole model:
those of the checkpoints up to v2.0 without the dicts around them. `AGES` says what each age calls the same
tensors, and `open_run` where they are: in which file of which pipeline stage, under which name there.

Source: NVIDIA/Megatron-LM v1.0, v2.0, v2.5, 23.06 and core_v0.9.0 (model/language_model.py, transformer.py,
bert_model.py; core/models).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint, TensorFile, TensorInfo
from ckpt_tool.checkpoint.megatron import arguments, check_complete, check_same_run, grid
from ckpt_tool.convert.crosscheck import rank_problems
from ckpt_tool.convert.source import Source
from ckpt_tool.errors import CkptToolError, Problem, fail, fail_all, printable

VERSIONS = (0.0, 1.0, 2.0, 3.0)

# Names of the tables, less the last word: "weight" and "bias" unless said otherwise below.
LAYER = (
    "layers.{i}.input_layernorm.",
    "layers.{i}.attention.query_key_value.",
    "layers.{i}.attention.dense.",
    "layers.{i}.post_attention_layernorm.",
    "layers.{i}.mlp.dense_h_to_4h.",
    "layers.{i}.mlp.dense_4h_to_h.",
)
FIRST = ("word_embeddings.", "position_embeddings.", "tokentype_embeddings.")
LAST = (
    "final_layernorm.",
    "word_embeddings_for_head.",
    "output_layer.",
    "pooler.dense.",
    "lm_head.",
    "lm_head.dense.",
    "lm_head.layernorm.",
    "binary_head.",
)
_ONLY = {"lm_head.": "bias", "word_embeddings_for_head.": "weight", "output_layer.": "weight"} | {
    stem: "weight" for stem in FIRST
}

BERT_ONLY = ("tokentype_embeddings.weight", "lm_head.bias", "lm_head.dense.weight", "binary_head.weight")


def _nested(block: str, attention: str, norm: str, embedding: str = "embedding.") -> dict[str, str]:
    """The ages that nest everything under language_model."""
    root, layer = "language_model.", f"language_model.{block}.layers.{{i}}."
    own = (
        f"{layer}input_{norm}.",
        f"{layer}{attention}.query_key_value.",
        f"{layer}{attention}.dense.",
        f"{layer}post_attention_{norm}.",
        f"{layer}mlp.dense_h_to_4h.",
        f"{layer}mlp.dense_4h_to_h.",
        *(f"{root}{embedding}{stem}" for stem in FIRST),
        f"{root}{block}.final_{norm}.",
        "word_embeddings_for_head.",
        f"{root}output_layer.",
        f"{root}pooler.dense.",
        "lm_head.",
        "lm_head.dense.",
        f"lm_head.{norm}.",
        "binary_head.",
    )
    return dict(zip((*LAYER, *FIRST, *LAST), own, strict=True))


def _core(block: str, norm_1: str, norm_2: str) -> dict[str, str]:
    layer = f"{block}.layers.{{i}}."
    own = (
        f"{layer}{norm_1}",
        f"{layer}self_attention.linear_qkv.",
        f"{layer}self_attention.linear_proj.",
        f"{layer}{norm_2}",
        f"{layer}mlp.linear_fc1.",
        f"{layer}mlp.linear_fc2.",
        *(f"embedding.{stem}" for stem in FIRST),
        f"{block}.final_layernorm.",
        "output_layer.",
        "output_layer.",
        "pooler.dense.",
        "output_layer.",
        "lm_head.dense.",
        "lm_head.layer_norm.",
        "binary_head.",
    )
    return dict(zip((*LAYER, *FIRST, *LAST), own, strict=True))


_APART = ("input_layernorm.", "pre_mlp_layernorm.")
_FUSED = ("self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_")

# Age -> what it calls the tensors of the tables. In Megatron-Core the copy of the embedding on the last stage
# and an output layer of its own have one name.
AGES: dict[str, dict[str, str]] = {
    "transformer": _nested("transformer", "attention", "layernorm"),  # to v2.0, 2020
    "encoder": _nested("encoder", "self_attention", "layernorm"),  # 2021 to 2023
    "norm": _nested("encoder", "self_attention", "norm"),  # 2023 on
    "flat": _nested("transformer", "attention", "layernorm", embedding=""),  # 2019
    "bare": {
        k: v.removeprefix("language_model.")
        for k, v in _nested("transformer", "attention", "layernorm", embedding="").items()
    },
    "core": _core("decoder", *_APART),
    "core-fused": _core("decoder", *_FUSED),
    "core-bert": _core("encoder", *_APART),
    "core-bert-fused": _core("encoder", *_FUSED),
}


def _dicts(age: str) -> tuple[str, ...]:
    if is_core(age):
        return ("model",)
    whole: tuple[str, ...] = ("", "language_model", "language_model.pooler", "lm_head", "binary_head")
    if age not in ("flat", "bare"):
        parts = ("embedding", "encoder", "transformer", "output_layer")
        whole += ("word_embeddings_for_head", *(f"language_model.{part}" for part in parts))
        whole += tuple(f"language_model.embedding.{stem[:-1]}" for stem in FIRST)
    return tuple(f"model.{name}".rstrip(".") for name in whole)


def is_core(age: str) -> bool:
    return age.startswith("core")


# The dicts that an age's tensors stand in; inside the innermost, the rest of a name is one key.
DICTS = {age: _dicts(age) for age in AGES}


@cache
def own_names(age: str) -> dict[str, str]:
    """Name in the tables, `{i}` for a layer, -> name in a file of this age."""
    return {
        stem + kind: own + kind
        for stem, own in AGES[age].items()
        for kind in ([_ONLY[stem]] if stem in _ONLY else ["weight", "bias"])
    }


@dataclass(frozen=True)
class Run:
    """A Megatron checkpoint, sorted out, and what its files say of the run. `source.told` are the pickled
    args, None where the file has none; `version` is 0 where it does not say."""

    source: Source
    age: str
    files: list[list[str]]  # [rank][stage]
    chunks: int
    version: float
    says_version: bool
    iteration: int | None

    @property
    def args(self) -> Mapping[str, Any] | None:
        return self.source.told

    @property
    def tensors(self) -> Mapping[str, tuple[TensorInfo, ...]]:
        return self.source.tensors


def age_of(names: Iterable[str]) -> str | None:
    """The age whose names these are, with or without the `model` before them; None for other names."""
    bare = {own for _, own in map(_without_model, names)}
    first = re.compile(r"(?<=layers\.)\d+(?=\.)")
    bare |= {first.sub("{i}", n) for n in bare}
    wanted = [stem + kind for stem in LAYER for kind in ("weight", "bias")]
    known = [age for age in AGES if all(own_names(age)[n] in bare for n in wanted)]
    return next((age for age in known if own_names(age)["word_embeddings.weight"] in bare), None)


def _without_model(name: str) -> tuple[str, str]:
    """(number of the virtual stage as text, the rest) of `model0.x`; ("", name) without a `model`."""
    m = re.match(r"model(\d{0,4})\.", name)
    return ("", name) if m is None else (m[1], name[m.end() :])


def recognise(checkpoint: Checkpoint, bert: bool) -> tuple[bool, str]:
    try:
        names = checkpoint.names()
        age = age_of(names)
    except CkptToolError as error:
        return False, error.problems[0].message
    if age is None:
        return False, "no Megatron names such as language_model.embedding.word_embeddings.weight"
    held = {_without_model(n)[1] for n in names}
    heads = [n for n in BERT_ONLY if own_names(age)[n] in held]
    if bool(heads) != bert:
        return (
            False,
            f"Megatron names with {heads[0]}" if heads else "Megatron names without the heads of BERT",
        )
    return True, f"Megatron names of the age `{age}`" + (f", with {heads[0]}" if heads else "")


def open_run(checkpoint: Checkpoint) -> Run:
    """Sort out the files. Kinds: `already-converted`, `unsupported` (names of no known age), `missing-shard`,
    `shard-conflict`, `config-mismatch` (an unknown checkpoint_version)."""
    names = checkpoint.names()
    label = checkpoint.path.name
    age = age_of(names)
    if age is None:
        if any(re.match(r"bert\.|transformer\.h\.|cls\.", n) for n in names):
            fail(
                "already-converted",
                f"expected an original layout, found Hugging Face names such as {names[0]}",
                file=label,
                hint="nothing to convert; `ckpt-tool verify` checks it and `--to original` goes back",
            )
        if any(".distcp" in n for n in checkpoint.files):
            fail("wrong-format", "expected ranks, found a torch_dist checkpoint", file=label)
        check_same_run(checkpoint)
        shown = ", ".join(printable(n, 60) for n in names[:3]) or "none"
        fail("unsupported", f"expected tensor names of a Megatron of some age, found {shown}", file=label)
    check_same_run(checkpoint)
    files = grid(checkpoint)
    ranks = [_by_table_name(checkpoint, stages, age) for stages in files]
    fail_all(_rank_problems(files, [r.own for r in ranks]))
    tensors = {n: tuple(rank.tensors[n] for rank in ranks) for n in ranks[0].tensors}
    first = checkpoint.files[files[0][0]]
    version = _version(first)
    told = arguments(first)
    source = Source(checkpoint, tensors, len(files), ranks[0].layers, told, "", len(files[0]))
    _check_shares(source)
    iteration = _iteration(first)
    return Run(source, age, files, ranks[0].chunks, version or 0.0, version is not None, iteration)


def _iteration(file: TensorFile) -> int | None:
    found = file.metadata.get("iteration")
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _version(file: TensorFile) -> float | None:
    """checkpoint_version: 0 is written by nobody and what a file without one has."""
    if "checkpoint_version" not in file.metadata:
        return None
    found = file.metadata["checkpoint_version"]
    if isinstance(found, bool) or not isinstance(found, int | float) or found not in VERSIONS:
        shown = printable(repr(found), 60) if isinstance(found, int | float | str) else "another type"
        fail(
            "config-mismatch",
            f"expected checkpoint_version 0, 1.0, 2.0 or 3.0, found {shown}",
            file=file.name,
            where="checkpoint_version",
            hint="it says in which order the rows of query_key_value are; no other order is known",
        )
    return float(found)


@dataclass(frozen=True)
class _Rank:
    """One tensor-parallel rank. `own` lists, for each file, the model's tensors in it."""

    tensors: dict[str, TensorInfo]  # by their names in the tables
    own: dict[str, dict[str, TensorInfo]]
    chunks: int
    layers: int


def _by_table_name(checkpoint: Checkpoint, stages: list[str], age: str) -> _Rank:
    """The stages of a rank joined. A stage counts its layers from 0; they follow on those of the stage
    before, and with virtual stages (`model0`, `model1`, ...) the first of every stage comes before any
    second."""
    table = {own: name for name, own in own_names(age).items()}
    if is_core(age):  # one name for two things; which one it is the families decide
        table[own_names(age)["output_layer.weight"]] = "output_layer.weight"
    parts: dict[tuple[int, int], list[tuple[str, int | None, TensorInfo]]] = {}
    own: dict[str, dict[str, TensorInfo]] = {}
    for stage, file in enumerate(stages):
        own[file] = {}
        tensors = checkpoint.files[file].tensors
        prefixed = any(re.match(r"model\d*\.", n) for n in tensors)
        for name, tensor in tensors.items():
            chunk, rest = _without_model(name)
            if prefixed and rest == name:
                continue
            number = re.search(r"(?<=layers\.)\d{1,6}(?=\.)", rest)
            template = rest if number is None else rest[: number.start()] + "{i}" + rest[number.end() :]
            if template in table:
                layer = None if number is None else int(number[0])
                parts.setdefault((int(chunk or 0), stage), []).append((table[template], layer, tensor))
                own[file][name] = tensor
    chunks = 1 + max((chunk for chunk, _ in parts), default=0)
    problems = [
        Problem("missing-tensor", f"expected tensors of model{c}, as on other stages, found none", file)
        for c in range(chunks)
        for stage, file in enumerate(stages)
        if (c, stage) not in parts
    ]
    found: dict[str, TensorInfo] = {}
    before = 0
    for (_, stage), entries in sorted(parts.items(), key=lambda item: item[0]):
        here = {layer for _, layer, _ in entries if layer is not None}
        if here != set(range(len(here))):
            shown = ", ".join(map(str, sorted(here)[:8]))
            message = f"expected the stage's layers 0 to {len(here) - 1}, found {shown}"
            problems.append(Problem("missing-tensor", message, stages[stage], "layers"))
        for name, layer, tensor in entries:
            full = name if layer is None else name.replace("{i}", str(before + layer))
            if full in found:
                message = f"expected the tensor on one stage, found it in {found[full].file} too"
                problems.append(Problem("shard-conflict", message, tensor.file, tensor.name))
            found[full] = tensor
        before += len(here)
    fail_all(problems)
    return _Rank(found, own, chunks, before)


def _rank_problems(files: list[list[str]], own: list[dict[str, dict[str, TensorInfo]]]) -> Iterator[Problem]:
    """Where the ranks of a stage differ in names, shapes or dtypes: every rank holds an equal share."""
    for stage in range(len(files[0])):
        column = [row[stage] for row in files]
        yield from rank_problems(column, {f: own[t][f] for t, f in enumerate(column)})


def _check_shares(source: Source) -> None:
    """Fail with `missing-shard` where a last stage is not there, or where the output projection of attention,
    of which each rank holds its heads' columns, says that there are more ranks."""
    if "final_layernorm.weight" not in source.tensors and "word_embeddings.weight" in source.tensors:
        why = "no file holds the final norm, which is on the last stage"
        check_complete(source.checkpoint, stages=source.stages + 1, why=why)
    shape = source.tensors["layers.0.attention.dense.weight"][0].shape
    if len(shape) != 2 or not shape[1] or (source.told or {}).get("kv_channels"):
        return
    wanted = shape[0] // shape[1]
    if shape[0] == wanted * shape[1] and wanted > source.ranks:
        why = f"each holds {shape[1]} of {shape[0]} columns of attention.dense"
        check_complete(source.checkpoint, ranks=wanted, why=why)
