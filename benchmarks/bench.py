"""Time and memory of `ckpt-tool convert` beside `cp` of the same bytes, on synthetic originals.

    python benchmarks/bench.py --work /path/with/8/GB --cases B1 B2 --rounds 5 --json result.json

Every round runs cp twice (the second against the first shows the noise) and ours once, in random order, each
from a warm (or with --cold, dropped) source into a fresh place. Ratios are taken within a round. See
benchmarks/README.md for the protocol and for results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_tool.checkpoint.tf_bundle_writer import Content, write_bundle
from ckpt_tool.checkpoint.tf_names import is_part
from ckpt_tool.checkpoint.torch_zip_writer import TorchZipLayout
from ckpt_tool.fixtures.families import canine, codegen, megatron_gpt2, mobilebert
from ckpt_tool.fixtures.numbers import noise
from ckpt_tool.fixtures.pickles import Tensor, write_torch_zip
from ckpt_tool.fixtures.published import Published, json_document
from ckpt_tool.fixtures.shapes import shape_of, spread
from ckpt_tool.fixtures.tensorflow import Bundle

BLOCK = 8 << 20
NOISY_MEDIAN, NOISY_SPREAD = (0.9, 1.1), 1.5
Shapes = list[tuple[str, str, tuple[int, ...]]]


# --- synthetic originals --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of a decoder of the Llama / Mistral layout, in bfloat16."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    ranks: int = 1

    def tensors(self) -> Shapes:
        """What one rank holds: heads, feed-forward rows and vocabulary shared out, embeddings by columns."""
        d, r = self.dim, self.ranks
        width = d // self.heads
        q, kv, f = self.heads * width // r, self.kv_heads * width // r, self.ffn // r
        found: Shapes = [("tok_embeddings.weight", "BF16", (self.vocab, d // r))]
        for k in range(self.layers):
            p = f"layers.{k}."
            found += [
                (p + "attention.wq.weight", "BF16", (q, d)),
                (p + "attention.wk.weight", "BF16", (kv, d)),
                (p + "attention.wv.weight", "BF16", (kv, d)),
                (p + "attention.wo.weight", "BF16", (d, q)),
                (p + "feed_forward.w1.weight", "BF16", (f, d)),
                (p + "feed_forward.w2.weight", "BF16", (d, f)),
                (p + "feed_forward.w3.weight", "BF16", (f, d)),
                (p + "attention_norm.weight", "BF16", (d,)),
                (p + "ffn_norm.weight", "BF16", (d,)),
            ]
        return [*found, ("norm.weight", "BF16", (d,)), ("output.weight", "BF16", (self.vocab // r, d))]

    def params(self) -> dict[str, Any]:
        common = {"dim": self.dim, "n_layers": self.layers, "n_heads": self.heads, "norm_eps": 1e-5}
        if self.ranks == 1:
            return {
                **common,
                "head_dim": self.dim // self.heads,
                "hidden_dim": self.ffn,
                "n_kv_heads": self.kv_heads,
                "vocab_size": self.vocab,
                "rope_theta": 1e4,
                "sliding_window": 4096,
            }
        return {**common, "multiple_of": 256, "vocab_size": -1}


def write_bundle_of(folder: Path, original: Bundle) -> None:
    """A checkpoint of TensorFlow with random float32 numbers in the variables of `original`."""
    noise = np.random.Generator(np.random.SFC64(0))
    tensors = {
        name: Content("F32", (shape := shape_of(words, original.sizes)[0]), partial(_normal, noise, shape))
        for name, words, _ in spread(original.shapes, original.sizes)
    }
    folder.mkdir(parents=True)
    (folder / original.document).write_text(json.dumps(original.config))
    for path in write_bundle(folder / original.stem, tensors):
        with open(path, "rb") as file:
            os.fsync(file.fileno())


@dataclasses.dataclass(frozen=True)
class Archive:
    """`write` makes one file in a folder, which `unpack` (of a file into a folder) usually opens: a
    conversion is measured against that and `cp` of what came out. None: against `cp` of the archive, whose
    members lie in it as they are."""

    write: Callable[[Path], object]
    unpack: str | None = None


def write_codegen(folder: Path) -> None:
    """The published CodeGen 350M with random finite float16 bits, in a tar.gz of its folder."""
    original: Published = codegen.codegen(*CODEGEN_350M, masks=True, ids=(1, 50256))
    shapes = {n: "3*d d" if n.endswith("qkv_proj.weight") else row for n, row in original.shapes.items()}
    tensors = {
        name: row(name, original, _no_numbers)
        if callable(row)
        else Tensor(original.dtype, row, partial(noise, name, 2 * int(np.prod(row))), "cpu")
        for name, row in dataclasses.replace(original, shapes=shapes).rows()
    }
    inner = folder / "codegen-350M-mono"
    inner.mkdir(parents=True)
    (inner / "config.json").write_bytes(json_document(original.config))
    with open(inner / "pytorch_model.bin", "wb") as file:
        write_torch_zip(tensors, file)
    with tarfile.open(folder / f"{inner.name}.tar.gz", "w:gz", compresslevel=6) as archive:
        archive.add(inner, inner.name)
    shutil.rmtree(inner)


def _no_numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    raise AssertionError(f"{name} is made of noise")


def _normal(noise: np.random.Generator, shape: tuple[int, ...]) -> list[bytes]:
    return [noise.standard_normal(shape, dtype=np.float32).tobytes()]


def write_original(folder: Path, model: Model, seed: int = 0) -> int:
    """The original as torch zips and params.json: random bytes with one exponent bit cleared, so finite and
    incompressible, equal on all ranks where ranks hold copies. Returns the bytes of the weight files."""
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(model.params()))
    for rank in range(model.ranks):
        tensors = model.tensors()
        layout = TorchZipLayout(tensors)
        crcs: dict[str, int] = {}
        with open(folder / f"consolidated.{rank:02d}.pth", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, layout.size)
            for k, (name, _, shape) in enumerate(tensors):
                copied = len(shape) == 1
                noise = np.random.Generator(np.random.SFC64([seed, 0 if copied else rank, k]))
                left, crc, at = 2 * int(np.prod(shape)), 0, layout.offsets[name]
                while left:
                    bits = np.frombuffer(bytearray(noise.bytes(min(BLOCK, left))), dtype="<u2")
                    bits &= 0xBFFF
                    os.pwrite(file.fileno(), bits.data, at)
                    crc = zlib.crc32(bits.data, crc)
                    at, left = at + bits.nbytes, left - bits.nbytes
                crcs[name] = crc
            for offset, data in (*layout.header_writes(), *layout.finish(crcs)):
                os.pwrite(file.fileno(), data, offset)
            os.fsync(file.fileno())
    return sum(p.stat().st_size for p in weights(folder))


def weights(folder: Path) -> list[Path]:
    kinds = (".pth", ".safetensors", ".zip", ".gz")
    ours = (p for p in folder.iterdir() if p.suffix in kinds or is_part(p.name))
    return sorted(ours)


# --- running --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cost:
    """One child: seconds until it ended, until its files were on the disk, of CPU; peak memory; bytes that
    went through read and write calls."""

    wall: float
    synced: float
    cpu: float
    rss_mib: float
    read_bytes: int
    written_bytes: int


def run(command: list[str], out: Path, log: Path, fine: tuple[int, ...] = (0,)) -> Cost:
    """`fine` are the exit codes that are measured, and no failure of the benchmark."""
    # compiled as an installed wheel is: where the variable is set, each start would compile all modules again
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(log.with_name("compiled"))
    started = time.perf_counter()
    with open(log, "wb") as sink:
        child = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment)
    peak = 0
    while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        # ru_maxrss would count what this process had when it forked
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{child.pid}/status").read_text())
        peak = max(peak, int(found[1]) if found else 0)
        time.sleep(0.01)
    counts = dict(line.split(": ") for line in Path(f"/proc/{child.pid}/io").read_text().splitlines())
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode not in fine:
        raise SystemExit(f"{shlex.join(command)}: exit {child.returncode}\n{log.read_text()}")
    for path in [p for p in out.rglob("*") if p.is_file()]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return Cost(
        wall,
        time.perf_counter() - started,
        usage.ru_utime + usage.ru_stime,
        peak / 1024,
        int(counts["rchar"]),
        int(counts["wchar"]),
    )


def prepare(source: Path, out: Path, cold: bool) -> None:
    """No output, nothing waiting to be written, the source in the page cache or out of it."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(unpacked(out), ignore_errors=True)
    os.sync()
    for path in weights(source):
        descriptor = os.open(path, os.O_RDONLY)
        if cold:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while os.read(descriptor, BLOCK):
                pass
        os.close(descriptor)


