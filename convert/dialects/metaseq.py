"""What metaseq calls OPT's tensors, and which of its files hold which: the tables, and a download sorted out.

The tables leave out what stands before every name, `model.decoder.` as a rule. A rank's fused projection
holds the keys of its heads, then their values, then their queries, whatever its name says.

Source: facebookresearch/metaseq @f7ffa5fd (models/transformer.py, model_parallel, scripts/reshard_mp.py).
Linear weights are (out, in) on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt_tool.checkpoint.base import Checkpoint, TensorInfo
from ckpt_tool.checkpoint.pickle_records import plain
from ckpt_tool.convert.crosscheck import rank_problems
from ckpt_tool.convert.layout import Rule, rule
from ckpt_tool.convert.plan import natural
from ckpt_tool.convert.source import Source, layer_count
from ckpt_tool.errors import fail, fail_all

S, T = "layers.{i}.", "model.decoder.layers.{i}."
PROJECTIONS = ("k", "v", "q")  # in the order of the fused tensor


def _both(
    source: str,
    target: str,
    weight: str,
    bias: str,
    *,
    split: str | None = None,
    split_bias: str | None = None,
) -> tuple[Rule, Rule]:
    return (
        rule(f"{source}.weight", f"{target}.weight", weight, split=split),
        rule(f"{source}.bias", f"{target}.bias", bias, split=split_bias),
    )


FUSED = tuple(
    rule(
        f"{S}self_attn.qkv_proj.{kind}",
        tuple(f"{T}self_attn.{p}_proj.{kind}" for p in PROJECTIONS),
        pattern,
        cut=("s", (1, 1, 1)),
        split="x",
    )
    for kind, pattern in (("weight", "(s x) d"), ("bias", "(s x)"))
)
APART = tuple(
    row
    for p in PROJECTIONS
    for row in _both(
        f"{S}self_attn.{p}_proj", f"{T}self_attn.{p}_proj", "x d", "x", split="x", split_bias="x"
    )
)
LAYER = (
    *_both(f"{S}self_attn.out_proj", f"{T}self_attn.out_proj", "d x", "d", split="x"),
    *(
        rule(f"{S}{norm}.{kind}", f"{T}{norm}.{kind}", "d")
        for norm in ("self_attn_layer_norm", "final_layer_norm")
        for kind in ("weight", "bias")
    ),
    *_both(f"{S}fc1", f"{T}fc1", "f d", "f", split="f", split_bias="f"),
    *_both(f"{S}fc2", f"{T}fc2", "d f", "d", split="f"),
)
WORDS = rule("embed_tokens.weight", "model.decoder.embed_tokens.weight", "v e", split="v")
POSITIONS = rule("embed_positions.weight", "model.decoder.embed_positions.weight", "p d")
PROJECTED = (
    rule("project_in_dim.weight", "model.decoder.project_in.weight", "d e"),
    rule("project_out_dim.weight", "model.decoder.project_out.weight", "e d"),
)
NORM = _both("layer_norm", "model.decoder.final_layer_norm", "d", "d")


@dataclass(frozen=True)
class Form:
    """What metaseq's files differ in. `head`: the output layer is stored too, "whole" or as a "share"."""

    fused: bool
    projected: bool
    norm: bool
    head: str | None = None

    def table(self) -> tuple[Rule, ...]:
        head = rule(
            "output_projection.weight",
            "model.decoder.embed_tokens.weight",
            "v e",
            split="v" if self.head == "share" else None,
            tied=True,
        )
        rows = (WORDS, *((head,) if self.head else ()), POSITIONS)
        rows += (*(PROJECTED if self.projected else ()), *(FUSED if self.fused else APART), *LAYER)
        return (*rows, *(NORM if self.norm else ()))


VERSION = "version"
IGNORED = {
    rf"(.*\.)?{VERSION}": "the version of metaseq's format, 3 in every OPT",
    r"(last_optimizer_state|optimizer_history|extra_state)\..*": "state of the training run",
}
IGNORED_HF = {"lm_head.weight": "the same as the embedding"}

# --- the original's files -------------------------------------------------------------------------------


