"""Originals of published widths with few layers: normal weights of standard deviation 0.02 in bfloat16, norms
around 1, as torch zips with params.json. Facts: params.json of each model."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from bench import Model, Shapes  # beside this file

from ckpt_tool.checkpoint.torch_zip_writer import TorchZipLayout

NOISE = 1 << 22  # values that are drawn once; every tensor begins elsewhere among them


@dataclasses.dataclass(frozen=True)
class Geometry:
    """`model` has one layer, but where it is the whole; `more` are values of params.json, `experts` how many
    feed-forwards a layer has, `whole` the layers that the published model has."""

    family: str
    model: Model
    whole: int
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    experts: int = 0
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # facts that a family asks for

    def tensors(self, model: Model) -> Shapes:
        if self.family == "opt":
            return opt(model)
        if not self.experts:
            return model.tensors()
        found: Shapes = []
        for name, dtype, shape in model.tensors():
            layer, _, part = name.partition("feed_forward.")
            stem = f"{layer}feed_forward."
            found += [(f"{stem}experts.{e}.{part}", dtype, shape) for e in range(self.experts) if part] or [
                (name, dtype, shape)
            ]
            if part == "w1.weight":
                found.append((f"{stem}gate.weight", dtype, (self.experts, model.dim)))
        return found

    def params(self, model: Model) -> dict[str, Any]:
        vocabulary = {"vocab_size": model.vocab} if model.ranks == 1 else {}
        return {**model.params(), "n_kv_heads": model.kv_heads, **vocabulary, **self.more}


def opt(model: Model) -> Shapes:
    """A bare dict of metaseq's tensors, with key, value and query apart."""
    d, f = model.dim, model.ffn
    found = [("embed_tokens.weight", (model.vocab, d)), ("embed_positions.weight", (2050, d))]
    for k in range(model.layers):
        p = f"layers.{k}."
        found += [(f"{p}self_attn.{x}_proj.weight", (d, d)) for x in ("k", "v", "q", "out")]
        found += [(p + "fc1.weight", (f, d)), (p + "fc2.weight", (d, f)), (p + "fc1.bias", (f,))]
        found += [(f"{p}{x}.bias", (d,)) for x in ("fc2", *(f"self_attn.{y}_proj" for y in "kvq"))]
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            found += [(f"{p}{norm}.{x}", (d,)) for x in ("weight", "bias")]
        found.append((p + "self_attn.out_proj.bias", (d,)))
    found += [(f"layer_norm.{x}", (d,)) for x in ("weight", "bias")]
    return [(f"decoder.{name}", "BF16", shape) for name, shape in found]


LLAMA_3 = {"rope_theta": 5e5, "ffn_dim_multiplier": 1.3, "multiple_of": 1024}
WINDOW = {"rope_theta": 1e4, "sliding_window": 4096}
GEOMETRIES = {
    "mistral-0.25b": Geometry("mistral", Model(1024, 14, 16, 4, 3584, 32000), 14, {"rope_theta": 1e6}),
    "mistral-7b-v0.1": Geometry("mistral", Model(4096, 1, 32, 8, 14336, 32000), 32, WINDOW),
    "mistral-7b": Geometry("mistral", Model(4096, 32, 32, 8, 14336, 32000), 32, WINDOW),
    "llama-3-8b": Geometry("llama", Model(4096, 1, 32, 8, 14336, 128256), 32, LLAMA_3),
    "llama-3-70b": Geometry("llama", Model(8192, 1, 64, 8, 28672, 128256, 8), 80, LLAMA_3),
    "opt-30b": Geometry(
        "opt", Model(7168, 1, 56, 56, 28672, 50272), 48, settings={"num_attention_heads": 56}
    ),
    "mixtral-8x7b": Geometry(
        "mixtral",
        Model(4096, 1, 32, 8, 14336, 32000),
        32,
        {"rope_theta": 1e6, "moe": {"num_experts_per_tok": 2, "num_experts": 8}},
        8,
    ),
    "mixtral-8x22b": Geometry(
        "mixtral",
        Model(6144, 1, 48, 8, 16384, 32768),
        56,
        {"rope_theta": 1e6, "moe": {"num_experts_per_tok": 2, "num_experts": 8}},
        8,
    ),
}


def write(folder: Path, geometry: Geometry, layers: int | None = None, spare: int = 0) -> int:
    """The original in `folder`; the bytes of its weights. OSError where the disk has no room for it, as much
    again for its conversion, and `spare` bytes."""
    model = geometry.model if layers is None else dataclasses.replace(geometry.model, layers=layers)
    folder.mkdir(parents=True)
    needed = spare + 4 * model.ranks * sum(math.prod(s) for _, _, s in geometry.tensors(model))
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(f"expected {needed / 1e9:.0f} GB free in {folder}, found {free / 1e9:.0f}")
    params = geometry.params(model)
    if "sliding_window" not in geometry.more:
        params.pop("sliding_window", None)
    if geometry.family == "llama":
        params = {k: v for k, v in params.items() if k not in ("hidden_dim", "head_dim")}
    if geometry.family != "opt":
        (folder / "params.json").write_text(json.dumps(params))
    noise = np.random.default_rng(0).standard_normal(NOISE, dtype=np.float32)
    matrices, norms = (_bfloat16(x) for x in (noise * np.float32(0.02), 1 + noise / 10))
    stem = "restored.pt" if geometry.family == "opt" else "consolidated.{:02d}.pth"
    files = [folder / stem.format(k) for k in range(model.ranks)]
    shapes = geometry.tensors(model)
    return sum(_write_rank(file, shapes, k, matrices, norms) for k, file in enumerate(files))


def _bfloat16(x: np.ndarray) -> np.ndarray:
    return ((x.astype("<f4").view("<u4") + 0x8000) >> 16).astype("<u2")


def _write_rank(path: Path, tensors: Shapes, rank: int, matrices: np.ndarray, norms: np.ndarray) -> int:
    layout = TorchZipLayout(tensors)
    crcs: dict[str, int] = {}
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, layout.size)
        for k, (name, _, shape) in enumerate(tensors):
            seed = [k] if len(shape) == 1 else [k, rank]
            turned = np.roll(
                norms if len(shape) == 1 else matrices, np.random.default_rng(seed).integers(NOISE)
            )
            left, at, crc = int(np.prod(shape)), layout.offsets[name], 0
            while left:
                bits = turned[:left]
                os.pwrite(file.fileno(), bits.data, at)
                crc, at, left = zlib.crc32(bits.data, crc), at + bits.nbytes, left - len(bits)
            crcs[name] = crc
        for offset, data in (*layout.header_writes(), *layout.finish(crcs)):
            os.pwrite(file.fileno(), data, offset)
    return layout.size