def unpacked(out: Path) -> Path:
    """Where an archive is unpacked before it is copied to `out`."""
    return out.with_name("unpacked")


def copying(source: Path, out: Path, unpack: str | None) -> list[str]:
    """What ours is measured against, into the folder `out`, which is there."""
    if unpack is None:
        return ["cp", "-r", *map(str, weights(source)), str(out)]
    archive, folder, target = (shlex.quote(str(p)) for p in (weights(source)[0], unpacked(out), out))
    words = unpack.format(archive=archive, folder=folder)
    return ["sh", "-ec", f"mkdir {folder}; {words}; cp -r {folder}/. {target}"]


def compare(
    source: Path, work: Path, command: str, rounds: int, cold: bool, archive: Archive | None = None
) -> dict[str, Any]:
    """`rounds` of {cp, cp again, ours} in random order, and what the ratios come to."""
    out = work / "out"
    copy = copying(source, out, None if archive is None else archive.unpack)
    given = source if archive is None else weights(source)[0]
    ours = [w.format(source=given, out=out, python=sys.executable) for w in shlex.split(command)]
    costs: dict[str, list[Cost]] = {"cp": [], "again": [], "ours": []}
    size = 0
    order = random.Random(0)
    load = os.getloadavg()[0]
    for _ in range(rounds):
        names = list(costs)
        order.shuffle(names)
        for name in names:
            prepare(source, out, cold)
            if name != "ours":
                out.mkdir()
            costs[name].append(run(ours if name == "ours" else copy, out, work / "log"))
            if name == "ours":
                size = sum(p.stat().st_size for p in weights(out))
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(unpacked(out), ignore_errors=True)
    noise = ratios(costs, "again", "synced")
    return {
        "bytes": size,
        "rounds": rounds,
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
        "seconds": {k: summary(c.synced for c in v) for k, v in costs.items()},
        "cp_control": noise,
        "noisy": not NOISY_MEDIAN[0] <= noise[1] <= NOISY_MEDIAN[1] or noise[2] > NOISY_SPREAD * noise[0],
        "wall_ratio": ratios(costs, "ours", "wall"),
        "synced_ratio": ratios(costs, "ours", "synced"),
        "cpu_ratio": ratios(costs, "ours", "cpu"),
        "cpu_seconds": summary(c.cpu for c in costs["ours"]),
        "rss_mib": max(c.rss_mib for c in costs["ours"]),
        "read_ratio": costs["ours"][-1].read_bytes / costs["cp"][-1].read_bytes,
        "written_ratio": costs["ours"][-1].written_bytes / costs["cp"][-1].written_bytes,
    }


