"""What `make bench` measures, in one table: conversions beside `cp` and beside the scripts of transformers
4.37.2, levels of a verification beside reading both sides, parity beside a forward pass of transformers, with
its memory by geometry, and how many of a few planted mistakes each mode catches.

    python benchmarks/together.py --work /a/folder/with/12/GB --json result.json
    python benchmarks/together.py --work /a/folder --rounds 1 --cases B0 --upstream OPT --levels B0 --parity

bench.py, upstream.py, parity.py and detection.py do the measuring (their own options and JSON are those of
README.md); what they leave is removed by them. A part that fails is named in the table, and the exit code is
then 1."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import BLOCK, CASES, TO_HF, Model, prepare, run, show, weights, write_original  # beside this file
from geometries import GEOMETRIES
from upstream import SHOWN, WANTED

from ckpt_tool.verify.claims import MODES

HERE = Path(__file__).parent
LEVELS = {
    "bits": ["--level", "coverage", "--level", "bits"],
    "quick": ["--quick"],
}
# Of each geometry a layer or two, so that what a larger one would take is in the widths alone.
GEOMETRIES_SHOWN = ("mistral-0.25b", "mistral-7b-v0.1", "llama-3-8b", "llama-3-70b", "mixtral-8x7b")
# A decoder, one with experts and an encoder; of their kinds of mistakes every 40th.
PLANTED_IN = ("mistral", "mixtral", "megatron-bert")
SAMPLE = 40
HEAD = ("case", "beside", "seconds", "beside, s", "ratio", "CPU, s", "MiB", "remark")


@dataclass(frozen=True)
class Line:
    """One row: what was measured, beside what, and by how much it took longer, as text or numbers."""

    case: str
    beside: str
    seconds: str
    other: str
    ratio: str
    cpu: str
    mib: str
    remark: str = ""


def conversions(results: dict[str, dict[str, Any]]) -> Iterable[Line]:
    """Those of bench.py, min / median / max of the ratios within a round."""
    for name, r in results.items():
        yield Line(
            f"{name} {r['what']}",
            "cp + sync",
            f"{r['seconds']['ours'][1]:.2f}",
            f"{r['seconds']['cp'][1]:.2f}",
            show(r["synced_ratio"]),
            f"{r['cpu_seconds'][1]:.2f}",
            f"{r['rss_mib']:.0f}",
            f"cp / cp {show(r['cp_control'])}" + " (noisy)" * r["noisy"],
        )


def upstream(results: dict[str, dict[str, Any]]) -> Iterable[Line]:
    """Ours beside theirs, on the same files; or why not."""
    for name, r in results.items():
        case, beside = f"{name} {r['what']}", "script of transformers 4.37.2"
        if "skipped" in r:
            yield Line(case, beside, "", "", "", "", "", f"skipped: {r['skipped']}")
            continue
        cpu, mib = r["cpu_seconds"], r["rss_mib"]
        more = mib["theirs"] / mib["ours"]
        yield Line(
            case,
            beside,
            f"{r['seconds']['ours'][1]:.2f}",
            f"{r['seconds']['theirs'][1]:.2f}",
            f"{r['ratio'][1]:.2f}",
            f"{cpu['ours'][1]:.2f}",
            f"{mib['ours']:.0f}",
            f"theirs: CPU {cpu['theirs'][1]:.1f} s, {mib['theirs']:.0f} MiB, {more:.0f} times ours",
        )


def detections(work: Path, raw: dict[str, Any]) -> Iterable[Line]:
    """The same few planted mistakes in each mode: those caught of those that act."""
    for mode in MODES:
        file = work / f"planted-{mode}.json"
        families = [word for family in PLANTED_IN for word in ("--family", family)]
        asked = ["--sample", str(SAMPLE), "--mode", mode, "--json", str(file), *families]
        command = [sys.executable, str(HERE / "detection.py"), *asked]
        cost = run(command, work / "nothing", work / "log", fine=(0, 1))  # 1: some were not caught
        act = [o for o in map(json.loads, file.read_text().splitlines()) if o["acts"]]
        raw.setdefault("detection", {})[mode] = act
        where = [f"{level} {_caught(act, level)}" for level in dict.fromkeys(o["level"] for o in act)]
        caught = sum(o["caught"] for o in act)
        yield Line(
            f"planted mistakes that {mode} catches", "those that act", f"{cost.wall:.1f}", "",
            f"{caught}/{len(act)}", "", "", ", ".join(where),
        )  # fmt: skip


def _caught(act: list[dict[str, Any]], level: str) -> str:
    own = [o for o in act if o["level"] == level]
    return f"{sum(o['caught'] for o in own)}/{len(own)}"


def levels(name: str, work: Path, rounds: int) -> Iterable[Line]:
    """Each level of a verification of that case beside reading both sides once, warm."""
    model = CASES[name].model
    if not isinstance(model, Model):
        raise SystemExit(f"expected a case of torch files, found {name}")
    source, out, nothing = work / "source", work / "out", work / "nothing"
    write_original(source, model)
    words = TO_HF.replace("FAMILY", CASES[name].family).replace("JOBS", "2").split()
    run([w.format(source=source, out=out, python=sys.executable) for w in words], out, work / "log")
    for level, asked in LEVELS.items():
        ours, reading, costs = [], [], []
        for _ in range(rounds):
            reading.append(_read(source, out))
            command = [sys.executable, "-m", "ckpt_tool", "verify", str(out), "--source", str(source), *asked]
            costs.append(run(command, nothing, work / "log"))
            ours.append(costs[-1].wall)
        found = sorted(a / b for a, b in zip(ours, reading, strict=True))
        yield Line(
            f"verify {level} of {name}",
            "reading both sides",
            f"{statistics.median(ours):.2f}",
            f"{statistics.median(reading):.2f}",
            show([found[0], statistics.median(found), found[-1]]),
            f"{statistics.median(c.cpu for c in costs):.2f}",
            f"{max(c.rss_mib for c in costs):.0f}",
        )


def _read(source: Path, out: Path) -> float:
    """Seconds that reading the weights of both folders takes, from the page cache."""
    prepare(source, out.with_name("nothing"), cold=False)
    started = time.perf_counter()
    for path in (*weights(source), *weights(out)):
        with open(path, "rb", buffering=0) as file:
            while file.read(BLOCK):
                pass
    return time.perf_counter() - started


def parities(rows: list[dict[str, Any]]) -> Iterable[Line]:
    for r in rows:
        forward = r["forward"]
        yield Line(
            f"parity of {r['case']}, {r['mode']}, threads: {r['threads']}",
            "" if forward is None else "float32 forward, CPU s",
            f"{r['wall']:.2f}",
            "" if forward is None else f"{forward:.2f}",
            "" if r["ratio"] is None else f"{r['ratio']:.2f}",
            f"{r['cpu']:.2f}",
            f"{r['mib']:.0f}",
            str(r["verdict"]),
        )


def asked_of(script: str, file: Path, *arguments: str) -> Any:
    """What a benchmark beside this file writes as JSON; what it says goes to stderr."""
    command = [sys.executable, str(HERE / script), "--json", str(file), *arguments]
    subprocess.run(command, stdout=sys.stderr, check=True)
    return json.loads(file.read_text())


def table(lines: Iterable[Line]) -> str:
    rows = [HEAD, ("---",) * len(HEAD), *(tuple(asdict(line).values()) for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def measured(options: argparse.Namespace, work: Path, raw: dict[str, Any]) -> Iterable[Line]:
    """Part by part; the numbers as they came go into `raw`."""
    if options.cases:
        more = ("--rounds", str(options.rounds), "--work", str(work), "--cases", *options.cases)
        raw["conversions"] = asked_of("bench.py", work / "bench.json", *more)
        yield from conversions(raw["conversions"])
    if options.upstream:
        more = ("--work", str(work), "--cases", *options.upstream)
        raw["upstream"] = asked_of("upstream.py", work / "upstream.json", *more)
        yield from upstream(raw["upstream"])
    for name in options.levels:
        home = work / "levels"
        try:
            found = list(levels(name, home, options.rounds))
        finally:
            shutil.rmtree(home, ignore_errors=True)
        raw.setdefault("levels", []).extend(map(asdict, found))
        yield from found
    for name in options.parity:
        beside = name == "mistral-0.25b"  # a forward pass, in CPU seconds of one thread
        threads = "1" if beside else str(os.cpu_count() or 1)
        forward = ["--forward"] if beside else []
        more = ("--work", str(work / "parity"), "--threads", threads, "--cases", name, *forward)
        rows = asked_of("parity.py", work / "parity.json", *more)
        raw.setdefault("parity", []).extend(rows)
        yield from parities(rows)
    if options.planted:
        yield from detections(work, raw)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="a folder on the disk to measure; 12 GB free"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="of bench.py")
    parser.add_argument("--upstream", nargs="*", choices=WANTED, default=list(SHOWN), help="of upstream.py")
    parser.add_argument("--levels", nargs="*", choices=CASES, default=["B1"], metavar="CASE")
    parser.add_argument("--parity", nargs="*", choices=GEOMETRIES, default=list(GEOMETRIES_SHOWN))
    parser.add_argument("--no-planted", dest="planted", action="store_false", help="no mistakes planted")
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    work = options.work / "ckpt-tool-bench-together"
    work.mkdir(parents=True, exist_ok=True)
    lines: list[Line] = []
    raw: dict[str, Any] = {}
    failed = ""
    try:
        for line in measured(options, work, raw):
            lines.append(line)
            print(f"{line.case}: {line.ratio}", file=sys.stderr, flush=True)
    except (subprocess.CalledProcessError, SystemExit) as error:  # of a script beside this, of `run`
        ended = f"{error}".partition("\n")[0]
        if isinstance(error, subprocess.CalledProcessError):
            ended = f"{Path(error.cmd[1]).name} ended with {error.returncode}"
        failed = f"{ended}: what follows it was not measured"
        lines.append(Line(failed, *[""] * 6))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(table(lines))
    if options.json:
        options.json.write_text(json.dumps(raw, indent=1) + "\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
