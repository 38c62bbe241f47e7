"""What parity costs beside a forward pass of transformers, and what memory it takes by geometry.

    python benchmarks/parity.py --work /a/folder --cases mistral-0.25b mistral-7b-v0.1 llama-3-70b --json FILE
    python benchmarks/parity.py --work /a/folder --cases mistral-7b --levels all --threads 2     # a whole 7B

Each original has the widths of a published model and few layers (`NAME:LAYERS`; one by default), random
weights, and is removed afterwards. `verify --level parity` runs in a process of its own for each mode;
beside it transformers computes the same fixed prompts in float32 (`--forward`): seconds of CPU are those
of the passes alone, without imports and loading, while those of `verify` are of the whole process. `start`
is what it takes of these until torch is there. A whole 7B needs 30 GB of disk for both sides; its levels'
own seconds, and those that `cat` of both sides takes, stand below its row."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import run  # beside this file
from geometries import GEOMETRIES, write

from ckpt_tool.api import Options, convert
from ckpt_tool.verify.claims import MODES

COLUMNS = ("case", "threads", "mode", "CPU s", "wall s", "MiB", "start", "forward", "ratio", "verdict")
SPARE = 2 << 30  # bytes of disk that are left free


def measured(name: str, layers: int | None, work: Path, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """One case: a row for each number of threads and mode."""
    geometry, home = GEOMETRIES[name], work / name
    shutil.rmtree(home, ignore_errors=True)
    try:
        took = {"write": _seconds(lambda: write(home / "in", geometry, layers, spare=SPARE))}
        told = Options(settings=geometry.settings)
        took["convert"] = _seconds(
            lambda: convert(home / "in", home / "out", family=geometry.family, options=told, check=False)
        )
        print(f"{name}: {_times(took)}", file=sys.stderr, flush=True)
        return [row for threads in asked.threads for row in _rows(name, home, threads, asked)]
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _times(took: Mapping[str, float]) -> str:
    return ", ".join(f"{what} {seconds:.1f} s" for what, seconds in took.items())


def _rows(name: str, home: Path, threads: int, asked: argparse.Namespace) -> list[dict[str, Any]]:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    forward, log = None, home / "log"
    if asked.forward:
        run([sys.executable, __file__, "--child", str(home / "out")], home / "nothing", log)
        forward = float(log.read_text().split("forward:")[1])
    start = run([sys.executable, "-c", "import ckpt_tool.verify.compute"], home / "nothing", log).cpu
    files = [str(f) for side in ("in", "out") for f in sorted((home / side).rglob("*")) if f.is_file()]
    made = []
    for mode in asked.modes:
        file = home / "report.json"
        command = [
            sys.executable,
            "-m",
            "ckpt_tool",
            "verify",
            str(home / "out"),
            "--source",
            str(home / "in"),
        ]
        command += ["--json", str(file), *([] if mode == "default" else [f"--{mode}"])]
        command += ["--level", "parity"] if asked.levels == "parity" else []
        command += ["--memory", asked.memory] if asked.memory else []
        read = (
            run(["cat", *files], home / "nothing", Path("/dev/null")).wall if asked.levels == "all" else None
        )
        cost = run(command, home / "nothing", log, fine=(0, 1, 2))  # the row says what was found
        if not file.exists():
            raise SystemExit(log.read_text())
        report = json.loads(file.read_text())
        file.unlink()
        if report["status"] != "pass":
            print(report["headline"], file=sys.stderr)
        made.append(
            {
                "case": name,
                "threads": threads,
                "mode": mode,
                "cpu": cost.cpu,
                "wall": cost.wall,
                "mib": cost.rss_mib,
                "start": start,
                "forward": forward,
                "ratio": None if forward is None else (cost.cpu - start) / forward,
                "verdict": report["status"],
                "needs": report["facts"].get("needs"),
                "read": read,
            }
        )
        print(_line(made[-1]), flush=True)
        took = report["seconds"] | ({} if read is None else {"`cat` of both sides": read})
        print(f"{name} {mode}: {_times(took)}", file=sys.stderr, flush=True)
    return made


def forward(out: str) -> None:
    """One pass of transformers over the fixed prompts; prints the seconds of CPU that it took."""
    import time

    import torch
    import transformers

    from ckpt_tool.fixtures.prompts import prompts

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rows = prompts(model.config.vocab_size, bos=model.config.bos_token_id)
    began = time.process_time()
    with torch.inference_mode():
        for row in rows.values():
            model(input_ids=torch.tensor([row]), use_cache=False)
    print(f"forward:{time.process_time() - began}")


def _line(row: dict[str, Any]) -> str:
    cells = [
        row["case"],
        row["threads"],
        row["mode"],
        *(row[k] for k in ("cpu", "wall", "mib", "start", "forward", "ratio")),
    ]
    shown = [
        "" if c is None else f"{c:.1f}" if isinstance(c, float) else str(c) for c in (*cells, row["verdict"])
    ]
    return f"| {' | '.join(shown)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="where originals are written")
    parser.add_argument("--cases", nargs="+", default=["mistral-0.25b"], metavar="NAME[:LAYERS]")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["default"])
    parser.add_argument("--levels", choices=("parity", "all"), default="parity")
    parser.add_argument("--memory", metavar="SIZE", help="as `ckpt-tool verify` takes it")
    parser.add_argument("--forward", action="store_true", help="beside a pass of transformers")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        forward(asked.child)
        return
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    rows = []
    for case in asked.cases:
        name, _, layers = case.partition(":")
        rows += measured(name, int(layers) if layers else None, asked.work, asked)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