def ratios(costs: dict[str, list[Cost]], name: str, what: str) -> list[float]:
    return summary(getattr(a, what) / getattr(b, what) for a, b in zip(costs[name], costs["cp"], strict=True))


def summary(values: Iterable[float]) -> list[float]:
    found = sorted(values)
    return [round(v, 3) for v in (found[0], statistics.median(found), found[-1])]


# --- cases ----------------------------------------------------------------------------------------------

MISTRAL = Model(dim=2048, layers=18, heads=16, kv_heads=4, ffn=8192, vocab=32000)
LLAMA = Model(dim=2048, layers=21, heads=16, kv_heads=16, ffn=5632, vocab=32000, ranks=2)
SMALL = Model(dim=64, layers=1400, heads=4, kv_heads=4, ffn=64, vocab=4_000_000)
MOBILEBERT = mobilebert.mobilebert(
    **{"hidden_size": 512, "intermediate_size": 512, "intra_bottleneck_size": 128, "embedding_size": 128},
    **{"vocab_size": 30522, "max_position_embeddings": 512, "num_hidden_layers": 100},
    vocabulary=False,
)
# as google-research/language publishes it, with the heads of pre-training
CANINE = canine.canine(
    canine.WORDS,
    **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    **{"num_hash_buckets": 16384, "max_positions": 16384, "local_transformer_stride": 128},
)
CODEGEN_350M = (20, 1024, 16, 32, 51200)  # layers, width, heads, rotary channels, words
UNZIP = "unzip -q {archive} -d {folder}"
UNTAR = "tar xzf {archive} -C {folder}"
NGC = partial(megatron_gpt2.synthetic, deflated=False)
NGC_DEFLATED = partial(megatron_gpt2.synthetic, deflated=True)
TO_HF = "{python} -m ckpt_tool convert FAMILY --in {source} --out {out} --no-verify --jobs JOBS"
BACK = "{python} -m ckpt_tool convert FAMILY --to original --in {source} --out {out} --no-verify --jobs JOBS"


