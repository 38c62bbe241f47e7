"""How many planted mistakes a verification catches, locates and names, and how many right conversions fail.

    python benchmarks/detection.py [--family F] [--kind TEXT] [--sample N] [--json FILE]
    python benchmarks/detection.py --mode quick --level parity   # or --costly, as large models are verified
    python benchmarks/detection.py --right [--jobs 2]

Every kind of mistake (fixtures/flaws_kinds.py, and the tables of documents where there are any) is planted on
disk into the conversion of a tiny original of every family, one at a time, and the whole is verified; so are
the mistakes that the reading of an architecture says are its own (own.py).

    acts      the logits of the converted model change in at least one bit
    caught    the verdict is not a pass
    located   a failing finding or the diagnosis names the right layer or tensor
    named     the diagnosis gives the right cause (a value of config.json: names it with the right one)
    misnamed  a diagnosis states another cause
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import own  # beside this file

from ckpt_tool.api import Options, convert
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures import flaws_values  # noqa: F401  (adds its kinds)
from ckpt_tool.fixtures.flaws import Folder
from ckpt_tool.fixtures.flaws_kinds import KINDS, NotHere, Roles, Truth
from ckpt_tool.fixtures.variants import VARIANTS
from ckpt_tool.verify import LEVELS, Report, effort, verify
from ckpt_tool.verify.claims import MODES, Mode

# Per family: the variants that mistakes are planted in, in turn.
PLANTED = {
    "mistral": ("mistral-7b-v0.3", "mistral-7b-v0.1", "mistral-float32"),
    "mixtral": ("mixtral-c", "mixtral-a", "mixtral-b"),
    "llama": (
        "llama-3-70b",
        "llama-2-70b",
        "llama-1-13b",
        "llama-3.1-405b-mp16",
        "llama-3.2-1b",
        "llama-2-7b",
    ),
    "megatron-bert": ("bert-v2-tp2", "bert-v1-bare", "bert-2019-tp2"),
    "megatron-gpt2": ("gpt2-v2-tp2", "gpt2-v1-bare", "gpt2-2019-tp2", "gpt2-core-tp2"),
    "opt": ("opt-13b", "opt-float32", "opt-350m"),
    "codegen": ("codegen-350m-mono", "codegen-8-cores", "codegen-16b-nl"),
    "qwen2": ("qwen2-0.5b", "qwen2.5-14b", "qwen2-mcore", "qwen2-window"),
    "qwen3": ("qwen3-0.6b", "qwen3-8b", "qwen3-float32"),
    "gemma2": ("gemma-2-2b", "gemma-2-9b", "gemma-2-27b"),
    "gpt-neox": ("pythia-410m", "redpajama-3b", "gpt-neox-20b", "gpt-neox-tied"),
    "mega": ("mega-wikitext", "mega-laplace", "mega-chunks", "mega-decoder"),
}


@dataclass(frozen=True)
class Outcome:
    """What became of one planted mistake."""

    kind: str
    family: str
    variant: str
    acts: bool
    caught: bool
    located: bool
    named: bool
    misnamed: bool
    cause: str
    seconds: float


@dataclass(frozen=True)
class How:
    """How each is verified: `levels` None for all; `costly` as if no long prompt were affordable, as is so of
    large models."""

    mode: Mode = "default"
    levels: tuple[str, ...] | None = None
    costly: bool = False

    def verify(self, folder: Path, source: Path, settings: Any) -> Report:
        if self.costly:
            effort.AFFORDABLE = 0.0
        return verify(folder, source, settings=settings, mode=self.mode, levels=self.levels)


@dataclass(frozen=True)
class Task:
    kind: str
    variant: str
    root: str
    how: How


def made(root: Path, variant: str) -> tuple[Path, Path]:
    """The original and its conversion, written once."""
    chosen, home = VARIANTS[variant], root / variant
    if not (home / "path").exists():
        source = chosen.write(home / "original")
        convert(source, home / "right", family=chosen.family, options=Options(settings=chosen.settings))
        (home / "path").write_text(str(source), encoding="utf-8")
    return Path((home / "path").read_text(encoding="utf-8")), home / "right"


def kinds_of_documents() -> dict[str, Any]:
    """Planters of mistakes in tokenizers, documents and the manifest, where the project has them: name to a
    function of the folder that tells which file or value it altered (None: not here)."""
    try:
        from ckpt_tool.fixtures import flaws_documents  # type: ignore[attr-defined]
    except ImportError:
        return {}
    found = next(
        (getattr(flaws_documents, n) for n in ("PLANTERS", "KINDS", "FLAWS") if hasattr(flaws_documents, n)),
        {},
    )
    return dict(found)


def planted(kind: str, folder: Path) -> Truth | None:
    """Plant it; None where the folder has nothing to plant it in."""
    if kind in KINDS:
        opened = Folder(folder)
        try:
            return KINDS[kind](opened, Roles(opened))
        except NotHere:
            return None
        finally:
            opened.checkpoint.close()
    if kind.startswith(own.PREFIX):
        return own.plant(kind, folder)
    where = kinds_of_documents()[kind](folder)
    return None if where is None else Truth(None, (str(where),), ".*")


def tasks(
    root: Path, families: Iterable[str], kinds: Sequence[str], sample: int | None, how: How
) -> list[Task]:
    """One for each kind and family: the variant changes from kind to kind."""
    listed = []
    for at, kind in enumerate(kinds):
        for shift, family in enumerate(families):
            if sample is not None and (at + shift) % sample:
                continue
            variants = PLANTED[family]
            listed.append(
                Task(
                    kind,
                    "|".join(variants[(at + k) % len(variants)] for k in range(len(variants))),
                    str(root),
                    how,
                )
            )
    return listed


def outcome(task: Task) -> Outcome | None:
    """The first of the task's variants that the mistake can be made in, verified with it."""
    root = Path(task.root)
    for variant in task.variant.split("|"):
        source, right = made(root, variant)
        folder = Path(tempfile.mkdtemp(prefix="planted-", dir=root))
        try:
            shutil.copytree(right, folder, dirs_exist_ok=True)
            truth = planted(task.kind, folder)
            if truth is not None:
                return judged(task, variant, folder, source, right, truth)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return None


