"""Wall time of one conversion by 1, 2 and 4 processes (`--worker I/N`, then `--finish`), beside `cp`.

    python benchmarks/workers.py --work /path/with/8/GB --rounds 3

The original is B1 of bench.py (2.45 GB), written as shards of 300 MB. A round runs cp, one process without
--worker, and 1, 2 and 4 workers at once, in random order, each from a warm source into a fresh place and
until everything is on the disk. All outputs are compared byte for byte with that of the one process.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import MISTRAL, prepare, summary, weights, write_original

COUNTS = (1, 2, 4)


def convert(source: Path, out: Path, *more: str) -> list[str]:
    program = [
        sys.executable,
        "-m",
        "ckpt_tool",
        "convert",
        "mistral",
        "--in",
        str(source),
        "--out",
        str(out),
    ]
    return [*program, "--max-shard-size", "300MB", "--no-verify", *more]


def all_at_once(commands: list[list[str]]) -> None:
    running = [subprocess.Popen(c, stdout=subprocess.DEVNULL) for c in commands]
    if any([child.wait() for child in running]):
        raise SystemExit("a worker failed")


def timed(name: str, source: Path, out: Path) -> dict[str, float]:
    """Seconds until the files are on the disk, and of them those of --finish."""
    began = time.perf_counter()
    finish = 0.0
    if name == "cp":
        out.mkdir()
        all_at_once([["cp", *map(str, weights(source)), str(out)]])
        for path in out.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    elif name == "one process":
        all_at_once([convert(source, out)])
    else:
        count = int(name.split()[0])
        jobs = str(max(1, (os.cpu_count() or 1) // count))
        all_at_once(
            [convert(source, out, "--jobs", jobs, "--worker", f"{k}/{count}") for k in range(1, count + 1)]
        )
        between = time.perf_counter()
        all_at_once([convert(source, out, "--finish")])
        finish = time.perf_counter() - between
    return {"seconds": time.perf_counter() - began, "finish": finish}


def same(one: Path, other: Path) -> bool:
    names = sorted(p.name for p in one.iterdir())
    return sorted(p.name for p in other.iterdir()) == names and not any(
        filecmp.cmpfiles(one, other, names, shallow=False)[1:]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder on the disk to measure; 8 GB free")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    work = options.work / "ckpt-tool-workers"
    work.mkdir(parents=True)
    try:
        print(json.dumps(measured(work, options.rounds), indent=1))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def measured(work: Path, rounds: int) -> dict[str, Any]:
    source, kept = work / "source", work / "kept"
    size = write_original(source, MISTRAL)
    all_at_once([convert(source, kept)])
    names = ["cp", "one process", *(f"{n} worker{'s' * (n > 1)}" for n in COUNTS)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    order = random.Random(0)
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            out = work / "out"
            prepare(source, out, cold=False)
            found[name].append(timed(name, source, out))
            if name != "cp" and not same(kept, out):
                raise SystemExit(f"{name}: other bytes than one process writes")
    seconds = {k: summary(t["seconds"] for t in v) for k, v in found.items()}
    finish = {k: summary(t["finish"] for t in v) for k, v in found.items() if "worker" in k}
    return {"bytes": size, "load": os.getloadavg()[0], "seconds": seconds, "of which --finish": finish}


if __name__ == "__main__":
    main()
