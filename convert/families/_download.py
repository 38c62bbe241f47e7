"""The files of a `consolidated.*` download: what kind of model they hold, and which holds what.

Two ways of sharing a model out to files are told apart by their tensor names: model-parallel ranks hold the
same names, each a share of the tensor; otherwise files hold whole tensors under names of their own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckpt_tool.checkpoint.base import Checkpoint, TensorInfo
from ckpt_tool.convert.crosscheck import rank_problems
from ckpt_tool.convert.plan import Value, natural
from ckpt_tool.errors import CkptToolError, Problem, fail, fail_all

_NOT_PLAIN_TEXT = (
    (r"(model\.)?vision_|patch_merger\.|pre_mm_projector_norm|text_model\.", "an image encoder"),
    (r".*lora_[AB]", "LoRA factors, which must be merged into the weights first"),
)
_CONVERTED = re.compile(r"model\.(layers|embed_tokens|norm)\.|lm_head\.")


# --- recognising ----------------------------------------------------------------------------------------


def foreign(names: Sequence[str]) -> str | None:
    """Why tensors of these names are no plain text model in an original layout; None when they may be."""
    if any(_CONVERTED.match(n) for n in names):
        return "the tensors have Hugging Face names already"
    for pattern, what in _NOT_PLAIN_TEXT:
        if name := next((n for n in names if re.match(pattern, n)), None):
            return f"not a plain text model: holds {what} ({name})"
    return None


def feed_forward(names: Sequence[str]) -> str | None:
    """Which feed-forward the tensors are of: "dense", "experts" (one tensor each), "stacked" experts."""
    held = set(names)
    if "layers.0.feed_forward.experts.0.w1.weight" in held or "layers.0.feed_forward.gate.weight" in held:
        return "experts"
    if "layers.0.block_sparse_moe.w1" in held or "layers.0.block_sparse_moe.gate.weight" in held:
        return "stacked"
    return "dense" if "layers.0.feed_forward.w1.weight" in held else None


def params_keys(checkpoint: Checkpoint) -> set[str]:
    """The fields of params.json that hold a value; none when it is missing or cannot be read (planning says
    why)."""
    if "params.json" not in checkpoint.documents:
        return set()
    try:
        params = checkpoint.json("params.json")
    except CkptToolError:
        return set()
    inner = params.get("model")
    return {k for k, v in (inner if isinstance(inner, dict) else params).items() if v is not None}


def equal_names(checkpoint: Checkpoint) -> bool:
    """Several files that hold the same names: model-parallel ranks."""
    sets = [set(f.tensors) for f in checkpoint.files.values()]
    return len(sets) > 1 and all(s == sets[0] for s in sets)


# --- the original's files -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Download:
    """An original checkpoint with its files sorted out: `tensors` holds each name once for every rank, in the
    order of the ranks; `ranks` is 1 where files hold whole tensors."""

    checkpoint: Checkpoint
    tensors: Mapping[str, tuple[TensorInfo, ...]]
    ranks: int
    layers: int

    def places(self, name: str) -> list[tuple[str, str]]:
        return [(t.file, t.dtype) for t in self.tensors.get(name, ())]

    def size(self, name: str, dimension: int, *, shared: bool = True) -> Value | None:
        """The size that most tensors called `name` ({i}: of any layer) have, over all ranks if `shared`."""
        names = [name.format(i=i) for i in range(self.layers)] if "{i}" in name else [name]
        found = [t for n in names for t in self.tensors.get(n, ())[:1] if len(t.shape) > dimension]
        if not found:
            return None
        each, _ = Counter(t.shape[dimension] for t in found).most_common(1)[0]
        what = ("rows", "columns")[dimension] if len(found[0].shape) == 2 else "length"
        over = f" over {self.ranks} ranks" if shared and self.ranks > 1 else ""
        return Value(each * (self.ranks if shared else 1), f"{what} of {found[0].name}{over}")

    @property
    def dtype(self) -> str:
        """The safetensors name of the dtype that most tensors have."""
        count = Counter(ts[0].dtype for n, ts in self.tensors.items() if not n.endswith("rope.freqs"))
        return count.most_common(1)[0][0]


def open_download(checkpoint: Checkpoint) -> Download:
    """Sort out the files. Fails for what is no plain text original (`already-converted`, `unsupported`) and
    for ranks that do not belong together (`shard-conflict`)."""
    names = checkpoint.names()
    label = checkpoint.path.name
    if reason := foreign(names):
        if any(_CONVERTED.match(n) for n in names):
            fail(
                "already-converted",
                f"expected an original layout, found Hugging Face names such as {names[0]}",
                file=label,
                hint="nothing to convert; `ckpt-tool verify` checks it and `--to original` goes back",
            )
        fail("unsupported", f"expected a plain text model, found one that is {reason}", file=label)
    if not names:
        fail("missing-tensor", "expected the tensors of a model, found none", file=label)
    files = sorted(checkpoint.files, key=natural)
    by_file = {f: checkpoint.files[f].tensors for f in files}
    tensors: dict[str, tuple[TensorInfo, ...]] = {}
    for file in files:
        for name, tensor in by_file[file].items():
            tensors[name] = (*tensors.get(name, ()), tensor)
    repeated = sum(len(ts) > 1 for ts in tensors.values())
    ranks = len(files) if repeated > len(tensors) // 2 else 1
    if ranks > 1:
        fail_all(rank_problems(files, by_file))
    else:
        fail_all(
            Problem(
                "duplicate-tensor",
                f"expected each tensor in one file, found it in {' and '.join(t.file for t in ts)} too",
                where=n,
            )
            for n, ts in tensors.items()
            if len(ts) > 1
        )
    return Download(checkpoint, tensors, ranks, layer_count(names, r"layers\.(\d+)\."))


def layer_count(names: Iterable[str], pattern: str) -> int:
    found = (re.match(pattern, n) for n in names)
    return max((int(m[1][:9]) + 1 for m in found if m), default=0)