@dataclasses.dataclass(frozen=True)
class Case:
    what: str
    family: str
    model: Model | Bundle | Archive
    back: bool = False


CASES = {
    "B0": Case("tiny, the cost of starting", "mistral", dataclasses.replace(MISTRAL, layers=1, vocab=256)),
    "B1": Case("Mistral, 1.2 B, one zip", "mistral", MISTRAL),
    "B2": Case("Llama 2, 1.2 B, two shards", "llama", LLAMA),
    "B3": Case("Megatron GPT-2 345M, NGC's zip, stored", "megatron-gpt2", Archive(NGC)),
    "B3d": Case("the same, deflated, beside unzip and cp", "megatron-gpt2", Archive(NGC_DEFLATED, UNZIP)),
    "B4a": Case("Mistral, 0.25 B", "mistral", dataclasses.replace(MISTRAL, layers=2)),
    "B4b": Case("Mistral, 1.9 B", "mistral", dataclasses.replace(MISTRAL, layers=29)),
    "B5": Case("12,600 small tensors, 1 GB of embeddings", "mistral", SMALL),
    "B6": Case("MobileBERT of 100 layers, a TensorFlow bundle", "mobilebert", MOBILEBERT),
    "B6c": Case("CANINE-s at its published sizes, a TensorFlow bundle", "canine", CANINE),
    "B7": Case("Mistral, 1.2 B, back to the original", "mistral", MISTRAL, back=True),
    "B8": Case("CodeGen 350M, a tar.gz, beside tar and cp", "codegen", Archive(write_codegen, UNTAR)),
}


def measure(case: Case, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    source = work / "source"
    shutil.rmtree(source, ignore_errors=True)
    archive = case.model if isinstance(case.model, Archive) else None
    if archive is not None:
        archive.write(source)
    elif isinstance(case.model, Bundle):
        write_bundle_of(source, case.model)
    else:
        write_original(source, case.model)

    def fill(template: str) -> str:
        return template.replace("FAMILY", case.family).replace("JOBS", str(options.jobs))

    command = fill(options.command or TO_HF)
    if case.back:
        converted = work / "converted"
        shutil.rmtree(converted, ignore_errors=True)
        words = [w.format(source=source, out=converted, python=sys.executable) for w in shlex.split(command)]
        run(words, converted, work / "log")
        shutil.rmtree(source)
        converted.rename(source)
        command = fill(options.back_command or BACK)
    for attempt in range(options.attempts):
        found = compare(source, work, command, options.rounds, options.cold, archive)
        if not found["noisy"] or attempt + 1 == options.attempts:
            break
    shutil.rmtree(source)
    return {"what": case.what, **found}


HEAD = (
    "case", "GB", "cp + sync, s", "ours + sync, s", "ours / cp", "the same + sync", "cp / cp", "CPU, s",
    "CPU / cp", "RSS, MiB", "read", "written",
)  # fmt: skip


def table(results: dict[str, dict[str, Any]]) -> str:
    rows = [HEAD, ("---",) * len(HEAD)]
    for name, r in results.items():
        rows.append(
            (
                f"{name} {r['what']}",
                f"{r['bytes'] / 1e9:.2f}",
                show(r["seconds"]["cp"]),
                show(r["seconds"]["ours"]),
                show(r["wall_ratio"]),
                show(r["synced_ratio"]),
                show(r["cp_control"]) + " (noisy)" * r["noisy"],
                show(r["cpu_seconds"]),
                show(r["cpu_ratio"]),
                f"{r['rss_mib']:.0f}",
                f"{r['read_ratio']:.3f}",
                f"{r['written_ratio']:.3f}",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def show(values: list[float]) -> str:
    return " / ".join(f"{v:.2f}" for v in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder on the disk to measure; 8 GB free")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--attempts", type=int, default=1, help="repeat a case that was too noisy")
    parser.add_argument("--cold", action="store_true", help="drop the source from the page cache each time")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--command", help=f"default: {TO_HF}")
    parser.add_argument("--back-command", help=f"default: {BACK}")
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    work = options.work / "ckpt-tool-bench"
    work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results: dict[str, dict[str, Any]] = {}
    try:
        for name in options.cases:
            results[name] = measure(CASES[name], work, options)
            print(f"{name}: {json.dumps(results[name])}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