def prefix_of(names: Iterable[str]) -> str | None:
    """What stands before every name of the model; None when these are no names of metaseq's."""
    found = {n.removesuffix("embed_tokens.weight") for n in names if n.endswith("embed_tokens.weight")}
    return found.pop() if len(found) == 1 else None


def is_converted(checkpoint: Checkpoint, prefix: str, names: set[str]) -> bool:
    """Most names are the same on both sides; those of the last norm and the projections are not."""
    if "config.json" in checkpoint.documents:
        return True
    return any(f"{prefix}{n}.weight" in names for n in ("final_layer_norm", "project_in"))


def form_of(source: Source) -> Form:
    head, words = source.first("output_projection.weight"), source.first("embed_tokens.weight")
    whole = head is not None and words is not None and head.shape[:1] != words.shape[:1]
    return Form(
        fused="layers.0.self_attn.qkv_proj.weight" in source.tensors,
        projected="project_in_dim.weight" in source.tensors,
        norm="layer_norm.weight" in source.tensors,
        head=None if head is None else "whole" if whole else "share",
    )


def open_original(checkpoint: Checkpoint) -> Source:
    """Sort out the files. Kinds: `already-converted`, `unsupported`, `shard-conflict`, `missing-shard`."""
    label, names = checkpoint.path.name, set(checkpoint.names())
    prefix = prefix_of(names)
    if prefix is None:
        sharded = any("shard_metadata" in f.metadata for f in checkpoint.files.values())
        if sharded:
            hint = "metaseq's scripts/reshard_fsdp.py joins them to one file for each model-parallel rank"
            fail("unsupported", "expected joined files, found FSDP shards", file=label, hint=hint)
        fail("missing-tensor", "expected this tensor, found none", where="decoder.embed_tokens.weight")
    if is_converted(checkpoint, prefix, names):
        hint = "nothing to convert; `ckpt-tool verify` checks it and `--to original` goes back"
        message = "expected metaseq's layout, found that of Hugging Face"
        fail("already-converted", message, file=label, hint=hint)
    files = sorted(checkpoint.files, key=natural)
    tensors: dict[str, tuple[TensorInfo, ...]] = {}
    for file in files:
        for name, tensor in checkpoint.files[file].tensors.items():
            if name.startswith(prefix):
                short = name.removeprefix(prefix)
                tensors[short] = (*tensors.get(short, ()), tensor)
    if len(files) > 1:
        by_file = {f: _of_model(checkpoint.files[f].tensors, prefix) for f in files}
        fail_all(rank_problems(files, by_file))
    layers = layer_count(tensors, r"layers\.(\d+)\.")
    told = settings_of(checkpoint, files)
    source = Source(checkpoint, tensors, len(files), layers, told, prefix)
    _check_ranks(source)
    return source


def _of_model(tensors: Mapping[str, TensorInfo], prefix: str) -> dict[str, TensorInfo]:
    return {n: t for n, t in tensors.items() if n.startswith(prefix)}


def settings_of(checkpoint: Checkpoint, files: Sequence[str]) -> dict[str, Any] | None:
    """What `cfg` or, before it, `args` of the first file say about the model; None where there is neither.
    References to other settings ("${...}") say nothing."""
    metadata = checkpoint.files[files[0]].metadata
    found: dict[str, Any] = {}
    for key in ("args", "cfg"):
        value = plain(metadata.get(key))
        inner = value.get("model") if isinstance(value, dict) else None
        for part in (value, inner):
            if isinstance(part, dict):
                found |= {
                    k: v
                    for k, v in part.items()
                    if isinstance(v, int | float | str) and not (isinstance(v, str) and "${" in v)
                }
    return found or None


def _check_ranks(source: Source) -> None:
    """The output projection of a rank has columns for its heads, so it tells how many ranks there are."""
    found = source.first("layers.0.self_attn.out_proj.weight")
    if found is None or len(found.shape) != 2 or not found.shape[1] or found.shape[0] % found.shape[1]:
        return
    ranks = found.shape[0] // found.shape[1]
    if ranks != source.ranks:
        fail(
            "missing-shard" if ranks > source.ranks else "shard-conflict",
            f"expected {ranks} parts (each has 1/{ranks} of the heads), found {source.ranks}: "
            f"{', '.join(list(source.checkpoint.files)[:16])}",
            file=source.checkpoint.path.name,
        )
