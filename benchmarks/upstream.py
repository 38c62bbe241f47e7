"""The conversion scripts of transformers 4.37.2 beside ours, on the same files of synthetic originals.

    python benchmarks/upstream.py --work /path/with/8/GB --cases B1 B2 --json result.json

A round converts an original once with ours and once with theirs, in random order, each from the page cache
until every file of its output is on the disk. Theirs run in a process that has transformers 4.37.2, and
TensorFlow for its bundles (`make test` sets both up under .judges), and nothing of ours (upstream_judge.py);
ours has the same checks off as beside `cp` (bench.py). A case whose script lacks its libraries is named with
the reason. There is no such script for CodeGen."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

from bench import (  # beside this file
    CASES,
    TO_HF,
    Archive,
    Case,
    Cost,
    Model,
    Shapes,
    prepare,
    run,
    summary,
    write_bundle_of,
    write_original,
)
from geometries import opt

from ckpt_tool.fixtures.tensorflow import Bundle

HERE = Path(__file__).parent
JUDGES = HERE.parent / ".judges"
RELEASE, TENSORFLOW = "tf4.37", "tensorflow"
TOLD = "told"  # a folder beside the original, with what its script is told besides


@dataclasses.dataclass(frozen=True)
class Opt(Model):
    """Sizes of an OPT as metaseq leaves it, in float16: a bare dict with key, value and query apart."""

    def tensors(self) -> Shapes:
        return [(name, "F16", shape) for name, _, shape in opt(self)]


OPT = Case("0.46 B in float16, restored.pt", "opt", Opt(2048, 7, 32, 32, 8192, 50272))
WANTED = {name: CASES[name] for name in ("B1", "B2", "B3", "B3d", "B4a", "B4b", "B6", "B6c")} | {"OPT": OPT}
SHOWN = ("B1", "B2", "B3", "B6c", "OPT")  # by themselves, and by `make bench`


def written(folder: Path, case: Case) -> int:
    """The original, with what its script asks for besides; its bytes."""
    if isinstance(case.model, Archive):
        case.model.write(folder)
    elif isinstance(case.model, Bundle):
        write_bundle_of(folder, case.model)
    else:
        write_original(folder, case.model)
        if isinstance(case.model, Opt):
            (folder / "consolidated.00.pth").rename(folder / "restored.pt")
            (folder / "params.json").unlink()
            told = folder.with_name(TOLD)
            told.mkdir(exist_ok=True)
            (told / "config.json").write_text(json.dumps(opt_config(case.model)))
    return sum(p.stat().st_size for p in folder.iterdir())


def opt_config(model: Opt) -> dict[str, Any]:
    """What that script is told with --hf_config."""
    return {
        "hidden_size": model.dim,
        "ffn_dim": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "word_embed_proj_dim": model.dim,
        "vocab_size": model.vocab,
        "model_type": "opt",
    }


def missing(case: Case) -> str:
    """What the script of that case lacks here, or nothing."""
    needed = [RELEASE, *([TENSORFLOW] if isinstance(case.model, Bundle) else [])]
    lacks = [name for name in needed if not (JUDGES / name / ".ready").is_file()]
    return f"no {' and '.join(f'.judges/{n}' for n in lacks)}: `make test` sets them up" if lacks else ""


def commands(case: Case, source: Path, out: Path) -> dict[str, list[str]]:
    words = TO_HF.replace("FAMILY", case.family).replace("JOBS", "2").split()
    given = next(source.iterdir()) if isinstance(case.model, Archive) else source
    paths = [str(JUDGES / n) for n in (RELEASE, TENSORFLOW) if (JUDGES / n).is_dir()]
    # pip has compiled what is there, so that nothing is compiled anew for each start
    clean = ["env", "-u", "PYTHONPYCACHEPREFIX", f"PYTHONPATH={os.pathsep.join(paths)}", "HF_HUB_OFFLINE=1"]
    script = [sys.executable, str(HERE / "upstream_judge.py"), case.family, str(source), str(out)]
    facts = ["--set", f"num_attention_heads={case.model.heads}"] if isinstance(case.model, Opt) else []
    ours = [w.format(source=given, out=out, python=sys.executable) for w in words]
    return {"ours": [*ours, *facts], "theirs": [*clean, *script]}


def measured(case: Case, work: Path, rounds: int) -> dict[str, Any]:
    if lacks := missing(case):
        return {"what": case.what, "skipped": lacks}
    source, out = work / "source", work / "out"
    shutil.rmtree(source, ignore_errors=True)
    size = written(source, case)
    costs: dict[str, list[Cost]] = {"ours": [], "theirs": []}
    order = random.Random(0)
    for _ in range(rounds):
        for name, command in order.sample(list(commands(case, source, out).items()), 2):
            prepare(source, out, cold=False)
            costs[name].append(run(command, out, work / "log"))
    shutil.rmtree(source)
    shutil.rmtree(out)
    return {
        "what": case.what,
        "bytes": size,
        "rounds": rounds,
        "seconds": {k: summary(c.synced for c in v) for k, v in costs.items()},
        "cpu_seconds": {k: summary(c.cpu for c in v) for k, v in costs.items()},
        "rss_mib": {k: max(c.rss_mib for c in v) for k, v in costs.items()},
        "ratio": summary(a.synced / b.synced for a, b in zip(*costs.values(), strict=True)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder on the disk to measure; 8 GB free")
    parser.add_argument("--cases", nargs="+", choices=WANTED, default=list(SHOWN))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    work = options.work / "ckpt-tool-upstream"
    work.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    try:
        for name in options.cases:
            results[name] = measured(WANTED[name], work, options.rounds)
            print(f"{name}: {json.dumps(results[name])}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