def judged(task: Task, variant: str, folder: Path, source: Path, right: Path, truth: Truth) -> Outcome:
    began, kind = time.monotonic(), task.kind
    chosen = VARIANTS[variant]
    report = task.how.verify(folder, source, chosen.settings)
    acts = changes_logits(folder, right, source, variant)
    diagnoses = [f for f in report.findings if f.level == "diagnosis"]
    causes = [str(f.data["cause"]) for f in diagnoses if f.data.get("cause")]
    failing = [f for f in report.findings if f.status == "fail"]
    keys = [t for t in truth.tensors if t.startswith("config.json")]
    named = bool(causes) and truth.names(causes[0])
    if keys and not causes:
        named = any(f.where in keys for f in failing)
    if kind not in KINDS and not kind.startswith(own.PREFIX):
        named = any(truth.tensors[0] in f"{f.where} {f.message}" for f in failing)
    return Outcome(
        kind, chosen.family, variant, acts, report.status != "pass", located(report, truth), named,
        any(not truth.names(c) for c in causes), "; ".join(causes), time.monotonic() - began,
    )  # fmt: skip


def located(report: Report, truth: Truth) -> bool:
    phase = truth.phase if isinstance(truth.phase, str) else f"layer {truth.phase}"
    for f in report.findings:
        text = f"{f.where} {f.message}"
        if f.level == "diagnosis" and f.where == phase:
            return True
        if f.status == "fail" and any(t in text for t in truth.tensors):
            return True
    return False


def changes_logits(folder: Path, right: Path, source: Path, variant: str) -> bool:
    """Whether the converted model computes other numbers with the mistake than without, in any bit."""
    import torch

    from ckpt_tool.verify.sides import converted_side
    from ckpt_tool.verify.subject import opened

    made = []
    for path in (right, folder):
        try:
            with opened(path, source, VARIANTS[variant].settings) as subject:
                side = converted_side(subject, torch.float32, "cpu")
                vocabulary = int(subject.config["vocab_size"])
                ids = torch.arange(vocabulary // 2 * 2).view(2, -1)  # every row, longer than a window
                made.append(list(side.outputs(ids).values()))
        except (CkptToolError, KeyError, ValueError, IndexError, RuntimeError):
            return True
    return any(not torch.equal(a, b) for a, b in zip(*made, strict=True))


# --- tables ---------------------------------------------------------------------------------------------

COLUMNS = ("planted", "acts", "caught", "located", "named", "misnamed")


def counted(outcomes: Sequence[Outcome]) -> tuple[int, ...]:
    return (len(outcomes), *(sum(getattr(o, c) for o in outcomes) for c in COLUMNS[1:]))


def table(outcomes: Sequence[Outcome], key: str) -> list[str]:
    groups = defaultdict(list)
    for o in outcomes:
        groups[getattr(o, key)].append(o)
    width = max([len(g) for g in groups] + [len(key)])
    lines = [f"{key:{width}} " + " ".join(f"{c:>8}" for c in COLUMNS)]
    for group, its in groups.items():
        lines.append(f"{group:{width}} " + " ".join(f"{n:8d}" for n in counted(its)))
    lines.append(f"{'all':{width}} " + " ".join(f"{n:8d}" for n in counted(outcomes)))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=sorted(PLANTED), action="append")
    parser.add_argument("--kind", default="", help="only kinds whose name holds this text")
    parser.add_argument("--sample", type=int, metavar="N", help="every Nth pair of kind and family")
    parser.add_argument("--mode", choices=MODES, default="default", help="how much of parity runs")
    parser.add_argument("--level", action="append", choices=LEVELS, help="these levels only")
    parser.add_argument("--costly", action="store_true", help="leave out what is left out of large models")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--right", action="store_true", help="right conversions instead: none may fail")
    parser.add_argument("--work", type=Path, help="where originals and conversions are written")
    asked = parser.parse_args(arguments)
    how = How(asked.mode, tuple(asked.level) if asked.level else None, asked.costly)
    with tempfile.TemporaryDirectory(prefix="detection-") as temporary:
        root = asked.work or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        families = asked.family or list(PLANTED)
        for variant in (v for family in families for v in PLANTED[family]):
            made(root, variant)
        if asked.right:
            from right import main as right  # beside this file

            return int(right(root, families, asked.sample, asked.jobs, asked.json))
        kinds = [k for k in (*KINDS, *kinds_of_documents()) if asked.kind in k]
        listed = tasks(root, families, kinds, asked.sample, how)
        for family in families:
            found = dict.fromkeys(k for v in PLANTED[family] for k in own.kinds(made(root, v)[1]))
            listed += tasks(root, [family], [k for k in found if asked.kind in k], asked.sample, how)
        with ProcessPoolExecutor(asked.jobs) as pool:
            outcomes = [o for o in pool.map(outcome, listed, chunksize=4) if o is not None]
    print("\n".join(table(outcomes, "kind")), end="\n\n")
    print("\n".join(table(outcomes, "family")))
    print(
        f"\nmode {how.mode}{', long prompts costly' * how.costly}, levels {', '.join(how.levels or ('all',))}"
    )
    if asked.json:
        asked.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n", encoding="utf-8")
    return int(any(o.acts and not o.caught for o in outcomes) or any(o.misnamed for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
