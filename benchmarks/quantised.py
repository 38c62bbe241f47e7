"""Time and memory of `--dequantize` and of `verify --level bits` of what it made, beside `cp` of the same
output: a Qwen3 of few layers as wide as one of 8 billion parameters, its matrices fp8 in blocks of 128 x 128,
fp8 with one scale, MXFP4, or int4 in groups of 32.

    python benchmarks/quantised.py --work FOLDER [--layers 10] [--only fp8-blocks ...]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ckpt_tool.checkpoint.safetensors import SafetensorsLayout
from ckpt_tool.fixtures.quantised import FORMATS

D, F, N, K, H, V = 4096, 12288, 32, 8, 128, 1024
MATRICES = {
    "self_attn.q_proj": (N * H, D),
    "self_attn.k_proj": (K * H, D),
    "self_attn.v_proj": (K * H, D),
    "self_attn.o_proj": (D, N * H),
    "mlp.gate_proj": (F, D),
    "mlp.up_proj": (F, D),
    "mlp.down_proj": (D, F),
}
NORMS = {"input_layernorm": D, "post_attention_layernorm": D, "self_attn.q_norm": H, "self_attn.k_norm": H}
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
CONFIGS = {
    "fp8-blocks": BLOCKS,
    "fp8-tensor": BLOCKS | {"weight_block_size": None},
    "mxfp4": dict(FORMATS["mxfp4"].config),
    "int4": dict(FORMATS["int4"].config),
}
Entry = tuple[str, str, tuple[int, ...]]


def entries(kind: str, layers: int) -> Iterator[Entry]:
    yield from (("model.embed_tokens.weight", "BF16", (V, D)), ("model.norm.weight", "BF16", (D,)))
    yield "lm_head.weight", "BF16", (V, D)
    for i in range(layers):
        stem = f"model.layers.{i}."
        yield from ((f"{stem}{n}.weight", "BF16", (size,)) for n, size in NORMS.items())
        for name, (rows, columns) in MATRICES.items():
            if kind == "mxfp4":
                yield f"{stem}{name}.weight_packed", "U8", (rows, columns // 2)
                yield f"{stem}{name}.weight_scale", "U8", (rows, columns // 32)
            elif kind == "int4":
                yield f"{stem}{name}.weight_packed", "I32", (rows, columns // 8)
                yield f"{stem}{name}.weight_scale", "BF16", (rows, columns // 32)
                yield f"{stem}{name}.weight_shape", "I64", (2,)
            else:
                grid = (rows // 128, columns // 128) if kind == "fp8-blocks" else ()
                yield f"{stem}{name}.weight", "F8_E4M3", (rows, columns)
                yield f"{stem}{name}.weight_scale_inv", "F32", grid


def write(folder: Path, kind: str, layers: int) -> int:
    """The bytes of the file."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, 1 << 24, dtype="u1")
    codes[codes & 127 == 127] = 1
    layout = SafetensorsLayout(list(entries(kind, layers)))
    with open(folder / "model.safetensors", "wb") as file:
        for at, piece in layout.header_writes():
            file.seek(at)
            file.write(piece)
        shapes = {n: shape for n, _, shape in layout.tensors}
        for name, dtype, shape in layout.tensors:
            count = int(np.prod(shape)) * (4 if dtype == "I32" else 1)
            file.seek(layout.offsets[name])
            if dtype == "I64":
                rows, words = shapes[name.replace("_shape", "_packed")]
                file.write(np.array([rows, 8 * words], "<i8").data)
            elif dtype in ("F8_E4M3", "U8", "I32") and "scale" not in name:
                for start in range(0, count, codes.size):
                    file.write(codes[: count - start].data)
            elif dtype == "U8":
                file.write(rng.integers(110, 125, count, dtype="u1").data)
            else:
                file.write(np.full(count, 0.0123, "<f4").data if dtype == "F32" else b"\x80\x3f" * count)
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": D,
        "num_hidden_layers": layers,
        "intermediate_size": F, "num_attention_heads": N, "num_key_value_heads": K, "head_dim": H,
        "rms_norm_eps": 1e-6, "vocab_size": V, "rope_theta": 1e6, "tie_word_embeddings": False,
        "max_position_embeddings": 4096, "attention_bias": False, "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "quantization_config": CONFIGS[kind],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return layout.size


# A process counts the memory of the one that started it as its own largest, so a small one starts it.
START = """
import os, resource, sys, time
began = time.perf_counter()
status = os.spawnvp(os.P_WAIT, sys.argv[1], sys.argv[1:])
took, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
print(status, took, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)
"""


def run(command: list[str]) -> tuple[float, float, float]:
    """Seconds by the clock, seconds of processors, and the largest memory of this child in bytes."""
    started = subprocess.run([sys.executable, "-ISc", START, *command], stdout=subprocess.PIPE, text=True)
    status, clock, cpu, memory = map(float, started.stdout.splitlines()[-1].split())
    if status:
        raise SystemExit(f"{command} failed")
    return clock, cpu, memory


def tool(source: Path, out: Path) -> list[str]:
    command = [sys.executable, "-m", "ckpt_tool", "convert", "qwen3", "--in", str(source), "--out", str(out)]
    return [*command, "--jobs", "1", "--no-verify", "--dequantize", "bfloat16", "--max-shard-size", "100GB"]


def proof(source: Path, out: Path) -> list[str]:
    command = [sys.executable, "-m", "ckpt_tool", "verify", str(out), "--source", str(source)]
    return [*command, "--level", "bits"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--only", nargs="*", default=list(CONFIGS))
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed tool compiles its modules once
    os.environ["PYTHONPYCACHEPREFIX"] = str(asked.work / "compiled")
    write(asked.work / "first", asked.only[0], 1)
    run(tool(asked.work / "first", asked.work / "first-out"))
    heads = ("in", "out", "seconds", "CPU s", "a GB", "GB/s a core", "memory", "cp", "CPU s")
    heads += ("verify, CPU s", "GB/s a core", "memory")
    widths = (9, 9, 8, 7, 6, 12, 8, 7, 7, 14, 12, 8)
    print(f"{'':12}", *(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True)))
    for kind in asked.only:
        source, out = asked.work / kind, asked.work / f"{kind}-out"
        size = write(source, kind, asked.layers)
        clock, cpu, memory = run(tool(source, out))
        made = sum(f.stat().st_size for f in out.iterdir())
        copy, copying, _ = run(["cp", "-r", str(out), str(asked.work / "copy")])
        _, proving, proved = run(proof(source, out))
        print(
            f"{kind:12} {size / 1e9:7.2f}GB {made / 1e9:7.2f}GB {clock:8.1f} {cpu:7.1f}"
            f" {cpu / made * 1e9:6.2f} {made / 1e9 / cpu:12.2f} {memory / 1e6:6.0f}MB {copy:6.1f}s"
            f" {copying:7.1f} {proving:14.1f} {made / 1e9 / proving:12.2f} {proved / 1e6:6.0f}MB",
            flush=True,
        )
        for folder in (source, out, asked.work / "copy"):
            shutil.rmtree(folder)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
