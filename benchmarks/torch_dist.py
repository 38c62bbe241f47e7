"""Time and memory of `convert --dry-run` and `inspect` on sparse checkpoints of very many tensors. Those of
torch.distributed have 1 TB: `.metadata` is as torch writes it, and the files that it names are as long as it
says, and empty.

    python benchmarks/torch_dist.py --work /a/folder --kinds layers shards experts --json result.json

layers    Megatron-Core, one tensor for all of 126 layers, cut by 8 tensor-parallel ranks, as 405B is saved
shards    whole tensors of Hugging Face's names, each cut into equal rows by 410 ranks: 500,000 pieces
experts   500,000 tensors in one piece each: 1,302 experts in each of 128 layers
files     200,000 tensors of Hugging Face's names in 20 safetensors files, which become an original

Each command runs in a process of its own; its memory is the high-water mark.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import pickle
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

HEADER = 1577  # bytes of an item beside its numbers
Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """A tensor and its pieces: the first element and the size of each, and the rank that wrote it."""

    name: str
    shape: Numbers
    pieces: list[tuple[Numbers, Numbers, int]]


@dataclass(frozen=True)
class Folder:
    """A checkpoint to write: `family` converts it, `documents` lie beside it. `plans` are those of all ranks,
    which Megatron's `.metadata` holds."""

    family: str
    cuts: Callable[[], Iterator[Cut]]
    documents: dict[str, dict[str, Any]]
    settings: tuple[str, ...] = ()
    plans: bool = False
    files: bool = False  # safetensors, one for each rank
    to: str = "hf"


def rows(name: str, shape: Numbers, ranks: int) -> Cut:
    """Cut along the first axis as DTensor cuts it: as many rows for each rank, fewer for the last."""
    each = -(-shape[0] // ranks)
    borders = [(k, a, min(a + each, shape[0])) for k, a in enumerate(range(0, shape[0], each))]
    rest = (0,) * (len(shape) - 1)
    return Cut(name, shape, [((a, *rest), (b - a, *shape[1:]), k) for k, a, b in borders])


# --- the models -----------------------------------------------------------------------------------------

RANKS = 410
DIM, FFN, HEADS, KEYS, VOCAB, LAYERS = 16384, 53248, 128, 8, 128256, 126
WIDTH = DIM // HEADS
QWEN3 = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "torch_dtype": "bfloat16",
    "head_dim": WIDTH,
    "hidden_size": DIM, "intermediate_size": FFN, "num_attention_heads": HEADS, "num_key_value_heads": KEYS,
    "vocab_size": VOCAB, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
    "max_position_embeddings": 32768, "hidden_act": "silu", "num_hidden_layers": LAYERS,
}  # fmt: skip


def shards() -> Iterator[Cut]:
    yield rows("model.embed_tokens.weight", (VOCAB, DIM), RANKS)
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        inside = {
            "self_attn.q_proj": (HEADS * WIDTH, DIM), "self_attn.k_proj": (KEYS * WIDTH, DIM),
            "self_attn.v_proj": (KEYS * WIDTH, DIM), "self_attn.o_proj": (DIM, HEADS * WIDTH),
            "self_attn.q_norm": (WIDTH,), "self_attn.k_norm": (WIDTH,),
            "mlp.gate_proj": (FFN, DIM), "mlp.up_proj": (FFN, DIM), "mlp.down_proj": (DIM, FFN),
            "input_layernorm": (DIM,), "post_attention_layernorm": (DIM,),
        }  # fmt: skip
        for name, shape in inside.items():
            yield rows(f"{at}{name}.weight", shape, RANKS)
    yield rows("model.norm.weight", (DIM,), RANKS)
    yield rows("lm_head.weight", (VOCAB, DIM), RANKS)


def layers() -> Iterator[Cut]:
    ranks = 8
    inside: dict[str, tuple[Numbers, int | None]] = {
        "self_attention.linear_qkv.layer_norm_weight": ((DIM,), None),
        "self_attention.linear_qkv.weight": (((HEADS + 2 * KEYS) * WIDTH, DIM), 0),
        "self_attention.q_layernorm.weight": ((WIDTH,), None),
        "self_attention.k_layernorm.weight": ((WIDTH,), None),
        "self_attention.linear_proj.weight": ((DIM, HEADS * WIDTH), 1),
        "mlp.linear_fc1.layer_norm_weight": ((DIM,), None),
        "mlp.linear_fc1.weight": ((2 * FFN, DIM), 0),
        "mlp.linear_fc2.weight": ((DIM, FFN), 1),
    }
    yield rows("embedding.word_embeddings.weight", (VOCAB, DIM), ranks)
    for name, (shape, axis) in inside.items():
        parts = 2 * ranks if "fc1.weight" in name else ranks if axis is not None else 1
        size = tuple(n // parts if k == axis else n for k, n in enumerate(shape))
        starts = [tuple(p * n if k == axis else 0 for k, n in enumerate(size)) for p in range(parts)]
        pieces = [
            ((i, *start), (1, *size), i // 8 * ranks + p % ranks)
            for i, (p, start) in product(range(LAYERS), enumerate(starts))
        ]
        yield Cut(f"decoder.layers.{name}", (LAYERS, *shape), pieces)
    yield rows("decoder.final_layernorm.weight", (DIM,), 1)
    yield rows("output_layer.weight", (VOCAB, DIM), ranks)


SMALL, MANY, DEEP = 1024, 1302, 128
PARAMS = {
    "dim": SMALL, "n_layers": DEEP, "head_dim": 128, "hidden_dim": SMALL, "n_heads": 8, "n_kv_heads": 8,
    "norm_eps": 1e-5, "vocab_size": 32000, "rope_theta": 1e6,
    "moe": {"num_experts_per_tok": 2, "num_experts": MANY},
}  # fmt: skip


def experts() -> Iterator[Cut]:
    shapes: dict[str, Numbers] = {"tok_embeddings": (32000, SMALL)}
    for i in range(DEEP):
        at = f"layers.{i}."
        shapes |= {f"{at}attention.w{x}": (SMALL, SMALL) for x in "qkvo"}
        shapes |= {f"{at}{x}_norm": (SMALL,) for x in ("attention", "ffn")}
        shapes[f"{at}feed_forward.gate"] = (MANY, SMALL)
        shapes |= {
            f"{at}feed_forward.experts.{e}.w{x}": (SMALL, SMALL) for e, x in product(range(MANY), (1, 2, 3))
        }
    shapes |= {"norm": (SMALL,), "output": (32000, SMALL)}
    for k, (name, shape) in enumerate(shapes.items()):
        yield Cut(f"{name}.weight", shape, [((0,) * len(shape), shape, k % 512)])


TINY, NARROW, FEWER = 64, 1041, 64
CONFIG = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "torch_dtype": "bfloat16",
    "hidden_size": TINY, "intermediate_size": TINY, "num_attention_heads": 8, "num_key_value_heads": 8,
    "head_dim": 8, "num_hidden_layers": FEWER, "num_local_experts": NARROW, "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "vocab_size": 32000, "hidden_act": "silu",
    "max_position_embeddings": 32768, "tie_word_embeddings": False, "sliding_window": None,
}  # fmt: skip


def files() -> Iterator[Cut]:
    shapes: dict[str, Numbers] = {"model.embed_tokens": (32000, TINY)}
    for i in range(FEWER):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{x}_proj": (TINY, TINY) for x in "qkvo"}
        shapes |= {f"{at}{x}_layernorm": (TINY,) for x in ("input", "post_attention")}
        moe = f"{at}block_sparse_moe."
        shapes[f"{moe}gate"] = (NARROW, TINY)
        shapes |= {f"{moe}experts.{e}.w{x}": (TINY, TINY) for e, x in product(range(NARROW), (1, 2, 3))}
    shapes |= {"model.norm": (TINY,), "lm_head": (32000, TINY)}
    each = -(-len(shapes) // 20)
    for k, (name, shape) in enumerate(shapes.items()):
        yield Cut(f"{name}.weight", shape, [((0,) * len(shape), shape, k // each)])


KINDS = {
    "layers": Folder("qwen3", layers, {}, plans=True),
    "shards": Folder("qwen3", shards, {"config.json": QWEN3}),
    "experts": Folder("mixtral", experts, {"params.json": PARAMS}),
    "files": Folder("mixtral", files, {"config.json": CONFIG}, files=True, to="original"),
}
ARGS = {
    "num_layers": LAYERS, "hidden_size": DIM, "ffn_hidden_size": FFN, "num_attention_heads": HEADS,
    "group_query_attention": True, "num_query_groups": KEYS, "kv_channels": WIDTH, "swiglu": True,
    "max_position_embeddings": 32768, "padded_vocab_size": VOCAB, "norm_epsilon": 1e-6,
    "rotary_base": 1000000,
    "rotary_percent": 1.0, "untie_embeddings_and_output_weights": True, "normalization": "RMSNorm",
    "add_bias_linear": False, "add_qkv_bias": False, "qk_layernorm": True, "position_embedding_type": "rope",
    "tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 16,
}  # fmt: skip


# --- writing and measuring ------------------------------------------------------------------------------


def write(kind: Folder, folder: Path) -> tuple[int, int, int]:
    """The sparse folder; how many tensors and pieces it has, and how many bytes."""
    import torch
    from torch.distributed.checkpoint import metadata as classes
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    folder.mkdir(parents=True)
    ends: Counter[str] = Counter()
    state: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    plans: dict[int, list[Any]] = {}
    for cut in kind.cuts():
        properties = classes.TensorProperties(dtype=torch.bfloat16)
        boxes = []
        for start, size, rank in cut.pieces:
            path = f"__{rank}_0.distcp"
            length = HEADER + 2 * torch.Size(size).numel()
            index = classes.MetadataIndex(cut.name, torch.Size(start), None if kind.plans else len(boxes))
            storage[index] = _StorageInfo(path, ends[path], length)
            ends[path] += length
            boxes.append(classes.ChunkStorageMetadata(torch.Size(start), torch.Size(size)))
            if kind.plans:
                data = TensorWriteData(boxes[-1], properties, torch.Size(cut.shape))
                plans.setdefault(rank, []).append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        state[cut.name] = classes.TensorStorageMetadata(properties, torch.Size(cut.shape), boxes)
    made = classes.Metadata(state, None if kind.plans else {n: (n,) for n in state}, storage)
    made.storage_meta = classes.StorageMeta(str(folder), "0" * 36)
    if kind.plans:
        made.all_local_plans = [SavePlan(items) for _, items in sorted(plans.items())]  # type: ignore[attr-defined]
        common = {"args": argparse.Namespace(**ARGS), "iteration": 100, "checkpoint_version": 3.0}
        torch.save(common, folder / "common.pt")
        (folder / "metadata.json").write_text(
            '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
        )
    with open(folder / ".metadata", "wb") as f:
        pickle.dump(made, f, protocol=4)
    for path, size in ends.items():
        with open(folder / path, "wb") as f:
            f.truncate(size)
    for name, content in kind.documents.items():
        (folder / name).write_text(json.dumps(content))
    return len(state), len(storage), sum(ends.values())


def write_files(kind: Folder, folder: Path) -> tuple[int, int, int]:
    """The same of safetensors files, with their index."""
    folder.mkdir(parents=True)
    by_rank: dict[int, list[Cut]] = {}
    for cut in kind.cuts():
        by_rank.setdefault(cut.pieces[0][2], []).append(cut)
    index: dict[str, str] = {}
    total = 0
    for rank, cuts in by_rank.items():
        file = f"model-{rank + 1:05d}-of-{len(by_rank):05d}.safetensors"
        header, at = {}, 0
        for cut in cuts:
            end = at + 2 * math.prod(cut.shape)
            header[cut.name] = {"dtype": "BF16", "shape": list(cut.shape), "data_offsets": [at, end]}
            index[cut.name], at = file, end
        text = json.dumps(header, separators=(",", ":")).encode()
        with open(folder / file, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            f.truncate(8 + len(text) + at)
        total += at
    named = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(named))
    for name, content in kind.documents.items():
        (folder / name).write_text(json.dumps(content))
    return len(index), len(index), total


def built(name: str, folder: Path, told: Path) -> None:
    """In a process of its own: a child's high-water mark begins with its parent's."""
    kind = KINDS[name]
    told.write_text(json.dumps((write_files if kind.files else write)(kind, folder)))


def measured(command: list[str], out: Path) -> dict[str, Any]:
    """Seconds and the most MiB of a command, which must succeed; what it prints goes to `out`."""
    with open(out, "wb") as f:
        begun = time.monotonic()
        child = os.posix_spawn(
            command[0],
            command,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, f.fileno(), 1), (os.POSIX_SPAWN_DUP2, f.fileno(), 2)],
        )
        _, status, used = os.wait4(child, 0)
        seconds = time.monotonic() - begun
    if status:
        raise SystemExit(f"{' '.join(command)}: {out.read_text()[-2000:]}")
    return {"seconds": round(seconds, 2), "mib": used.ru_maxrss >> 10, "printed": out.stat().st_size}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--keep", action="store_true", help="leave the folders, and use those that are there")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results = {}
    for name in given.kinds:
        kind, folder = KINDS[name], given.work / name
        told = given.work / f"{name}.json"
        if not folder.exists():
            maker = multiprocessing.get_context("spawn").Process(target=built, args=(name, folder, told))
            maker.start()
            maker.join()
        tensors, pieces, size = json.loads(told.read_text())
        program = [sys.executable, "-m", "ckpt_tool"]
        plan = [
            *program,
            "convert",
            kind.family,
            "--in",
            str(folder),
            "--out",
            str(given.work / "out"),
            "--to",
            kind.to,
            "--dry-run",
            *(("--form", "B") if kind.files else ()),  # which stacks experts: no file has too many tensors
        ]
        made = {
            "tensors": tensors,
            "pieces": pieces,
            "bytes": size,
            "metadata": sum(f.stat().st_size for f in folder.glob(".metadata")),
            "plan": measured(plan, given.work / "plan.txt"),
            "inspect": measured([*program, "inspect", str(folder)], given.work / "inspect.txt"),
        }
        results[name] = made
        print(name, json.dumps(made), flush=True)
        if not given.keep:
            shutil.rmtree(folder)
    if given.json:
        given.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
